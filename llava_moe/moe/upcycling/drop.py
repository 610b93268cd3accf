"""Drop-Upcycling (Nakamura et al., 2502.19261): copies of which a part of the neurons starts anew.

    W_e[S_e] ~ N(mean(W[S_e]), std(W[S_e])^2)        S_e: int(ratio F) random neurons of expert e

A neuron is a row of gate and up and a column of down; mean and std are those of the replaced entries of that matrix.
Biases stay.
The paper describes one set of neurons for the three matrices; its published code draws one set for each matrix. (That
code first permutes the neurons of each expert, which changes neither the function nor, with random sets, the method.)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.types import MlpSpec
from llava_moe.moe.upcycling.base import Contract, UpcycleJob, Upcycler, stack
from llava_moe.moe.upcycling.from_scratch import gaussian
from llava_moe.registry import near_misses

INDICES = ("shared", "independent")


class Drop(Upcycler):
    """E copies, each partly drawn anew."""

    @dataclasses.dataclass(frozen=True)
    class Config(Upcycler.Config):
        """Options.

        Attributes:
            ratio: share of the neurons that start anew, 0..1.
            indices: "shared" takes one set of neurons for gate, up and down (the paper), "independent" one for each
                (its code).
        """

        ratio: float = 0.5
        indices: str = "shared"

    config: Drop.Config

    def __init__(self, config: Drop.Config) -> None:
        super().__init__(config)
        if not 0 <= config.ratio <= 1:
            raise ValueError(f"upcycler drop: ratio={config.ratio} must be between 0 and 1")
        if config.indices not in INDICES:
            hint = near_misses(config.indices, list(INDICES))
            raise ValueError(f"upcycler drop: unknown indices {config.indices!r}; {hint}")
        if config.ratio == 0:
            self.contract = Contract.EXACT_ANY_ROUTER

    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        tensors = stack([job.dense] * job.num_experts, job.num_experts, job.spec)
        redraw_neurons(tensors, job.spec, self.config.ratio, self.config.indices == "shared", job.generator)
        return tensors


def redraw_neurons(
    tensors: dict[str, Tensor], spec: MlpSpec, ratio: float, shared: bool, generator: torch.Generator
) -> None:
    """Draws int(ratio * F) neurons of each expert anew, in place; `spec` is that of one expert."""
    width = spec.intermediate
    count = int(ratio * width)
    if count == 0:
        return
    first = tensors["gate_up_proj" if spec.gated else "up_proj"]
    for first_FD, down_OF in zip(first, tensors["down_proj"], strict=True):
        parts = [(matrix_FD, 0) for matrix_FD in first_FD.split(width)] + [(down_OF, 1)]
        chosen = None
        for matrix, dim in parts:
            if chosen is None or not shared:
                chosen = torch.randperm(width, generator=generator, device=generator.device)[:count].to(matrix.device)
            old = matrix.index_select(dim, chosen).float()
            new = gaussian(old.shape, generator).to(old.device) * old.std(correction=0) + old.mean()
            matrix.index_copy_(dim, chosen, new.to(matrix.dtype))
