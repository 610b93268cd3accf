"""Training on stored tower features is training on pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_moe.config import RecipeError
from llava_moe.data.processing import load_processor
from llava_moe.model.assemble import load_model
from llava_moe.training import feature_cache, runner
from llava_moe.training.feature_cache import fingerprint, tower_features
from tests.tiny import write_llava_json
from tests.tiny_model import TINY_MOE, tiny_model, tiny_processor, write_tiny_checkpoint
from tests.training.runs import MOE_PARTS, losses, make_config

STAGE = {"learning_rates": {**MOE_PARTS}}


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["siglip", "clip", "timm"])
def test_losses_are_those_without_the_cache(vision: str, tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "start", TINY_MOE, vision=vision)
    data = write_llava_json(tmp_path / "data", 6, text_only_every=3)
    train = {"max_steps": 6, "per_device_train_batch_size": 1}  # some batches hold text alone
    found = {}
    for name, cache in (("pictures", None), ("features", str(tmp_path / "cache"))):
        config = make_config(tmp_path / name, checkpoint, data, stage=STAGE, data={"feature_cache": cache}, train=train)
        runner.train(config)
        found[name] = losses(config.output_dir)
    assert found["features"] == pytest.approx(found["pictures"], rel=5e-3)  # float16 on disk
    assert found["features"] != found["pictures"]


def test_features_are_what_the_stock_model_projects() -> None:
    for vision in ("siglip", "clip", "timm"):
        model, processor = tiny_model(vision=vision), tiny_processor(vision)
        pixels = torch.randn(2, *processor.image_shape)
        with torch.no_grad():
            stock = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
            ours = model.model.get_image_features(pixel_values=tower_features(model, pixels)).pooler_output
        torch.testing.assert_close(torch.stack(list(ours)), torch.stack(list(stock)))


@pytest.mark.slow
def test_a_store_is_written_once_and_a_changed_tower_gets_its_own(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    cache = tmp_path / "cache"

    def train(name: str, checkpoint: Path) -> None:
        runner.train(
            make_config(tmp_path / name, checkpoint, data, data={"feature_cache": str(cache)}, train={"max_steps": 1})
        )

    train("one", dense_checkpoint)
    assert len(list(cache.iterdir())) == 1
    changed = load_model(dense_checkpoint)
    with torch.no_grad():
        next(changed.model.vision_tower.parameters()).add_(0.1)
    changed.save_pretrained(tmp_path / "changed", save_original_format=True)
    load_processor(dense_checkpoint).save_pretrained(tmp_path / "changed")
    train("two", tmp_path / "changed")
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(feature_cache, "_write", lambda *args: pytest.fail("a store was written again"))
    train("three", dense_checkpoint)


def test_the_fingerprint_sees_what_features_depend_on() -> None:
    model, processor = tiny_model(), tiny_processor()
    marks = {fingerprint(model, processor), fingerprint(model, tiny_processor(image_mode="pad"))}
    model.config.vision_feature_layer = -1
    marks.add(fingerprint(model, processor))
    assert len(marks) == 3


def test_a_stage_that_trains_the_tower_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        dense_checkpoint,
        write_llava_json(tmp_path / "data", 4),
        stage={"learning_rates": {"vision_tower": 1e-4}},
        data={"feature_cache": str(tmp_path / "cache")},
    )
    with pytest.raises(RecipeError, match=r"data\.feature_cache needs a frozen tower"):
        runner.train(config)
    assert not (tmp_path / "cache").exists()
