"""A run with adapters that was interrupted ends with the bits of one that was not; its checkpoints are small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from llava_moe.model.assemble import load_model
from llava_moe.model.lora_merge import ADAPTERS, TRAINED
from llava_moe.training import runner
from llava_moe.training.checkpoints import last_whole_checkpoint
from llava_moe.training.stage import part_of
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_moe
from tests.training.controlled import BIASED
from tests.training.lora_cases import BALANCE, MOE_RATES, lora_config, write_wide_checkpoint
from tests.training.runs import deepspeed, losses, start_ranks, stopping_trainer

TRAIN = {"max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 2}
SECTIONS: dict[str, Any] = {"stage": {"learning_rates": MOE_RATES}, "balance": BALANCE, "train": TRAIN}


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def _interrupt() -> None:
    raise StoppedError


def stop_after(config: Any, step: int) -> Path:
    """Runs until the end of a step and stops there; the last whole checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LlavaMoeTrainer", stopping_trainer(step, _interrupt))
        with pytest.raises(StoppedError):
            runner.train(config)
    checkpoint = last_whole_checkpoint(Path(config.output_dir))
    assert checkpoint is not None
    return checkpoint


def names_in(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def same_result(one: str | Path, other: str | Path) -> None:
    """Losses, adapters, what learned beside them and the whole model, bit for bit."""
    assert losses(one) == losses(other)
    for file in (f"adapter/{ADAPTERS}", f"adapter/{TRAINED}", "model/model.safetensors"):
        assert (Path(one) / file).read_bytes() == (Path(other) / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "targets"), [({"dropout": 0.2}, ["attention", "mlp"]), ({}, [])], ids=["dropout", "experts"]
)
def test_an_interrupted_run_ends_with_the_same_bits(
    lora: dict[str, Any], targets: list[str], biased: Path, tmp_path: Path
) -> None:
    """The routers' selection bias is moved by a controller: a buffer, which is no parameter and yet must come back."""
    data = write_llava_json(tmp_path / "data", 6, text_only_every=4)
    balance = {**BALANCE, "controllers": {"loss_free_bias": {"rate": 0.01}}}
    sections = {**SECTIONS, "balance": balance, "lora": {**lora, "targets": targets}}
    whole = lora_config(tmp_path, biased, data, **sections)
    runner.train(whole)
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
    checkpoint = stop_after(broken, 4)
    assert checkpoint.name == "checkpoint-2"
    saved = names_in(checkpoint)
    assert {part_of(name) for name in saved if name.endswith("weight")} >= {"lora", "projector", "router"}
    assert {part_of(name) for name in saved} <= {"lora", "projector", "router", "vision_tower"}
    assert not any("vision_tower" in name and name.endswith(("weight", "bias")) for name in saved)
    runner.train(broken)
    same_result(whole.output_dir, broken.output_dir)


def test_the_biased_checkpoint_has_the_knob() -> None:
    assert BIASED["decoder"]["router"]["name"] == "deepseek_v3"


def test_a_quantised_run_resumes_and_merges_into_the_whole_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from llava_moe.training.lora import add_adapters
    from llava_moe.training.stage import apply_stage
    from tests.training.lora_cases import adapted, logits_of

    base = write_wide_checkpoint(tmp_path / "base", tiny_moe(layers=[1]))
    data = write_llava_json(tmp_path / "data", 6)
    config = lora_config(tmp_path, base, data, **{**SECTIONS, "lora": {"quantize": "nf4"}})
    runner.train(config)
    broken = dataclasses.replace(config, output_dir=str(tmp_path / "broken"))
    assert not any("absmax" in name for name in names_in(stop_after(broken, 4)))
    runner.train(broken)
    same_result(config.output_dir, broken.output_dir)
    # What was trained on is 4 bits wide, what is merged into is not: their difference is the error of quantisation,
    # weight by weight and to the bit of float32.
    packed, plain = load_model(base), adapted(base, dataclasses.replace(config, lora=_whole(config)), std=0.05)
    add_adapters(packed, config, base, torch.float32)
    layer = packed.get_submodule("model.language_model.layers.0.self_attn.q_proj").base_layer
    start = load_model(base).get_parameter("model.language_model.layers.0.self_attn.q_proj.weight").detach()
    seen = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert 0 < (seen - start).abs().max() < 0.2 * start.abs().max()
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            if ".lora_" in name:
                parameter.copy_(plain.get_parameter(name))
    apply_stage(packed, config.stage)
    packed.save_pretrained(tmp_path / "adapter")
    from llava_moe.merge import merge
    from llava_moe.training.lora import write_adapter

    write_adapter(tmp_path / "adapter", packed)
    merged = load_model(merge(tmp_path / "adapter"))
    largest = float(logits_of(plain).abs().max())
    torch.testing.assert_close(logits_of(merged), logits_of(plain), rtol=0, atol=1e-5 * max(1.0, largest))
    assert (logits_of(packed) - logits_of(plain)).abs().max() > 1e-3
    assert (
        not packed.get_submodule("model.language_model.layers.1.mlp.experts").get_base_layer().down_proj.dtype.itemsize
        < 4
    )


def _whole(config: Any) -> Any:
    return dataclasses.replace(config.lora, quantize=None)


def test_a_width_that_4_bits_cannot_hold_is_named(dense_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    data = write_llava_json(tmp_path / "data", 4)
    config = lora_config(tmp_path, dense_checkpoint, data, lora={"quantize": "nf4"})
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj has 32 inputs, and nf4 takes them in blocks of 64"
    ):
        runner.train(config)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "quantize"), [(2, "nf4"), (3, None)], ids=["zero2-nf4", "zero3"])
def test_killed_ranks_resume_under_zero(stage: int, quantize: str | None, tmp_path: Path) -> None:
    """Two ranks, adapters on attention, dense blocks and experts; the judge is one process without DeepSpeed."""
    if quantize is not None:
        pytest.importorskip("bitsandbytes")
    base = write_wide_checkpoint(tmp_path / "base", tiny_moe(layers=[1]))
    data = write_llava_json(tmp_path / "data", 12, text_only_every=3)
    train = {**TRAIN, "max_steps": 4, "per_device_train_batch_size": 1}
    sections = {**SECTIONS, "lora": {"quantize": quantize}, "train": {**train, "gradient_accumulation_steps": 2}}
    alone = lora_config(tmp_path / "alone", base, data, **sections)
    runner.train(alone)
    sections |= {"train": train, "deepspeed": f"scripts/deepspeed/zero{stage}.json"}
    ranks = lora_config(tmp_path / "ranks", base, data, **sections)
    recipe = str(tmp_path / "ranks" / "recipe.yaml")
    killed = start_ranks(deepspeed(2), ["tests.training.runs", "kill", "3", recipe])
    assert killed.returncode != 0
    out = Path(ranks.output_dir)
    checkpoint = last_whole_checkpoint(out)
    assert checkpoint is not None, killed.stdout[-3000:]
    assert {part_of(name) for name in names_in(checkpoint)} <= {"lora", "projector", "router"}
    weights = sum(file.stat().st_size for file in checkpoint.rglob("*model*"))
    assert weights < (base / "model.safetensors").stat().st_size
    done = start_ranks(deepspeed(2), ["llava_moe.train", recipe])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "going on from" in done.stdout
    assert losses(out) == pytest.approx(losses(alone.output_dir), rel=1e-5)
    found, wanted = (load_model(Path(path) / "model").state_dict() for path in (out, alone.output_dir))
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() < 1e-3, name  # Adam makes a step of a gradient that is noise
