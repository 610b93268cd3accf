"""The training objective: the only place where coefficients, layers, accumulation and world size meet.

    total = W * CE  +  (1 / A) * sum_l c_l * mean over layers of factor_l * loss_l

CE is the cross-entropy of this micro-batch divided by the number of label tokens of the whole step (all ranks, all A
micro-batches). Gradients are summed over micro-batches and averaged over the W ranks, hence the two factors: with them
the gradient of CE is that of the mean over all tokens of the step, and the gradient of each balance loss is its mean
over micro-batches and ranks, for any A and W. Left alone, the stock Trainer would multiply the balance term by A (and,
summed inside the model's loss, by W). The factors are those of controllers that drive a loss, and 1 without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_moe.config import BalanceSection, RecipeError
from llava_moe.model.native import NATIVE_FAMILIES
from llava_moe.moe import BALANCE_LOSSES, BalanceLoss, MoELayer, Routing, RoutingScope, SiteKey
from llava_moe.registry import RegistryError
from llava_moe.training.telemetry import site_name


@dataclass(frozen=True)
class Objective:
    """The total to call backward on, and its parts as they are logged (detached, unscaled, without coefficient)."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Balance:
    """The balance losses of a recipe, built, and their coefficients; the losses keep state within a step."""

    losses: Mapping[str, BalanceLoss]
    coefficients: Mapping[str, float]

    @staticmethod
    def build(section: BalanceSection) -> Balance:
        """Makes them.

        Raises:
            RecipeError: a loss is unknown, or refuses an option.
        """
        losses, coefficients = {}, {}
        for name, (coefficient, options) in section.weighted_losses().items():
            try:
                losses[name] = BALANCE_LOSSES.get(name).build(options)
            except RegistryError as error:
                raise RecipeError(f"balance.losses: {error}") from error
            except ValueError as error:
                raise RecipeError(f"balance.losses.{name}: {error}") from error
            coefficients[name] = coefficient
        return Balance(losses, coefficients)

    def check(self, layers: Mapping[SiteKey, MoELayer]) -> None:
        """Holds the losses against the layers that were built, before compute is spent.

        Raises:
            RecipeError: there is nothing to balance, or a router does not provide what a loss needs.
        """
        if self.losses and not layers:
            raise RecipeError(
                f"balance.losses names {', '.join(self.losses)}, but no layer of the checkpoint routes tokens to "
                "experts (a dense checkpoint has nothing to balance; of decoders with experts of their own this "
                f"program reads {', '.join(sorted(NATIVE_FAMILIES))})"
            )
        for name, loss in self.losses.items():
            for site, layer in layers.items():
                try:
                    loss.check(layer.router, site[0])
                except ValueError as error:
                    raise RecipeError(f"balance.losses.{name}: layer {site_name(site)}: {error}") from error

    def start_step(self) -> None:
        """Must be called before the first micro-batch of every optimiser step."""
        for loss in self.losses.values():
            loss.start_step()


def site_losses(
    routings: Mapping[SiteKey, Routing],
    scope: RoutingScope,
    losses: Mapping[str, BalanceLoss],
    factor: Callable[[str, SiteKey], Tensor | float] | None = None,
) -> dict[str, dict[SiteKey, Tensor]]:
    """Each loss at each layer, without its coefficient.

    Args:
        routings: of one forward, by site.
        scope: the one that these routings were recorded in.
        losses: by name.
        factor: what controllers multiply a loss by at a site; None is 1 everywhere.

    Raises:
        ValueError: no layer has routed.
    """
    if losses and not routings:
        raise ValueError(f"balance losses {', '.join(losses)}: no layer has routed in this forward")
    found = {}
    for name, loss in losses.items():
        by_site = {site: loss(routing.before_drops(), scope.context_of(site)) for site, routing in routings.items()}
        if factor is not None:
            by_site = {site: factor(name, site) * value for site, value in by_site.items()}
        found[name] = by_site
    return found


def mean_over_layers(losses: Mapping[str, Mapping[SiteKey, Tensor]]) -> dict[str, Tensor]:
    """The term of each loss, from `site_losses`."""
    return {name: torch.stack(list(by_site.values())).mean() for name, by_site in losses.items()}


def balance_terms(
    routings: Mapping[SiteKey, Routing],
    scope: RoutingScope,
    losses: Mapping[str, BalanceLoss],
    factor: Callable[[str, SiteKey], Tensor | float] | None = None,
) -> dict[str, Tensor]:
    """The mean over layers of each loss, without its coefficient; arguments and errors are those of `site_losses`."""
    return mean_over_layers(site_losses(routings, scope, losses, factor))


def combine(
    cross_entropy: Tensor,
    terms: Mapping[str, Tensor],
    coefficients: Mapping[str, float],
    accumulation_steps: int,
    world_size: int,
) -> Objective:
    """Applies the formula at the head of this file.

    Args:
        cross_entropy: summed over this micro-batch's label tokens, divided by those of the whole step on all ranks.
        terms: from `balance_terms`.
        accumulation_steps: A, micro-batches of this step on each rank.
        world_size: W, ranks whose gradients are averaged.
    """
    total = cross_entropy * world_size
    parts = {"cross_entropy": cross_entropy.detach() * accumulation_steps * world_size}
    for name, term in terms.items():
        total = total + coefficients[name] * term / accumulation_steps
        parts[name] = term.detach()
    return Objective(total, parts)
