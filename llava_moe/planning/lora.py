"""What low-rank adapters add to the parameters, the arithmetic and the memory of a run whose base is frozen.

    per adapter parameter         weights   gradient   optimiser
    plain or DDP                     4          4       8 (adapters are float32 in any model)
    DeepSpeed                     as of any parameter of the model, see memory.py

A weight in 4 bits takes half a byte, and its share of the scales: one byte for 64 weights, four for 64 x 256 (QLoRA,
2305.14314, section 3). Adapters of stacked experts are added to the weights in every forward pass: a layer holds its
experts once more until its backward pass is done, and then their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llava_moe.model.lora_targets import Target
from llava_moe.model.sites import find_blocks
from llava_moe.planning.counts import Counts, PartCount, Work
from llava_moe.planning.memory import Memory, Setup, activations, optimiser_bytes, share_of

PART = "lora"
_FLOAT32 = 4
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class AdapterPlan:
    """Adapters of a recipe.

    Attributes:
        targets: the weights that have one.
        rank: of each.
        dropout: whether their inputs are dropped, each with a mask of its own.
        quantized: how many weights of the base are in 4 bits.
    """

    targets: tuple[Target, ...]
    rank: int
    dropout: bool = False
    quantized: int = 0

    @property
    def size(self) -> int:
        """Parameters of all adapters."""
        return sum(target.adapter_size(self.rank) for target in self.targets)

    def counts(self, base: Counts) -> Counts:
        """Those of the frozen base, and the adapters as a part."""
        active = round(sum(target.adapter_size(self.rank) * target.active for target in self.targets))
        return Counts({**base.parts, PART: PartCount(self.size, active, self.size)})

    def work(self, base: Work) -> Work:
        """Of a token; adding the adapters of experts to their weights is work of a step and not of a token."""
        linears = sum(target.adapter_size(self.rank) for target in self.targets if target.kind != "experts")
        return replace(base, decoder=base.decoder + 2.0 * linears)

    def memory(self, base: Memory, model: Any, setup: Setup) -> Memory:
        """That of the frozen base (with what learns beside the adapters), and of the adapters."""
        stored = _FLOAT32 if setup.zero_stage is None else setup.weight_bytes
        weights = share_of(self.size, setup, 3) * stored - round(self.quantized * (setup.weight_bytes - NF4_BYTES))
        gradients = share_of(self.size, setup, 2) * stored
        per_parameter = 2 * _FLOAT32 if setup.zero_stage is None else optimiser_bytes(setup)
        optimiser = share_of(self.size, setup, 1) * per_parameter
        half = setup.zero_stage is not None and setup.weight_bytes < _FLOAT32
        step = share_of(self.size, setup, 1) * _FLOAT32 if half else 0
        host = 0
        if setup.offload_optimiser:
            host, gradients, optimiser, step = gradients + optimiser + step, 0, 0, 0
        if setup.offload_weights:
            host, weights = host + weights, 0
        with _reached_from(model, min((t.layer or 0 for t in self.targets), default=None)):
            kept = activations(model, setup)
        return Memory(
            base.weights + weights,
            base.gradients + gradients,
            base.optimiser + optimiser,
            kept + self._kept(setup),
            base.logits,
            base.step + step,
            base.host + host,
        )

    def _kept(self, setup: Setup) -> int:
        """Bytes of the adapters' activations between forward and backward pass."""
        layers: dict[int | None, list[Target]] = {}
        for target in self.targets:
            layers.setdefault(target.layer, []).append(target)
        per_layer = [self._layer(members, setup) for members in layers.values()]
        folded = max((_folded(members, setup.compute_bytes) for members in layers.values()), default=0)
        return folded + (max(per_layer, default=0) if setup.checkpointing else sum(per_layer))

    def _layer(self, members: list[Target], setup: Setup) -> int:
        b = setup.compute_bytes
        linears = [target for target in members if target.kind != "experts"]
        inputs: dict[tuple[str, int], int] = {}
        for target in linears:
            # maps that read the same tensor keep it once; what the last map of attention reads is kept in any case
            module = target.path.rpartition(".")[0]
            key = (module, 0 if target.kind == "attention" else target.inputs)
            inputs.setdefault(key, target.inputs)
        per_token = sum(inputs.values()) * b
        if self.dropout:
            per_token = sum(target.inputs for target in linears) * (b + 1)
        per_token += len(linears) * self.rank * b
        stacked = [target for target in members if target.kind == "experts"]
        per_token += 2 * b * max((min(target.inputs, target.outputs) for target in stacked), default=0)
        copies = setup.weight_bytes + (b if b < setup.weight_bytes else 0)
        return per_token * setup.tokens + _folded(members, copies)


def _folded(members: list[Target], width: int) -> int:
    """Bytes of the experts' weights with their adapters."""
    return sum(t.experts * t.inputs * t.outputs for t in members if t.kind == "experts") * width


@contextmanager
def _reached_from(model: Any, layer: int | None) -> Iterator[None]:
    """Within it the backward pass goes down to this decoder layer, though no parameter of the base learns there."""
    layers = find_blocks(model.model.language_model).layers
    parameter = None if layer is None else min(layers[layer].parameters(), key=lambda p: p.numel())
    if parameter is None or parameter.requires_grad:
        yield
        return
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(False)
