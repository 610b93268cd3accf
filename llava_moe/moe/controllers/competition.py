"""The schedule of CompeteSMoE (2505.13380): in which steps a layer evaluates all its experts.

    competes_l(t) ~ Bernoulli(rate)        for t after the warm-up, and at most max_layers of them in one step

After a warm-up every layer tosses a coin in every step. At most `max_layers` may compete in the same step, as a
competition costs E / k times the work; the others of that step go to the nearest step that has room, the earlier one of
two. The whole table follows from seed, number of steps and number of layers, so all ranks and resumed runs agree.
Shapes: S steps, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llava_moe.moe.controllers.base import Controller, knobs
from llava_moe.moe.controllers.stats import StepStats
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey

KNOB = "competes"


class CompetitionSchedule(Controller):
    """Sets `competes` to 1 in the layers whose turn it is, and to 0 after the step: what is saved never competes.

    The loss `competition` must be named beside it: without it the router learns nothing from a competition, and gets no
    gradient at all in such a step, which data-parallel training cannot do with.
    """

    drives = ("competition",)

    @dataclasses.dataclass(frozen=True)
    class Config(Controller.Config):
        """Options.

        Attributes:
            rate: share of the steps after the warm-up in which a layer competes, between 0 and 1.
            warm_up: share of the run in which none does, from 0 and below 1.
            max_layers: most layers in one step.
            seed: of the coins.
        """

        rate: float = 0.05
        warm_up: float = 0.05
        max_layers: int = 3
        seed: int = 0

    config: CompetitionSchedule.Config

    def __init__(self, config: CompetitionSchedule.Config, layers: Mapping[SiteKey, MoELayer]) -> None:
        super().__init__(config, layers)
        self.knobs = knobs(layers, KNOB)
        if not self.knobs:
            raise ValueError("controller competition: no router can compete; use the router compete_smoe")
        if not 0 < config.rate < 1 or not 0 <= config.warm_up < 1:
            raise ValueError(
                f"controller competition: rate={config.rate} must be between 0 and 1, and warm_up={config.warm_up} at "
                "least 0 and below 1"
            )
        expected = config.rate * len(self.knobs)
        if config.max_layers < 1 or expected > config.max_layers:
            raise ValueError(
                f"controller competition: max_layers={config.max_layers} must be at least 1 and at least the "
                f"{expected:.3g} layers that rate={config.rate} lets compete in a mean step"
            )
        self.sites = sorted(self.knobs)
        self._planned: tuple[int, list[set[int]]] = (0, [])

    def start(self, step: int, num_steps: int) -> None:
        self._set(self.competing(step, num_steps))

    def step(self, stats: StepStats) -> dict[str, Tensor | float]:
        self._set(set())
        return {"layers": float(len(self.competing(stats.step, stats.num_steps)))}

    def competing(self, step: int, num_steps: int) -> set[int]:
        """Indices into the sorted sites of the layers that compete in this step, which counts from 1."""
        if self._planned[0] != num_steps:
            self._planned = (num_steps, self._plan(num_steps))
        return self._planned[1][step - 1]

    def _plan(self, num_steps: int) -> list[set[int]]:
        generator = torch.Generator().manual_seed(self.config.seed)
        won_SL = torch.rand(num_steps, len(self.sites), generator=generator) < self.config.rate
        first = int(self.config.warm_up * num_steps)
        won_SL[:first] = False
        plan: list[set[int]] = [set() for _ in range(num_steps)]
        for step, layer in won_SL.nonzero().tolist():  # once in a run, and on the host
            plan[step].add(layer)
        return spread(plan, first, self.config.max_layers)

    @torch.no_grad()
    def _set(self, competing: set[int]) -> None:
        for index, site in enumerate(self.sites):
            for owner in self.knobs[site]:
                owner.get_buffer(KNOB).fill_(float(index in competing))


def spread(plan: list[set[int]], first: int, most: int) -> list[set[int]]:
    """Moves what is too much for a step to the nearest step from `first` on that has room, in place.

    What finds no room anywhere is dropped.
    """
    for step in range(first, len(plan)):
        for layer in sorted(plan[step])[most:]:
            plan[step].remove(layer)
            near = (t for d in range(1, len(plan)) for t in (step - d, step + d) if first <= t < len(plan))
            free = next((t for t in near if len(plan[t]) < most and layer not in plan[t]), None)
            if free is not None:
                plan[free].add(layer)
    return plan
