"""A schedule for the number of active experts (HyperRouter 2312.07035, SMoE-Dropout 2303.01610).

    k(t) = round((end - start) t / T) + start      t finished steps, T a fraction of the run

Half of a step is rounded up. HyperRouter raises k; a falling k goes from dense to sparse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from llava_moe.moe.controllers.base import Controller
from llava_moe.moe.controllers.schedule import Schedule, check_fraction, progress
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey


class KSchedule(Schedule):
    """Moves `active_k` from `start` to `end`."""

    knob: ClassVar[str] = "active_k"
    owner: ClassVar[str] = "a softmax top-k selector with scheduled_k: true"

    @dataclasses.dataclass(frozen=True)
    class Config(Controller.Config):
        """Options.

        Attributes:
            start: active experts in the first step, from 1 to the selector's k.
            end: those from the end of the schedule on, likewise.
            fraction: of the run that the schedule takes.
        """

        start: int
        end: int
        fraction: float = 1.0

    config: KSchedule.Config

    def __init__(self, config: KSchedule.Config, layers: Mapping[SiteKey, MoELayer]) -> None:
        check_fraction("controller k_schedule", config.fraction)
        super().__init__(config, layers)
        for owners in self.knobs.values():
            for owner in owners:
                # The buffer itself may stand anywhere in a schedule; its module knows how many slots there are.
                slots = cast(Any, owner).k
                for key, k in (("start", config.start), ("end", config.end)):
                    if not 1 <= k <= slots:
                        raise ValueError(f"controller k_schedule: {key}={k} must be from 1 to the router's k={slots}")

    def value(self, done: int, num_steps: int) -> float:
        start, end = self.config.start, self.config.end
        return float(math.floor((end - start) * progress(done, num_steps, self.config.fraction) + 0.5) + start)
