"""The training objective: the only place where coefficients, layers, accumulation and world size meet.

    total = W * CE  +  (1 / A) * sum_l c_l * mean over layers of loss_l

CE is the cross-entropy of this micro-batch divided by the number of label tokens of the whole step (all ranks, all A
micro-batches). Gradients are summed over micro-batches and averaged over the W ranks, hence the two factors: with them
the gradient of CE is that of the mean over all tokens of the step, and the gradient of each balance loss is its mean
over micro-batches and ranks, for any A and W. Left alone, the stock Trainer would multiply the balance term by A (and,
summed inside the model's loss, by W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_moe.moe import BALANCE_LOSSES, Routing, RoutingContext, RoutingScope
from llava_moe.registry import RegistryError


@dataclass(frozen=True)
class Objective:
    """The total to call backward on, and its parts as they are logged (detached, unscaled, unweighted)."""

    total: Tensor
    parts: dict[str, Tensor]


def check_losses(coefficients: Mapping[str, float], has_experts: bool) -> None:
    """Looks at the recipe's balance section before compute is spent.

    Raises:
        RegistryError: a loss is unknown.
        ValueError: there are no experts to balance.
    """
    for name in coefficients:
        try:
            BALANCE_LOSSES.get(name)
        except RegistryError as error:
            raise RegistryError(f"balance.losses: {error}") from error
    if coefficients and not has_experts:
        raise ValueError(
            f"balance.losses names {', '.join(coefficients)}, but the checkpoint is dense and has nothing to balance"
        )


def balance_terms(
    routings: Mapping[int, Routing], scope: RoutingScope, coefficients: Mapping[str, float]
) -> dict[str, Tensor]:
    """The mean over layers of each named loss, unweighted."""
    terms = {}
    for name in coefficients:
        loss = BALANCE_LOSSES.get(name)
        per_layer = [loss(routing, _context(scope, layer, routing)) for layer, routing in routings.items()]
        terms[name] = torch.stack(per_layer).mean()
    return terms


def _context(scope: RoutingScope, layer: int, routing: Routing) -> RoutingContext:
    return scope.context(layer, routing.logits_TE.shape[0], routing.logits_TE.device)


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
