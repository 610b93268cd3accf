"""Grouped average pooling, the fixed orthogonal scorer of LocMoE (2401.13920).

    z_e = relu(w_e x + b_e)        w_e = 1 / width on the e-th slice of the hidden dimensions, 0 elsewhere

So z_e is the mean of the e-th slice. The slices run from floor(e D / E) to floor((e + 1) D / E): each dimension is in
exactly one, the w_e are orthogonal, and nothing of them is learned. Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.scorers.base import Scorer, Scores, float32_linear
from llava_moe.moe.types import RoutingContext


def slice_directions(hidden: int, num_experts: int, power: float) -> Tensor:
    """float32 (E, D): width ** -power on each expert's slice; the mean for a power of 1, unit vectors for 1/2.

    Raises:
        ValueError: there are more experts than dimensions.
    """
    if num_experts > hidden:
        raise ValueError(f"grap: {num_experts} experts need at least as many hidden dimensions; there are {hidden}")
    directions_ED = torch.zeros(num_experts, hidden, dtype=torch.float32)
    bounds = itertools.pairwise(e * hidden // num_experts for e in range(num_experts + 1))
    for expert, (start, end) in enumerate(bounds):
        directions_ED[expert, start:end] = (end - start) ** -power
    return directions_ED


class GrapScorer(Scorer):
    """The mean of one slice of the hidden state for each expert, negative ones cut to 0.

    The buffer `directions` (E, D) holds the w_e; it is saved, though it never changes.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("directions",)

    @dataclasses.dataclass(frozen=True)
    class Config(Scorer.Config):
        """Options.

        Attributes:
            bias: whether a bias is learned (initially zero), the only parameter that there can be.
        """

        bias: bool = False

    config: GrapScorer.Config
    directions: Tensor

    def __init__(self, hidden: int, num_experts: int, config: GrapScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        self.learned = config.bias
        self.register_buffer("directions", slice_directions(hidden, num_experts, power=1.0))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        logits_TE = float32_linear(x_TD, self.directions, self.bias).relu()
        return Scores(logits_TE, logits_TE)
