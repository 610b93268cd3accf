"""A router made of two parts: a scorer (hidden states to logits) and a selector (logits to experts and weights).

    z = scorer(x)        S, g = selector(z)

Most methods of the field differ in one of the two only, so any scorer works with any selector. Routers with a name of
their own (top_k, cosine, sigmoid, ...) are such pairs with the options of their paper.
Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers import SCORERS, Scorer
from llava_moe.moe.selectors import SELECTORS, Selector
from llava_moe.moe.types import Routing, RoutingContext


class ScoredRouter(Router):
    """Base of the named pairs; itself the router `scored`, which takes the two parts by name."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            scorer: a name of `SCORERS`, with its options in `scorer_args`.
            selector: a name of `SELECTORS`, with its options in `selector_args`.
        """

        scorer: str = "linear"
        scorer_args: dict[str, Any] = dataclasses.field(default_factory=dict)
        selector: str = "softmax_topk_renorm"
        selector_args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __init__(self, hidden: int, num_experts: int, config: Any) -> None:
        super().__init__(hidden, num_experts, config)
        self.scorer = self.make_scorer()
        self.selector = self.make_selector()
        # Flags of the pair, on the instance: they depend on the options.
        self.token_choice = self.selector.token_choice
        self.causal_safe = self.selector.causal_safe
        self.normalised = self.selector.normalised
        self.stochastic = self.scorer.stochastic or self.selector.stochastic
        self.learned = self.scorer.learned or any(True for _ in self.selector.parameters())
        self.extras = (*self.scorer.extras, *self.selector.extras)

    def make_scorer(self) -> Scorer:
        """Reads the first half from the config."""
        return SCORERS.get(self.config.scorer).build(self.hidden, self.num_experts, self.config.scorer_args)

    def make_selector(self) -> Selector:
        """Reads the second half from the config."""
        return SELECTORS.get(self.config.selector).build(self.num_experts, self.config.selector_args)

    @property
    def active_experts(self) -> float:
        return self.selector.active_experts

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.scorer.reset_parameters(generator)
        self.selector.reset_parameters(generator)

    def tie_rows(self, group: int) -> None:
        self.scorer.tie_rows(group)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        scores = self.scorer(x_TD, context)
        chosen = self.selector(scores.selection_TE, context)
        extras = {**scores.extras, **chosen.extras}
        return Routing(scores.logits_TE, chosen.probs_TE, chosen.index_TK, chosen.weight_TK, extras)


class AnySelectorRouter(ScoredRouter):
    """Base of the routers that are one scorer with a selector of the recipe's choice.

    Raises:
        ValueError: the selector has no bound on the experts of a token that `k` could set, or `k` is given twice.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            selector: a name of `SELECTORS` that takes a k; its other options in `selector_args`.
        """

        k: int = 2
        selector: str = "softmax_topk_renorm"
        selector_args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make_selector(self) -> Selector:
        config, where = self.config, f"router {type(self).__name__}"
        selector = SELECTORS.get(config.selector)
        if selector.k_option is None:
            raise ValueError(f"{where}: selector={config.selector!r} takes no k; use the router scored with it")
        if selector.k_option in config.selector_args:
            raise ValueError(f"{where}: selector_args must not have {selector.k_option!r}; set k")
        return selector.build(self.num_experts, {selector.k_option: config.k, **config.selector_args})
