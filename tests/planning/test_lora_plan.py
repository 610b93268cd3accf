"""Adapters in a dry run: counts and the bytes of weights, gradients and optimiser are exact, activations close."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import LoraSection, RunConfig, StageSection
from llava_moe.planning import Setup, count, estimate, flops, model_on_meta
from llava_moe.planning.lora import NF4_BYTES
from llava_moe.training.lora import add_adapters, plan_adapters
from llava_moe.training.stage import apply_stage, part_of
from tests.planning.test_memory import IMAGE_TOKEN_POSITIONS, Kept, batch, bytes_of
from tests.tiny_model import TINY_MOE, tiny_config, tiny_model, tiny_moe

RANK = 4
ALL_SPARSE = tiny_moe(layers=[0, 1, 2, 3])


def recipe(rates: dict[str, float], **lora: Any) -> RunConfig:
    return RunConfig(output_dir="out", stage=StageSection("test", rates), lora=LoraSection(rank=RANK, alpha=8, **lora))


def adapted(moe: Any, config: RunConfig, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(moe).to(dtype)
    add_adapters(model, config, Path("somewhere"), dtype)
    apply_stage(model, config.stage)
    return model


@pytest.mark.parametrize("moe", [None, TINY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rates", [{"lora": 1e-3}, {"lora": 1e-3, "projector": 1e-3}], ids=["alone", "projector"])
def test_counts_and_bytes_are_exact(moe: Any, dtype: torch.dtype, rates: dict[str, float]) -> None:
    config = recipe(rates)
    model = adapted(moe, config, dtype)
    found = batch(model, 2, 32)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.train()(**{**found, "pixel_values": found["pixel_values"].to(dtype)}, loss_only=True).loss.backward()
    optimiser.step()
    states = [s for state in optimiser.state.values() for key, s in state.items() if key != "step"]

    empty = model_on_meta(tiny_config(moe))
    plan = plan_adapters(empty, config)
    assert plan is not None
    counts = plan.counts(count(empty, part_of))
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.parts["lora"].total == sum(p.numel() for n, p in model.named_parameters() if part_of(n) == "lora")
    assert counts.parts["lora"].active < counts.parts["lora"].total or moe is None
    setup = Setup(micro_batch=2, sequence_length=32, weight_bytes=dtype.itemsize, compute_bytes=dtype.itemsize)
    memory = plan.memory(estimate(empty, setup), empty, setup)
    assert memory.weights == bytes_of(model.parameters())
    assert memory.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert memory.optimiser == bytes_of(states)
    assert not any(p.requires_grad for n, p in empty.named_parameters() if part_of(n) == "decoder")


@pytest.mark.parametrize("moe", [None, TINY_MOE, ALL_SPARSE], ids=["dense", "half", "all"])
@pytest.mark.parametrize("rates", [{"lora": 1e-3}, {"lora": 1e-3, "projector": 1e-3}], ids=["alone", "projector"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_close_to_what_autograd_keeps(moe: Any, rates: dict[str, float], dropout: float) -> None:
    config = recipe(rates, dropout=dropout, targets=["attention", "mlp"] if dropout and moe != ALL_SPARSE else [])
    if dropout and moe == ALL_SPARSE:
        config = recipe(rates, dropout=dropout, targets=["attention"])
    model = adapted(moe, config)
    found, kept = batch(model, 4, 64), Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        model.train()(**found, loss_only=True)
    setup = Setup(micro_batch=4, sequence_length=64, image_tokens=IMAGE_TOKEN_POSITIONS)
    empty = model_on_meta(tiny_config(moe))
    plan = plan_adapters(empty, config)
    assert plan is not None
    memory = plan.memory(estimate(empty, setup), empty, setup)
    # the gradient of a layer's folded experts comes into being in the backward pass
    folded = max(
        (
            sum(t.experts * t.inputs * t.outputs * 4 for t in plan.targets if t.layer == i and t.kind == "experts")
            for i in range(4)
        ),
        default=0,
    )
    assert memory.activations - folded + memory.logits // 2 == pytest.approx(kept.total, rel=0.2)


def test_a_deep_target_shortens_the_backward_pass() -> None:
    empty = model_on_meta(tiny_config())
    setup = Setup(micro_batch=4, sequence_length=64)
    kept = []
    for target in (r"layers\.0\.self_attn\.q_proj", r"layers\.3\.self_attn\.q_proj"):
        plan = plan_adapters(empty, recipe({"lora": 1e-3}, targets=[target]))
        assert plan is not None
        kept.append(plan.memory(estimate(empty, setup), empty, setup).activations)
    assert kept[1] < kept[0] / 2


def test_zero_divides_the_adapters_and_4_bits_shrink_the_base() -> None:
    empty = model_on_meta(tiny_config())
    config = recipe({"lora": 1e-3})
    plan = plan_adapters(empty, config)
    assert plan is not None

    def at(stage: int | None, packed: int = 0) -> Any:
        setup = Setup(devices=4, weight_bytes=2, compute_bytes=2, zero_stage=stage)
        return replace(plan, quantized=packed).memory(estimate(empty, setup), empty, setup)

    share = -(-plan.size // 4)
    total = sum(p.numel() for p in empty.parameters())
    assert (at(0).gradients, at(0).optimiser, at(0).step) == (2 * plan.size, 12 * plan.size, 4 * plan.size)
    assert (at(1).gradients, at(1).optimiser) == (2 * plan.size, 12 * share)
    assert (at(2).gradients, at(2).optimiser, at(2).step) == (2 * share, 12 * share, 4 * share)
    assert at(2).weights == 2 * (total + plan.size)
    assert at(3).weights == 2 * (-(-total // 4) + share)
    assert at(2).weights - at(2, packed=64_000).weights == round(64_000 * (2 - NF4_BYTES))
    work = flops(empty, 64)
    assert plan.work(work).decoder == work.decoder + 2 * plan.size
