"""Options that change how a step is computed: the same numbers, said aloud, refused early where they cannot be had."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from llava_moe.config import RecipeError, StageSection, load_recipe
from llava_moe.model.attention import FLASH
from llava_moe.training import arguments, runner, speed
from llava_moe.training.arguments import training_arguments
from llava_moe.training.data import training_data
from llava_moe.training.speed import attention_for
from llava_moe.training.stage import apply_stage, part_of
from tests.tiny import write_llava_json
from tests.tiny_model import TINY_MOE, tiny_model, tiny_processor
from tests.training.runs import MOE_PARTS, make_config, step_gradients, unequal_data

MOE: dict[str, Any] = {
    "stage": {"learning_rates": {**MOE_PARTS, "vision_tower": 1e-3}},
    "balance": {"losses": {"switch": 0.1, "z": 0.01}},
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"speed": {"fused_loss": "chunked"}},
        {"train": {"activation_checkpointing": True}},
        {"train": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}},
    ],
    ids=["fused_loss", "activation_checkpointing", "gradient_checkpointing"],
)
def test_a_real_step_has_the_same_gradients(changes: dict[str, Any], moe_checkpoint: Path, tmp_path: Path) -> None:
    """Tower, projector, decoder, routers and experts learn; two micro-batches with unequal answers."""
    data = unequal_data(tmp_path / "data", 4)
    train = {"max_steps": 1, "gradient_accumulation_steps": 2}
    plain = step_gradients(make_config(tmp_path / "plain", moe_checkpoint, data, **MOE, train=train))
    changed = {**changes, "train": {**train, **changes.get("train", {})}}
    assert_same(step_gradients(make_config(tmp_path / "changed", moe_checkpoint, data, **MOE, **changed)), plain)
    assert {part_of(name) for name in plain} == {*MOE["stage"]["learning_rates"]}


def test_a_run_says_and_keeps_what_it_used(
    dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run of the time before `auto` is found finished, not refused as another recipe."""
    data = write_llava_json(tmp_path / "data", 4)
    config = make_config(tmp_path, dense_checkpoint, data, train={"max_steps": 1}, speed={"fused_loss": "chunked"})
    runner.train(config)
    assert "attention sdpa, fused_loss chunked" in capsys.readouterr().out
    out = Path(config.output_dir)
    done = json.loads((out / "done.json").read_text())
    assert (done["attention"], done["fused_loss"]) == ("sdpa", "chunked")
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["model"]["attn_implementation"] = "sdpa"
    del recipe["speed"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(runner, "load_model", lambda *args: pytest.fail("a finished run loaded its model"))
    assert runner.train(config) == out / "model"
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.attn_implementation=flash_attention_2", "FlashAttention needs a GPU"),
        ("model.attn_implementation=flex_attention", "no backward pass"),
        ("model.attn_implementation=spda", "did you mean 'sdpa'"),
        ("speed.fused_loss=liger", "needs a GPU; on a CPU use chunked"),
        ("speed.fused_loss=lieger", "did you mean 'liger'"),
        ("speed.fused=liger", r"unknown key speed\.fused; did you mean 'fused_loss'"),
        ("train.torch_compile=true", r"set speed\.compile_layers=true"),
        ("stage.weight_decay={decoder: 0.1}", r"stage\.weight_decay\.decoder: the part does not learn"),
        ("stage.weight_decay={projector: -1}", r"stage\.weight_decay\.projector: -1 must be a number of at least 0"),
        ("stage.weight_decay=much", r"stage\.weight_decay: 'much' must be a number"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_read(override: str, words: str, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    make_config(tmp_path, nowhere, (nowhere / "data.json", nowhere), stage={"learning_rates": {"projector": 1e-3}})
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["stage"]["learning_rates"] = {"projector": 1e-3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=words):
        runner.train(load_recipe(tmp_path / "recipe.yaml", [override]))
    assert not (tmp_path / "out").exists()


def test_packing_gets_the_attention_that_was_settled(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with FlashAttention, auto makes flat rows with boundaries."""
    config = make_config(tmp_path, dense_checkpoint, write_llava_json(tmp_path / "data", 4), data={"packing": True})
    config.train["bf16"] = True
    found = training_arguments(config)
    assert attention_for(config, found, dense_checkpoint) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(type(FLASH["flash_attention_2"]), "is_found", lambda self: self.version == 2)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    asked = attention_for(config, found, dense_checkpoint)
    assert asked == {"text_config": "flash_attention_2"}
    sources = [(Path(s.path), Path(str(s.image_folder))) for s in config.data.sources]
    for name, is_flat in (("flash_attention_2", True), ("sdpa", False)):
        _, collator = training_data(config, tiny_processor(), sources, None, name)
        assert (collator.flat, collator.varlen) == (is_flat, is_flat)


def test_checkpointing_goes_by_the_name_that_transformers_has(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_llava_json(tmp_path / "data", 2)
    names = ("gradient_checkpointing", "activation_checkpointing")
    for name in names:
        config = make_config(tmp_path, dense_checkpoint, data, train={name: True, "use_cpu": True})
        found = training_arguments(config)
        assert found.gradient_checkpointing
        assert getattr(found, "activation_checkpointing", True)
    old = {field.name for field in dataclasses.fields(TrainingArguments)} - set(arguments._CHECKPOINTING.values())
    for name in names:
        assert arguments._checkpointing_as_installed({name: True}, old) == {"gradient_checkpointing": True}
    config.train.update(dict.fromkeys(names, True))
    with pytest.raises(RecipeError, match=r"train\.gradient_checkpointing and train\.activation_checkpointing are the"):
        training_arguments(config)


def test_weight_decay_by_part() -> None:
    model = tiny_model(TINY_MOE)
    rates = {"projector": 1e-3, "decoder": 2e-4, "experts": 1e-4}
    stage = StageSection("s", rates, {"decoder": 0.1, "experts": 0.02})
    groups = apply_stage(model, stage)
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = {"projector": 0.0, "decoder": 0.1, "experts": 0.02}
    for group in groups:
        for parameter in group["params"]:
            part = part_of(names[id(parameter)])
            assert group["weight_decay"] == (wanted[part] if parameter.ndim >= 2 else 0.0), part
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1, 0.02}
    with pytest.raises(RecipeError, match=r"stage\.weight_decay\.router: the part does not learn"):
        apply_stage(model, StageSection("s", rates, {"router": 0.1}))


def test_the_speed_of_a_run_is_no_part_of_what_it_is() -> None:
    from llava_moe.config import ModelSection, RunConfig, SpeedSection

    keys = {f"speed.{field.name}" for field in dataclasses.fields(SpeedSection)} | {"model.attn_implementation"}
    assert keys == speed.INTERCHANGEABLE
    assert hasattr(ModelSection(), "attn_implementation")
    assert hasattr(RunConfig(), "speed")
