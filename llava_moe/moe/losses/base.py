"""The contract of a balance loss, and the sums that several share. Shapes: T tokens, E experts, K slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llava_moe.moe.component import Component
from llava_moe.moe.types import Routing, RoutingContext

if TYPE_CHECKING:
    from llava_moe.moe.routers import Router

EPSILON = 1e-10


class BalanceLoss(Component, ABC):
    """(routing, context) -> scalar float32, unweighted; tokens outside `context.token_mask_T` never count.

    One object serves all layers of a training run. Attributes:
        scope: over which tokens its statistics go: "sequence", "micro" (this rank's micro-batch), or "global" (all
            ranks and the micro-batches of the step so far; such a loss keeps state until `start_step`).
        requires: names of `Routing.extras` that the router must provide.
        provided_by: the routers that do, by name.
    """

    kind: ClassVar[str] = "balance loss"
    scope: ClassVar[str] = "micro"
    requires: ClassVar[tuple[str, ...]] = ()
    provided_by: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> BalanceLoss:
        """Makes the loss from a recipe's mapping; raises ValueError as `Component.parse` does."""
        return cls(cls.parse(args))

    def check(self, router: Router, part: str = "decoder") -> None:
        """Called for every layer before training starts.

        Raises:
            ValueError: the loss cannot work with this router, or not in this part of the model.
        """
        for name in self.requires:
            if name not in router.extras:
                raise ValueError(
                    f"{type(self).__name__} needs {name!r}, which {type(router).__name__} does not provide; use the "
                    f"router {' or '.join(self.provided_by)}"
                )

    @abstractmethod
    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        """The loss of one layer."""

    def start_step(self) -> None:  # an optional hook
        """Called before the first micro-batch of every optimiser step."""


def masked_mean(value_T: Tensor, mask_T: Tensor) -> Tensor:
    """Mean over the first dimension of (T,) or (T, E) values where the mask is true; 0 when it is nowhere true."""
    mask = mask_T.to(value_T.dtype)
    if value_T.ndim == 2:
        mask = mask.unsqueeze(-1)
    return (value_T * mask).sum(dim=0) / mask.sum().clamp(min=1)


def shares(load_E: Tensor) -> Tensor:
    """Counts over their sum; zeros when nothing was counted."""
    return load_E / load_E.sum().clamp(min=1)


def squared_variation(value: Tensor, present: Tensor | None = None) -> Tensor:
    """CV^2 = Var / (Mean^2 + 1e-10) with the unbiased variance (Shazeer et al., 1701.06538); 0 for a single value.

    Args:
        value: any shape; all elements are one sample.
        present: of the same shape, 1 for elements that count and 0 for the others; None counts all.
    """
    present = torch.ones_like(value) if present is None else present.to(value.dtype)
    count = present.sum()
    mean = (value * present).sum() / count.clamp(min=1)
    variance = ((value - mean).square() * present).sum() / (count - 1).clamp(min=1)
    return variance / (mean.square() + EPSILON)
