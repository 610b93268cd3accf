"""The contract of a router. Shapes: T tokens, D hidden width, E experts, K slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.component import Component, Float32Buffers
from llava_moe.moe.types import MlpSpec, Routing, RoutingContext

if TYPE_CHECKING:
    from llava_moe.moe.experts import Experts


class Router(Float32Buffers, Component, ABC):
    """Decides which experts see which tokens, and nothing else: no loss, no logging, no dispatch.

    Class flags, which the contract tests hold a router to (on an instance they may depend on its options):
        token_choice: each token fills its own K slots, and no other token matters to it.
        causal_safe: a token's routing never depends on later tokens; otherwise a decoder refuses the router.
        normalised: the weights of each token sum to 1.
        stochastic: training mode draws random numbers.
        signed: weights may be negative.
        learned: it has parameters that learn.
        needs: the fields of RoutingContext that it cannot do without: "token_ids_T", "modality_T".
        needs_previous: it reads the routing of the MoE layer before it (`context.previous`).
        needs_experts: it looks at the outputs of the experts (`context.run_experts`).
        extras: the names in `Routing.extras` that it always provides.
    """

    kind: ClassVar[str] = "router"
    token_choice: bool = True
    causal_safe: bool = True
    normalised: bool = True
    stochastic: bool = False
    signed: bool = False
    learned: bool = True
    needs: ClassVar[tuple[str, ...]] = ()
    needs_previous: bool = False
    needs_experts: bool = False
    extras: tuple[str, ...] = ()

    def __init__(self, hidden: int, num_experts: int, config: Any) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"{type(self).__name__}: num_experts={num_experts} must be at least 1")
        self.hidden = hidden
        self.num_experts = num_experts
        self.config = config

    @classmethod
    def build(cls, hidden: int, num_experts: int, args: Mapping[str, Any]) -> Router:
        """Makes the router from the plain mapping of a recipe or a config.json.

        Raises:
            ValueError: an option is unknown, or its value is refused by the router.
        """
        return cls(hidden, num_experts, cls.parse(args))

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial parameters. Never seed it alike in every layer: they would start identical."""

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Routes T tokens."""

    @property
    @abstractmethod
    def active_experts(self) -> float:
        """Experts that a token uses, at the most or by design in the mean; what counting active parameters needs."""

    def attach(self, experts: Experts) -> None:  # an optional hook
        """Called once by the layer: lets a router look at the kinds of its experts.

        Raises:
            ValueError: the router cannot work with them.
        """

    def check_part(self, part: str) -> None:  # an optional hook
        """Called once by the layer: where in a model it stands.

        Raises:
            ValueError: the router cannot work there.
        """

    def side_branch(self, spec: MlpSpec) -> nn.Module | None:
        """A module (x_TD, routing) -> y_TD that the layer adds to the experts' output; None for most methods."""
        return None

    def tie_rows(self, group: int) -> None:
        """Makes each `group` consecutive experts start with equal scores, as granular upcycling needs.

        Raises:
            ValueError: the scores of this router do not come from one row for each expert.
        """
        raise ValueError(f"{type(self).__name__} has no row for each expert that could be tied; use top_k")
