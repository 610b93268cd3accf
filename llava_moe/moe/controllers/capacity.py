"""Moves the capacity factor of the layers: by plan, or by the bound of expert-token resonance (ETR, 2406.00023).

    linear   from `largest` at the first step to `smallest` at the end of the schedule
    etr      C_min = exp(D delta^2 / (2 - delta^2)) / E      delta = largest cosine of a token and an expert's direction

The bound is that of `capacity_bounds.ec_min_exp` (LocMoE, 2401.13920). It is taken as a capacity factor, measured in
each step and each layer, and kept between `smallest` and `largest`; the first step has `largest`. It needs logits that
are cosines: the router expert_token_resonance. Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from llava_moe.moe.controllers.base import Controller
from llava_moe.moe.controllers.schedule import Schedule, check_fraction, progress
from llava_moe.moe.controllers.stats import StepStats
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey
from llava_moe.registry import near_misses

RULES = ("linear", "etr")


class CapacityFactor(Schedule):
    """Moves `factor` of a `Capacity` or of a router that has its own."""

    knob: ClassVar[str] = "factor"
    owner: ClassVar[str] = "a layer's `capacity`, or the router expert_token_resonance,"

    @dataclasses.dataclass(frozen=True)
    class Config(Controller.Config):
        """Options.

        Attributes:
            rule: "linear" or "etr".
            largest: factor of the first step, and the upper bound.
            smallest: factor at the end of the linear schedule, and the lower bound; above 0.
            fraction: of the run that the linear schedule takes; null (all of it) is the only value for etr.
        """

        rule: str = "linear"
        largest: float = 2.0
        smallest: float = 1.1
        fraction: float | None = None

    config: CapacityFactor.Config

    def __init__(self, config: CapacityFactor.Config, layers: Mapping[SiteKey, MoELayer]) -> None:
        if config.rule not in RULES:
            raise ValueError(
                f"controller capacity: unknown rule {config.rule!r}; {near_misses(config.rule, list(RULES))}"
            )
        if not 0 < config.smallest <= config.largest:
            raise ValueError(
                f"controller capacity: smallest={config.smallest} must be above 0 and at most largest={config.largest}"
            )
        if config.rule == "etr" and config.fraction is not None:
            raise ValueError(f"controller capacity: fraction={config.fraction} belongs to the linear rule, not to etr")
        check_fraction("controller capacity", self._fraction(config))
        super().__init__(config, layers)
        if config.rule == "etr":
            self.knobs = {site: own for site, layer in layers.items() for own in [_in_router(layer)] if own}
            if not self.knobs:
                raise ValueError("controller capacity: rule etr needs the router expert_token_resonance")

    @staticmethod
    def _fraction(config: CapacityFactor.Config) -> float:
        return 1.0 if config.fraction is None else config.fraction

    def value(self, done: int, num_steps: int) -> float:
        part = progress(done, num_steps, self._fraction(self.config))
        return self.config.smallest if part == 1.0 else self._between(part)

    def _between(self, part: float) -> float:
        return self.config.largest + (self.config.smallest - self.config.largest) * part

    def start(self, step: int, num_steps: int) -> None:
        if self.config.rule == "linear":
            super().start(step, num_steps)
        elif step == 1:  # later the buffers hold what was measured, also after a resume
            self._set(self.config.largest)

    @torch.no_grad()
    def step(self, stats: StepStats) -> dict[str, Tensor | float]:
        if self.config.rule == "linear":
            return super().step(stats)
        for site in self.knobs.keys() & stats.layers.keys():
            router = self.layers[site].router
            bound = resonance_bound(router.hidden, router.num_experts, stats.layers[site].max_logit)
            for owner in self.knobs[site]:
                owner.get_buffer(self.knob).copy_(bound.clamp(self.config.smallest, self.config.largest))
        factors = [owner.get_buffer(self.knob) for owners in self.knobs.values() for owner in owners]
        return {self.knob: torch.stack(factors).mean()}


def resonance_bound(hidden: int, num_experts: int, cosine: Tensor) -> Tensor:
    """`capacity_bounds.ec_min_exp` of a scalar tensor, on its device; a cosine outside 0..1 is clamped to it."""
    squared = cosine.clamp(0.0, 1.0).square()
    # exp of more than 80 would leave float32; any bound in use is far smaller
    return (hidden * squared / (2 - squared)).clamp(max=80.0).exp() / num_experts


def _in_router(layer: MoELayer) -> list[torch.nn.Module]:
    return [m for m in layer.router.modules() if isinstance(m._buffers.get("factor"), Tensor)]
