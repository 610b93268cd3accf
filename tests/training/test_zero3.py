"""ZeRO-3 with two CPU ranks: nothing hangs, nothing is lost, the numbers are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.model.assemble import load_model
from llava_moe.training import runner
from llava_moe.training.metrics import read_metrics
from tests.tiny import tiny_tokenizer, write_llava_json
from tests.tiny_model import tiny_text_config, tiny_vision_config
from tests.training.runs import ALL_PARTS, MOE_PARTS, deepspeed, make_config, start_ranks, write_recipe
from tests.training.test_saving import names_on_disk

pytestmark = pytest.mark.slow
ZERO3 = "scripts/deepspeed/zero3.json"


def run_ranks(recipe: Path) -> None:
    done = start_ranks(deepspeed(2), ["llava_moe.train", str(recipe)], timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_ranks_equal_one_process(kind: str, dense_checkpoint: Path, moe_checkpoint: Path, tmp_path: Path) -> None:
    """Rank 1 has text only, rank 0 pictures only; the one process takes the same micro-batches in turn."""
    checkpoint, parts = (dense_checkpoint, ALL_PARTS) if kind == "dense" else (moe_checkpoint, MOE_PARTS)
    data = write_llava_json(tmp_path / "data", 8, text_only_every=2)
    sections: dict[str, Any] = {
        "stage": {"learning_rates": {**parts, "vision_tower": 1e-3}},
        "balance": {"losses": {} if kind == "dense" else {"switch": 0.1, "z": 0.01}},
    }
    train = {"max_steps": 3, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    single = make_config(
        tmp_path / "single", checkpoint, data, **sections, train={**train, "gradient_accumulation_steps": 2}
    )
    runner.train(single)
    # a fused loss must find the vocabulary projection whole, which ZeRO-3 has only while that module runs
    sections["speed"] = {"fused_loss": "chunked" if kind == "dense" else "off"}
    recipe = write_recipe(tmp_path / "zero3", checkpoint, data, **sections, train=train, deepspeed=ZERO3)
    run_ranks(recipe)
    rows, expected = read_metrics(tmp_path / "zero3" / "out"), read_metrics(single.output_dir)
    assert len(rows) == len(expected) == 3
    for row, reference in zip(rows, expected, strict=True):
        for name in ("loss", "grad_norm", "cross_entropy", *sections["balance"]["losses"]):
            assert row[name] == pytest.approx(reference[name], rel=1e-4), (row["step"], name)
        assert row.get("layers", {}).keys() == reference.get("layers", {}).keys()
        for name in ("samples", "tokens", "label_tokens", "useful_tokens"):  # of both ranks
            assert row[name] == reference[name], (row["step"], name)
        assert row["learning_rate"] == pytest.approx(reference["learning_rate"])
    finals = [tmp_path / name / "out" / "model" for name in ("zero3", "single")]
    assert names_on_disk(finals[0]) == names_on_disk(checkpoint) == names_on_disk(finals[1])
    found, wanted = (load_model(final).state_dict() for final in finals)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_a_first_model_is_assembled_and_its_features_are_stored(tmp_path: Path) -> None:
    """What one rank does for all: under ZeRO-3 parameters are partitioned as they are built, and it must not wait."""
    from transformers import AutoModelForCausalLM, SiglipImageProcessorPil, SiglipVisionModel

    language_model, tower = tmp_path / "language_model", tmp_path / "tower"
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(language_model)
    tiny_tokenizer().save_pretrained(language_model)
    SiglipVisionModel(tiny_vision_config()).save_pretrained(tower)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tower)
    data = write_llava_json(tmp_path / "data", 6)
    recipe = write_recipe(
        tmp_path / "zero3",
        tmp_path,
        data,
        stage={"learning_rates": {"projector": 1e-2}},
        model={
            "checkpoint": None,
            "vision_tower": str(tower),
            "language_model": str(language_model),
            "vision_feature_select_strategy": "full",
        },
        data={"feature_cache": str(tmp_path / "cache"), "template": "chatml"},
        deepspeed=ZERO3,
    )
    run_ranks(recipe)
    out = tmp_path / "zero3" / "out"
    assert load_model(out / "initial")
    assert load_model(out / "model")
    # The store of a run without DeepSpeed is the same one: its name holds the fingerprint of the whole weights.
    config = make_config(tmp_path / "single", out / "initial", data, data={"feature_cache": str(tmp_path / "cache")})
    runner.train(config)
    assert len(list((tmp_path / "cache").iterdir())) == 1
