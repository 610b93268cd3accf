"""Controllers that follow a plan and look at nothing: the value of a knob is a function of the step alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from llava_moe.moe.controllers.base import Controller, knobs
from llava_moe.moe.controllers.stats import StepStats
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey


class Schedule(Controller):
    """Sets one knob in every layer that has it.

    Attributes:
        knob: name of the buffer.
        owner: what has it, for the error message.
    """

    knob: ClassVar[str]
    owner: ClassVar[str]

    def __init__(self, config: Any, layers: Mapping[SiteKey, MoELayer]) -> None:
        super().__init__(config, layers)
        self.knobs = knobs(layers, self.knob)
        if not self.knobs:
            name = type(self).__name__
            raise ValueError(f"controller {name}: no layer has the knob {self.knob!r}; {self.owner} has it")

    @abstractmethod
    def value(self, done: int, num_steps: int) -> float:
        """The knob after `done` of `num_steps` steps."""

    def start(self, step: int, num_steps: int) -> None:
        self._set(self.value(step - 1, num_steps))

    def step(self, stats: StepStats) -> dict[str, Tensor | float]:
        """Sets the value of the coming step already, so the model that is saved now has it."""
        value = self.value(stats.step, stats.num_steps)
        self._set(value)
        return {self.knob: value}

    @torch.no_grad()
    def _set(self, value: float) -> None:
        for owners in self.knobs.values():
            for owner in owners:
                owner.get_buffer(self.knob).fill_(value)


def progress(done: int, num_steps: int, fraction: float) -> float:
    """How much of a schedule that takes this fraction of the run is over, from 0 to 1."""
    return min(done / max(fraction * num_steps, 1.0), 1.0)


def check_fraction(where: str, fraction: float) -> None:
    """Raises ValueError unless it is above 0 and at most 1."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{where}: fraction={fraction} must be above 0 and at most 1")
