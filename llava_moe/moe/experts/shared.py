"""Experts that see every token, beside the routed ones: DeepSeekMoE (2401.06066), Qwen2-MoE (2407.10671).

    sum    y = shared(x) + routed(x)                      DeepSeek-V2/V3
    gated  y = sigmoid(w x) * shared(x) + routed(x)       Qwen2-MoE
    mean   y = (shared(x) + routed(x)) / 2                LibMoE: exact where all experts are copies of one block
Shapes: T tokens, D hidden width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.component import Component
from llava_moe.moe.experts.stacked import StackedExperts
from llava_moe.moe.types import MlpSpec
from llava_moe.registry import near_misses

MIXES = ("sum", "gated", "mean")


class SharedExperts(nn.Module, Component):
    """One always-on feed-forward block, as wide as `num` experts; n shared experts added up are one block n as wide."""

    kind: ClassVar[str] = "shared experts"

    @dataclasses.dataclass(frozen=True)
    class Config(Component.Config):
        """Options.

        Attributes:
            num: how many; their widths add up.
            width: width of one; null takes that of a routed expert.
            mix: one of `MIXES`.
        """

        num: int = 1
        width: int | None = None
        mix: str = "sum"

    def __init__(self, spec: MlpSpec, config: SharedExperts.Config) -> None:
        super().__init__()
        if config.num < 1 or (config.width is not None and config.width < 1):
            raise ValueError(f"shared experts: num={config.num} and width={config.width} must be at least 1")
        if config.mix not in MIXES:
            raise ValueError(f"shared experts: unknown mix {config.mix!r}; {near_misses(config.mix, list(MIXES))}")
        self.config = config
        self.spec = spec.with_width((config.width or spec.intermediate) * config.num)
        # Stacked with one expert: the same parameter names and the same upcycling as the routed ones.
        self.block = StackedExperts(self.spec, 1, StackedExperts.Config(kernel="loop"))
        self.gate = nn.Parameter(torch.empty(1, spec.hidden)) if config.mix == "gated" else None
        self.reset_parameters()

    @classmethod
    def build(cls, spec: MlpSpec, args: Mapping[str, Any]) -> SharedExperts:
        """Makes them from a recipe's mapping; `spec` is that of a routed expert."""
        return cls(spec, cls.parse(args))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.block.reset_parameters(generator)
        if self.gate is not None:
            nn.init.normal_(self.gate, std=0.02, generator=generator)

    def forward(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """Adds the shared output to that of the routed experts."""
        index_T1 = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
        shared_TD = self.block(x_TD, index_T1, torch.ones_like(index_T1, dtype=torch.float32))
        if self.config.mix == "mean":
            return (shared_TD + routed_TD) / 2
        if self.gate is not None:
            shared_TD = nn.functional.linear(x_TD, self.gate.to(x_TD.dtype)).sigmoid() * shared_TD
        return shared_TD + routed_TD
