"""Mixture of vectors (Zadouri et al., 2309.05444): experts are (IA)^3 vectors on the intermediate of one frozen block.

    l = sum_e g_e l_e        y = down(l * act(...)) + bias

The vectors are merged before use, so a token costs one block whatever the number of experts, and the papers' routing is
soft (router `dense`). They start at one: with weights that sum to 1 the layer starts as the block. The paper also puts
vectors on the keys and values of attention, which is not part of a feed-forward layer.
Shapes: T tokens, D hidden width, F width of the block, E experts, K slots, O output width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llava_moe.moe.experts.frozen import FrozenBaseExperts, gates
from llava_moe.moe.types import MlpSpec


class MovExperts(FrozenBaseExperts):
    """Besides the frozen `base_*`: vectors (E, F).

    Raises:
        ValueError: the activation is unknown.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(FrozenBaseExperts.Config):
        """There is nothing to choose."""

    def __init__(self, spec: MlpSpec, num_experts: int, config: MovExperts.Config | None = None) -> None:
        super().__init__(spec, num_experts, MovExperts.Config() if config is None else config)
        self.vectors = nn.Parameter(torch.empty(num_experts, spec.intermediate))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.reset_base(generator)
        nn.init.ones_(self.vectors)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """(T, D) to (T, O). A token without any expert gets the bias of `down` alone."""
        gates_TE = gates(index_TK, weight_TK.masked_fill(index_TK >= self.num_experts, 0.0), self.num_experts)
        vector_TF = linear(gates_TE.to(x_TD.dtype), self.vectors.t())
        up_TF = linear(x_TD, *self.base("up"))
        if self.spec.gated:
            hidden_TF = self.activation(linear(x_TD, *self.base("gate"))) * up_TF
        else:
            hidden_TF = self.activation(up_TF)
        return linear(vector_TF * hidden_TF, *self.base("down")).to(x_TD.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.spec.hidden}, intermediate={self.spec.intermediate}"
