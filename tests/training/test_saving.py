"""The names in a finished run's files are those of stock files, whatever the model was loaded from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping

from llava_moe.model.assemble import load_model
from llava_moe.training import runner
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, make_config


def names_on_disk(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_a_run_keeps_the_names(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    final = runner.train(make_config(tmp_path, moe_checkpoint, data, stage={"learning_rates": MOE_PARTS}))
    assert names_on_disk(final) == names_on_disk(moe_checkpoint)
    assert any(name.startswith("language_model.model.layers.0.mlp.experts.3.") for name in names_on_disk(final))


def test_a_model_from_a_training_checkpoint_is_saved_with_the_stock_names(moe_checkpoint: Path, tmp_path: Path) -> None:
    load_model(moe_checkpoint).save_pretrained(tmp_path / "training", save_original_format=False)
    assert names_on_disk(tmp_path / "training") != names_on_disk(moe_checkpoint)
    load_model(tmp_path / "training").save_pretrained(tmp_path / "final", save_original_format=True)
    assert names_on_disk(tmp_path / "final") == names_on_disk(moe_checkpoint)


def test_what_loading_recorded_does_not_spoil_the_names(moe_checkpoint: Path, tmp_path: Path) -> None:
    """The ZeRO-3 loader records every known conversion, used or not."""
    model = load_model(moe_checkpoint)
    model._weight_conversions = get_model_conversion_mapping(model)
    model.save_pretrained(tmp_path, save_original_format=True)
    assert names_on_disk(tmp_path) == names_on_disk(moe_checkpoint)
    for name, tensor in load_model(tmp_path).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], msg=name)
