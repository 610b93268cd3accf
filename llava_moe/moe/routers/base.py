"""The contract of a router. Shapes: T tokens, D hidden width, E experts, K slots."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.types import Routing, RoutingContext
from llava_moe.registry import near_misses


class Router(nn.Module, ABC):
    """Decides which experts see which tokens, and nothing else: no loss, no logging, no dispatch.

    Class flags, which the contract tests hold a router to:
        token_choice: each token fills its own K slots.
        causal_safe: a token's routing never depends on later tokens; otherwise a decoder refuses the router.
        normalised: the weights of each token sum to 1.
        stochastic: training mode draws random numbers.
    """

    token_choice: ClassVar[bool] = True
    causal_safe: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False

    @dataclasses.dataclass(frozen=True)
    class Config:
        """The options that a recipe may set under `router.args`."""

    def __init__(self, hidden: int, num_experts: int, config: Router.Config) -> None:
        super().__init__()
        self.hidden = hidden
        self.num_experts = num_experts
        self.config = config

    @classmethod
    def build(cls, hidden: int, num_experts: int, args: Mapping[str, Any]) -> Router:
        """Makes the router from the plain mapping of a recipe or a config.json.

        Raises:
            ValueError: an option is unknown, or its value is refused by the router.
        """
        known = [field.name for field in dataclasses.fields(cls.Config)]
        for key in args:
            if key not in known:
                raise ValueError(f"router {cls.__name__} has no option {key!r}; {near_misses(key, known)}")
        return cls(hidden, num_experts, cls.Config(**args))

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial parameters. Never seed it alike in every layer: they would start identical."""

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Routes T tokens."""
