"""Memory of weights, gradients and optimiser states is exact; what autograd keeps is close to what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.config import RecipeError, StageSection
from llava_moe.planning import Memory, Setup, estimate, model_on_meta
from llava_moe.planning.memory import activations, logits, zero_setup
from llava_moe.training.stage import apply_stage
from tests.tiny_model import HIDDEN, TINY_MOE, tiny_config, tiny_model, tiny_moe

REPO = Path(__file__).parents[2]
STAGES = {
    "projector": {"projector": 1e-3},
    "decoder": {"projector": 1e-3, "decoder": 1e-3, "embeddings": 1e-3},
    "all": {"projector": 1e-3, "decoder": 1e-3, "embeddings": 1e-3, "vision_tower": 1e-3},
}
IMAGE_TOKEN_POSITIONS = 4


def batch(model: Any, sequences: int, length: int) -> dict[str, Tensor]:
    """Sequences of full length that begin with a picture; every text position has a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (sequences, length), generator=generator)
    ids[:, :IMAGE_TOKEN_POSITIONS] = model.config.image_token_id
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    size = model.config.vision_config.image_size
    pixels = torch.randn(sequences, 3, size, size, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Kept:
    """Bytes that autograd keeps, each storage once and parameters not at all."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize("moe", [None, TINY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_weights_gradients_and_optimiser_are_exact(moe: Any, dtype: torch.dtype, stage: str) -> None:
    model = tiny_model(moe).to(dtype)
    rates = {**STAGES[stage], **({"experts": 1e-3, "router": 1e-3} if moe and stage != "projector" else {})}
    groups = apply_stage(model, StageSection("test", rates))
    optimiser = torch.optim.AdamW(groups)
    found = batch(model, 2, 32)
    model.train()(**{**found, "pixel_values": found["pixel_values"].to(dtype)}, loss_only=True).loss.backward()
    optimiser.step()
    states = [s for state in optimiser.state.values() for key, s in state.items() if key != "step"]
    width = dtype.itemsize
    memory = estimate(model, Setup(micro_batch=2, sequence_length=32, weight_bytes=width, compute_bytes=width))
    assert memory.weights == bytes_of(model.parameters())
    assert memory.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert memory.optimiser == bytes_of(states)


@pytest.mark.parametrize("moe", [None, TINY_MOE, tiny_moe(layers=[0, 1, 2, 3])], ids=["dense", "half", "all"])
@pytest.mark.parametrize("text", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_activations_are_close_to_what_autograd_keeps(moe: Any, text: str, stage: str) -> None:
    model = tiny_model(moe, text=text)
    rates = {**STAGES[stage], **({"experts": 1e-3, "router": 1e-3} if moe and stage != "projector" else {})}
    apply_stage(model, StageSection("test", rates))
    found, kept = batch(model, 4, 64), Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        model.train()(**found, loss_only=True)
    setup = Setup(micro_batch=4, sequence_length=64, image_tokens=IMAGE_TOKEN_POSITIONS)
    # of the logits autograd keeps the log-probabilities; the estimate has the peak with their gradient
    estimated = activations(model, setup) + logits(model, setup) // 2
    assert estimated == pytest.approx(kept.total, rel=0.2)


def test_checkpointing_keeps_layer_inputs() -> None:
    model = tiny_model()
    apply_stage(model, StageSection("test", STAGES["decoder"]))
    model.gradient_checkpointing_enable()
    found, kept = batch(model, 4, 64), Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        model.train()(**found, loss_only=True)
    setup = Setup(micro_batch=4, sequence_length=64, image_tokens=IMAGE_TOKEN_POSITIONS, checkpointing=True)
    inputs = 4 * 64 * 4 * HIDDEN * 4
    assert inputs < kept.total
    estimated = activations(model, setup)
    assert inputs < estimated < activations(model, Setup(micro_batch=4, sequence_length=64, image_tokens=4))


def test_zero_divides_what_it_says() -> None:
    model = model_on_meta(tiny_config())
    apply_stage(model, StageSection("test", STAGES["decoder"]))
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def at(stage: int | None, devices: int = 4, width: int = 2, **more: Any) -> Memory:
        return estimate(model, Setup(devices=devices, weight_bytes=width, compute_bytes=2, zero_stage=stage, **more))

    def part(number: int) -> int:
        return -(-number // 4)

    table = {stage: (m := at(stage), (m.weights, m.gradients, m.optimiser, m.step))[1] for stage in (0, 1, 2, 3)}
    assert table[0] == (2 * total, 2 * trainable, 12 * trainable, 4 * trainable)
    assert table[1] == (2 * total, 2 * trainable, 12 * part(trainable), 4 * part(trainable))
    assert table[2] == (2 * total, 2 * part(trainable), 12 * part(trainable), 4 * part(trainable))
    assert table[3] == (2 * part(total), 2 * part(trainable), 12 * part(trainable), 4 * part(trainable))
    assert [at(stage, width=4).optimiser for stage in (0, 1, 2, 3)] == [
        8 * trainable,
        12 * part(trainable),
        12 * part(trainable),
        8 * part(trainable),
    ]
    assert at(None).optimiser == 4 * trainable
    assert (at(None).step, at(3, width=4).step) == (0, 0)
    offloaded = at(3, offload_optimiser=True, offload_weights=True)
    assert (offloaded.weights, offloaded.gradients, offloaded.optimiser, offloaded.step) == (0, 0, 0, 0)
    assert offloaded.host == sum(table[3])


def test_the_peak_is_backward_or_step() -> None:
    assert Memory(1, 2, 3, activations=10, logits=5, step=7).total == 6 + 15
    assert Memory(1, 2, 3, activations=1, logits=1, step=7).total == 6 + 7


def test_what_a_deepspeed_file_means(tmp_path: Path) -> None:
    for stage in range(4):
        found = zero_setup(str(REPO / f"scripts/deepspeed/zero{stage}.json"), True, "bfloat16")
        assert (found["zero_stage"], found["weight_bytes"], found["offload_weights"]) == (stage, 2, False)
        assert zero_setup(str(REPO / f"scripts/deepspeed/zero{stage}.json"), False, "bfloat16")["weight_bytes"] == 4
    assert zero_setup(None, True, "float32") == {"zero_stage": None, "weight_bytes": 4, "compute_bytes": 2}
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    file.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}}))
    found = zero_setup(str(file), False, "float32")
    assert (found["offload_optimiser"], found["offload_weights"], found["weight_bytes"]) == (True, False, 2)
    file.write_text("{")
    with pytest.raises(RecipeError, match=r"ds\.json: not readable as a DeepSpeed JSON"):
        zero_setup(str(file), False, "float32")
    with pytest.raises(RecipeError, match=r"model\.dtype=float8"):
        zero_setup(None, False, "float8")


def test_autocast_keeps_copies_of_matrices() -> None:
    model = model_on_meta(tiny_config())
    apply_stage(model, StageSection("test", STAGES["decoder"]))
    plain, mixed = (activations(model, Setup(sequence_length=1, compute_bytes=b)) for b in (4, 2))
    matrices = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim >= 2)
    assert mixed - plain > 2 * matrices


def test_longer_and_larger_batches_take_more() -> None:
    model = model_on_meta(tiny_config(TINY_MOE))
    apply_stage(model, StageSection("test", {"experts": 1e-3, "router": 1e-3}))
    sizes = ((1, 64), (1, 128), (2, 64))
    small, long, large = (
        estimate(model, Setup(micro_batch=batch, sequence_length=length, image_tokens=4)) for batch, length in sizes
    )
    assert large.activations == 2 * small.activations
    assert large.logits == 2 * small.logits
    assert long.activations > small.activations
    assert (long.weights, long.optimiser) == (small.weights, small.optimiser)
