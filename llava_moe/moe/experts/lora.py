"""Experts as low-rank changes of one frozen block.

MixLoRA (TUDB-Labs/MixLoRA on GitHub), LoRAMoE (2312.09979) and MoLoRA (2309.05444).

Every expert has matrices A (r, I) and B (O, r) for each projection W (O, I) of the block; s = alpha / r.

    mix: expert    h_e = W x + s B_e A_e x before the activation, y = sum_e g_e down_e(act(h_e))        MixLoRA
    mix: linear    every projection is W x + s sum_e g_e B_e A_e x                                      LoRAMoE, MoLoRA

In the first, W x is computed once and not for each expert, and so is the base of `down`: it is linear, so the weighted
sum over a token's slots goes through it. In the second the combine weights scale the changes and not the block: a token
without any expert gets the block itself, and routing to all experts (router `dense`) is what the papers do.
B starts at zero, so the layer starts as the block, in the first form if a token's weights sum to 1.
Shapes: T tokens, D hidden width, F width of the block, E experts, K slots, R rank, I and O widths of a projection.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from llava_moe.moe.experts.frozen import FrozenBaseExperts, gates
from llava_moe.moe.types import MlpSpec
from llava_moe.registry import near_misses

MIXES = ("expert", "linear")


class LoraExperts(FrozenBaseExperts):
    """Besides the frozen `base_*`: lora_{gate,up,down}_a (E, R, I) and lora_{gate,up,down}_b (E, O, R).

    Raises:
        ValueError: an option is out of range, or the activation is unknown.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(FrozenBaseExperts.Config):
        """Options.

        Attributes:
            rank: R, width of the low-rank product.
            alpha: the changes are scaled by alpha / rank.
            dropout: share of the input of A that is dropped in training (0.05 in MixLoRA and LoRAMoE).
            mix: where the experts meet, one of `MIXES`.
        """

        rank: int = 8
        alpha: float = 16.0
        dropout: float = 0.0
        mix: str = "expert"

    config: LoraExperts.Config

    def __init__(self, spec: MlpSpec, num_experts: int, config: LoraExperts.Config | None = None) -> None:
        config = LoraExperts.Config() if config is None else config
        super().__init__(spec, num_experts, config)
        if config.rank < 1:
            raise ValueError(f"lora experts: rank={config.rank} must be at least 1")
        if config.alpha <= 0:
            raise ValueError(f"lora experts: alpha={config.alpha} must be above 0")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"lora experts: dropout={config.dropout} must be at least 0 and below 1")
        if config.mix not in MIXES:
            raise ValueError(f"lora experts: unknown mix {config.mix!r}; {near_misses(config.mix, list(MIXES))}")
        self.scale = config.alpha / config.rank
        D, F, R = spec.hidden, spec.intermediate, config.rank
        self._names = (("gate", D, F),) * spec.gated + (("up", D, F), ("down", F, spec.output))
        for name, width, output in self._names:
            self.register_parameter(f"lora_{name}_a", nn.Parameter(torch.empty(num_experts, R, width)))
            self.register_parameter(f"lora_{name}_b", nn.Parameter(torch.empty(num_experts, output, R)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.reset_base(generator)
        for name, width, _ in self._names:
            # Kaiming with a = sqrt(5), as nn.Linear and peft draw A: uniform within 1 / sqrt(inputs).
            self.get_parameter(f"lora_{name}_a").uniform_(-(width**-0.5), width**-0.5, generator=generator)
            nn.init.zeros_(self.get_parameter(f"lora_{name}_b"))

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """(T, D) to (T, O). Under `mix: linear` the result is not linear in the weights; see the head of the file."""
        weight_TK = weight_TK.masked_fill(index_TK >= self.num_experts, 0.0)
        mixed = self._mix_linear if self.config.mix == "linear" else self._mix_expert
        return mixed(x_TD, index_TK, weight_TK).to(x_TD.dtype)

    def _mix_linear(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        gates_TE = gates(index_TK, weight_TK, self.num_experts)

        def project(name: str, x_TI: Tensor) -> Tensor:
            delta_TO = self._up(name, self._down(name, x_TI) * gates_TE.unsqueeze(-1).to(x_TI.dtype))
            return linear(x_TI, *self.base(name)) + delta_TO

        up_TF = project("up", x_TD)
        hidden_TF = self.activation(project("gate", x_TD)) * up_TF if self.spec.gated else self.activation(up_TF)
        return project("down", hidden_TF)

    def _mix_expert(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        weight_TK1 = weight_TK.unsqueeze(-1).to(x_TD.dtype)
        # Which expert a slot uses, (T, K, E); an empty slot uses none. Multiplying the small (E R) product by it costs
        # less than sorting the slots, and nothing waits for the host.
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        uses_TKE = (index_TK.unsqueeze(-1) == experts_E).to(x_TD.dtype)

        def project(name: str) -> Tensor:
            delta_TKF = self._up(name, self._down(name, x_TD).unsqueeze(1) * uses_TKE.unsqueeze(-1))
            return linear(x_TD, *self.base(name)).unsqueeze(1) + delta_TKF

        up_TKF = project("up")
        hidden_TKF = self.activation(project("gate")) * up_TKF if self.spec.gated else self.activation(up_TKF)
        weighted_TKF = hidden_TKF * weight_TK1
        down_OF, bias_O = self.base("down")
        y_TO = linear(weighted_TKF.sum(dim=1), down_OF)
        if bias_O is not None:
            y_TO = y_TO + weight_TK1.sum(dim=1) * bias_O
        # A of `down` sees another input in every slot, so here the experts' products are summed before B.
        low_TER = (self._down("down", weighted_TKF) * uses_TKE.unsqueeze(-1)).sum(dim=1)
        return y_TO + self._up("down", low_TER)

    def _down(self, name: str, x: Tensor) -> Tensor:
        """A of all experts: (..., I) to (..., E, R)."""
        a_ERI = self.get_parameter(f"lora_{name}_a")
        x = dropout(x, self.config.dropout, self.training)
        return linear(x, a_ERI.flatten(0, 1)).unflatten(-1, a_ERI.shape[:2])

    def _up(self, name: str, low: Tensor) -> Tensor:
        """The sum over the experts of s B_e low_e: (..., E, R) to (..., O)."""
        b_EOR = self.get_parameter(f"lora_{name}_b")
        return self.scale * linear(low.flatten(-2), b_EOR.transpose(0, 1).flatten(1))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, rank={self.config.rank}, mix={self.config.mix!r}"
