"""The temperature schedule of dense-to-sparse gating (DTS of EvoMoE, 2112.14397).

    linear        tau(t) = max(start - t (start - end) / T, end)
    exponential   tau(t) = start * (end / start)^(t / T)         end from T on

t counts the finished steps and T is a fraction of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from llava_moe.moe.controllers.base import Controller
from llava_moe.moe.controllers.schedule import Schedule, check_fraction, progress
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey
from llava_moe.registry import near_misses

SHAPES = ("linear", "exponential")


class Temperature(Schedule):
    """Moves `temperature` from `start` to `end`."""

    knob: ClassVar[str] = "temperature"
    owner: ClassVar[str] = "the router dts (or the selector dts)"

    @dataclasses.dataclass(frozen=True)
    class Config(Controller.Config):
        """Options.

        Attributes:
            start: temperature of the first step.
            end: temperature from the end of the schedule on.
            shape: "linear" or "exponential".
            fraction: of the run that the schedule takes.
        """

        start: float = 2.0
        end: float = 0.3
        shape: str = "linear"
        fraction: float = 1.0

    config: Temperature.Config

    def __init__(self, config: Temperature.Config, layers: Mapping[SiteKey, MoELayer]) -> None:
        if config.start <= 0 or config.end <= 0:
            raise ValueError(f"controller temperature: start={config.start} and end={config.end} must be above 0")
        if config.shape not in SHAPES:
            hint = near_misses(config.shape, list(SHAPES))
            raise ValueError(f"controller temperature: unknown shape {config.shape!r}; {hint}")
        check_fraction("controller temperature", config.fraction)
        super().__init__(config, layers)

    def value(self, done: int, num_steps: int) -> float:
        start, end, part = self.config.start, self.config.end, progress(done, num_steps, self.config.fraction)
        if part == 1.0:
            return end  # exactly, whatever rounding would make of it
        if self.config.shape == "linear":
            return start + (end - start) * part
        return float(start * (end / start) ** part)
