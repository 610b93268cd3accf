"""The contract of a selector: scores to experts and weights. Shapes: T tokens, E experts, K slots of a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from llava_moe.moe.component import Component, Float32Buffers
from llava_moe.moe.types import RoutingContext


@dataclass(frozen=True)
class Selection:
    """What a selector returns; the fields are those of `Routing`."""

    probs_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Selector(Float32Buffers, Component, ABC):
    """Chooses experts by their scores; sees no hidden states. Flags as in `Router`.

    The slots of a token are filled best first: those of a variable number of experts come before the empty ones.
    `k_option` names the option that bounds the number of experts of a token; None where there is no bound.
    """

    kind: ClassVar[str] = "selector"
    token_choice: bool = True
    causal_safe: bool = True
    normalised: bool = True
    stochastic: bool = False
    extras: tuple[str, ...] = ()
    k_option: ClassVar[str | None] = "k"

    def __init__(self, num_experts: int, config: Any) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.config = config

    @classmethod
    def build(cls, num_experts: int, args: Mapping[str, Any]) -> Selector:
        """Makes the selector from a recipe's mapping; raises ValueError as `Component.parse` does."""
        return cls(num_experts, cls.parse(args))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial parameters, where there are any; knobs of controllers stay as they are."""

    @abstractmethod
    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        """Chooses by float32 scores."""

    @property
    @abstractmethod
    def active_experts(self) -> float:
        """As `Router.active_experts`."""
