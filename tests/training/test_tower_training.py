"""Fused towers in a stage (rates and freezing of each), and projectors that merge features beside a feature cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config

from llava_moe.config import RecipeError, StageSection, load_recipe
from llava_moe.data.feature_store import FeatureStore
from llava_moe.model.assemble import load_model
from llava_moe.model.vision_composite import fused_config
from llava_moe.model.vision_unused import unused_parameters
from llava_moe.training import runner
from llava_moe.training.stage import apply_stage, part_of
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_model, tiny_processor, tiny_vision_config
from tests.training.runs import deepspeed, losses, make_config, start_ranks, write_recipe

HALF = [[0.5] * 3] * 2


def fused_model(**changes: Any) -> Any:
    """SigLIP and DINOv2 side by side."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    towers = [tiny_vision_config("siglip"), Dinov2Config(**sizes, patch_size=8)]
    return tiny_model(vision_config=fused_config(towers, [-2, -1], HALF, HALF), vision_feature_layer=-1, **changes)


@pytest.fixture(scope="module")
def fused_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    fused_model().save_pretrained(folder, save_original_format=True)
    tiny_processor().save_pretrained(folder)
    return folder


def stage(**rates: float) -> StageSection:
    return StageSection(name="s", learning_rates={key.replace("tower_", "tower."): rate for key, rate in rates.items()})


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"vision_tower": 1e-3}, {"vision_tower.0": 1e-3, "vision_tower.1": 1e-3}),
        ({"vision_tower_1": 1e-4}, {"vision_tower.1": 1e-4}),
        ({"vision_tower": 1e-3, "vision_tower_0": 1e-5}, {"vision_tower.0": 1e-5, "vision_tower.1": 1e-3}),
        ({"vision_tower_0": 1e-5, "vision_tower_1": 1e-6, "projector": 1e-2},
         {"vision_tower.0": 1e-5, "vision_tower.1": 1e-6, "projector": 1e-2}),
    ],
)  # fmt: skip
def test_each_tower_has_its_rate(rates: dict[str, float], expected: dict[str, float]) -> None:
    model = fused_model()
    groups = apply_stage(model, stage(**rates))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {(part_of(names[id(p)]), group["lr"]) for group in groups for p in group["params"]}
    assert found == set(expected.items())
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"vision_tower_2": 1e-3}, r"trains vision_tower\.2, which .* \(it has vision_tower\.0, vision_tower\.1, "),
        ({"vision_tower_one": 1e-3}, r"has no part 'vision_tower\.one'; did you mean 'vision_tower\.[01]'"),
        ({"vision_tower": 1e-3, "vision_tower_0": 1e-3, "vision_tower_1": 1e-3}, "trains vision_tower, which"),
    ],
)
def test_rates_of_towers_that_are_not_there(rates: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_stage(fused_model(), stage(**rates))


def test_a_single_tower_has_no_number() -> None:
    with pytest.raises(ValueError, match=r"trains vision_tower\.0, which .* \(it has vision_tower, "):
        apply_stage(tiny_model(), stage(vision_tower_0=1e-3))


def test_rates_from_a_recipe_and_from_the_command_line(fused_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    rates = {"projector": 1e-2, "vision_tower.1": 1e-2}
    path = write_recipe(tmp_path / "a", fused_checkpoint, data, stage={"learning_rates": rates})
    changed = load_recipe(path, ["stage.learning_rates[vision_tower.1]=0.5", "stage.learning_rates[vision_tower.0]=2"])
    assert {k: v for k, v in changed.stage.learning_rates.items() if "tower" in k} == {
        "vision_tower.1": 0.5,
        "vision_tower.0": 2.0,
    }
    before, after = load_model(fused_checkpoint), load_model(runner.train(load_recipe(path)))
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    moved = {part_of(name) for (name, old), new in pairs if not torch.equal(old, new)}
    assert moved >= {"projector", "vision_tower.1"}
    assert "vision_tower.0" not in moved


def test_leftovers_are_found_without_memory() -> None:
    """Of a DINOv2 of its true size: what lies behind the layer, the last norm, and the token of masked patches."""
    config = Dinov2Config(hidden_size=1024, num_hidden_layers=3, num_attention_heads=16, image_size=518, patch_size=14)
    found = unused_parameters(config, -2)
    assert {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"} < found
    rest = {name.split(".")[2] for name in found if name.startswith("encoder.")}
    assert rest == {"2"}
    assert not any(name.startswith("encoder.") for name in unused_parameters(config, [-3, 3]))


def test_cached_features_are_those_of_the_tower(tmp_path: Path) -> None:
    """A projector that merges 2 x 2 features makes fewer tokens than the store has features."""
    model, processor = tiny_model(projector="pixel_shuffle", image_seq_length=1), tiny_processor()
    processor.num_additional_image_tokens = -3
    assert processor.num_image_tokens == 1
    model.save_pretrained(tmp_path / "start", save_original_format=True)
    processor.save_pretrained(tmp_path / "start")
    data, found = write_llava_json(tmp_path / "data", 4, text_only_every=2), {}
    for name, cache in (("pictures", None), ("features", str(tmp_path / "cache"))):
        sections = {"data": {"feature_cache": cache}, "train": {"per_device_train_batch_size": 1}}
        config = make_config(tmp_path / name, tmp_path / "start", data, **sections)
        runner.train(config)
        found[name] = losses(config.output_dir)
    assert found["features"] == pytest.approx(found["pictures"], rel=5e-3)  # float16 on disk
    (folder,) = (tmp_path / "cache").iterdir()
    mark = json.loads((folder / "index.json").read_text())["fingerprint"]
    assert FeatureStore(folder, mark).feature_shape == (4, 24)


def test_a_cache_beside_a_fused_tower_that_learns_is_refused(fused_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 2)
    rates = {"learning_rates": {"vision_tower.1": 1e-3}}
    config = make_config(tmp_path, fused_checkpoint, data, stage=rates, data={"feature_cache": str(tmp_path / "cache")})
    with pytest.raises(RecipeError, match="needs a frozen tower"):
        runner.train(config)


@pytest.mark.slow
def test_fused_towers_under_zero3(fused_checkpoint: Path, tmp_path: Path) -> None:
    """Two ranks learn what one process learns, each tower at its rate; rank 1 has text only."""
    data = write_llava_json(tmp_path / "data", 8, text_only_every=2)
    sections: dict[str, Any] = {
        "stage": {"learning_rates": {"projector": 1e-2, "vision_tower.0": 1e-3, "vision_tower.1": 1e-4}}
    }
    train = {"max_steps": 2, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    single = make_config(
        tmp_path / "single", fused_checkpoint, data, **sections, train={**train, "gradient_accumulation_steps": 2}
    )
    runner.train(single)
    recipe = write_recipe(
        tmp_path / "zero3", fused_checkpoint, data, **sections, train=train, deepspeed="scripts/deepspeed/zero3.json"
    )
    done = start_ranks(deepspeed(2), ["llava_moe.train", str(recipe)], timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    found, expected = losses(tmp_path / "zero3" / "out"), losses(single.output_dir)
    assert found == pytest.approx(expected, rel=1e-4)
    models = [load_model(tmp_path / name / "out" / "model").state_dict() for name in ("zero3", "single")]
    for name, tensor in models[1].items():
        torch.testing.assert_close(models[0][name], tensor, rtol=1e-3, atol=1e-3, msg=name)
