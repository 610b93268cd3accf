"""The contract of a scorer: hidden states to one score for each expert. Shapes: T tokens, D hidden width, E experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.component import Component, Float32Buffers
from llava_moe.moe.types import RoutingContext


@dataclass(frozen=True)
class Scores:
    """What a scorer returns.

    Attributes:
        logits_TE: float32, without noise: what losses and analyses see.
        selection_TE: what the selector chooses by; differs from the logits only where a scorer adds noise.
        extras: handed on into `Routing.extras`.
    """

    logits_TE: Tensor
    selection_TE: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Scorer(Float32Buffers, Component, ABC):
    """Produces logits; knows nothing of k. Flags as in `Router`."""

    kind: ClassVar[str] = "scorer"
    stochastic: bool = False
    learned: bool = True
    extras: tuple[str, ...] = ()

    def __init__(self, hidden: int, num_experts: int, config: Any) -> None:
        super().__init__()
        self.hidden = hidden
        self.num_experts = num_experts
        self.config = config

    @classmethod
    def build(cls, hidden: int, num_experts: int, args: Mapping[str, Any]) -> Scorer:
        """Makes the scorer from a recipe's mapping; raises ValueError as `Component.parse` does."""
        return cls(hidden, num_experts, cls.parse(args))

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial parameters."""

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        """Scores T tokens, in float32 whatever the input and also under autocast."""

    def tie_rows(self, group: int) -> None:
        """See `Router.tie_rows`."""
        raise ValueError(f"{type(self).__name__} has no row for each expert that could be tied; use linear")


def refuse_negative(where: str, **values: float) -> None:
    """Raises ValueError for the first value that is below 0, or is no number."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{where}: {name}={value} must be at least 0")


@torch.no_grad()
def copy_first_of_group(parameter: Tensor, group: int) -> None:
    """Overwrites each run of `group` consecutive rows with the first of them.

    Raises:
        ValueError: the number of rows is no multiple of `group`.
    """
    rows = parameter.shape[0]
    if group < 1 or rows % group:
        raise ValueError(f"{rows} experts cannot be tied in groups of {group}")
    parameter.copy_(parameter[::group].repeat_interleave(group, dim=0))


def float32_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """A linear map in float32, also under autocast: bfloat16 logits make near-ties flip between runs and ranks."""
    with torch.autocast(x_TI.device.type, enabled=False):
        bias = None if bias_O is None else bias_O.float()
        return nn.functional.linear(x_TI.float(), weight_OI.float(), bias)
