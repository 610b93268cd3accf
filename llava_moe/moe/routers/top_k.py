"""Softmax top-k routing: Switch (2101.03961, k=1), Mixtral (2401.04088), DeepSeekMoE (2401.06066).

    z = x W^T (+ b)        p = softmax(z)        S = top-k

The literature has three conventions for the combine weights, and they differ in output and gradient:
    softmax_topk_renorm   g = p_S / sum(p_S)     LibMoE, CuMo, Qwen with norm_topk_prob
    softmax_topk          g = p_S                Switch, DeepSeekMoE-16B: the weights sum to less than 1
    topk_softmax          g = softmax(z_S)       Mixtral; equal to the first in exact arithmetic
With k = 1 the first and the third give g = 1 for every token, so the router never learns from the task loss.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.routers.base import Router
from llava_moe.moe.types import Routing, RoutingContext
from llava_moe.registry import near_misses

CONVENTIONS = ("softmax_topk_renorm", "softmax_topk", "topk_softmax")


class TopKRouter(Router):
    """A linear scorer; each token keeps its k best experts."""

    token_choice: ClassVar[bool] = True
    causal_safe: ClassVar[bool] = True

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            convention: one of `CONVENTIONS`.
            bias: whether the scorer has a bias (initially zero).
            init_std: standard deviation of the initial scorer weights.
        """

        k: int = 2
        convention: str = "softmax_topk_renorm"
        bias: bool = False
        init_std: float = 0.02

    config: TopKRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: TopKRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        if not 1 <= config.k <= num_experts:
            raise ValueError(f"top_k router: k={config.k} must be between 1 and the {num_experts} experts")
        if config.convention not in CONVENTIONS:
            hint = near_misses(config.convention, list(CONVENTIONS))
            raise ValueError(f"top_k router: unknown convention {config.convention!r}; {hint}")
        self.normalised = config.convention != "softmax_topk"  # type: ignore[misc]  # narrows the class flag
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.config.init_std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        # float32 throughout, also under autocast: bfloat16 logits make near-ties flip between runs and ranks.
        with torch.autocast(x_TD.device.type, enabled=False):
            bias_E = None if self.bias is None else self.bias.float()
            logits_TE = nn.functional.linear(x_TD.float(), self.weight.float(), bias_E)
        probs_TE = logits_TE.softmax(dim=-1)
        top_TK, index_TK = probs_TE.topk(self.config.k, dim=-1)
        if self.config.convention == "softmax_topk_renorm":
            weight_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
        elif self.config.convention == "topk_softmax":
            weight_TK = logits_TE.gather(-1, index_TK).softmax(dim=-1)
        else:
            weight_TK = top_TK
        return Routing(logits_TE, probs_TE, index_TK, weight_TK)
