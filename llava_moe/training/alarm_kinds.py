"""Each alarm, by name. Limits that no paper gives are ours; each can be set in the recipe."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from llava_moe.registry import Registry
from llava_moe.training.alarm_base import EVEN, Alarm, Finding, Setup


class Imbalance(Alarm):
    """One expert takes far more than its share. The limit is `above`, but at most `share` of what the number of experts
    makes possible (E / k - 1): with two of four experts MaxVio cannot exceed 1. 2408.15664 reports 0.04 to 0.72."""

    what = "largest violation"

    @dataclasses.dataclass(frozen=True)
    class Config(Alarm.Config):
        """Options.

        Attributes:
            lines: log lines in a row.
            above: MaxVio.
            share: of the largest MaxVio that is possible.
        """

        above: float = 4.0
        share: float = 0.85

    config: Imbalance.Config

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        for site, layer in self._layers(row, "max_violation", "experts_per_token"):
            count = len(layer["load"])
            most = count / max(layer["experts_per_token"], 1e-9) - 1
            if most < 1e-3:  # every token uses every expert: the load is by probability, which one may have all of
                most = count - 1
            limit = min(self.config.above, self.config.share * most)
            if most > 0 and layer["max_violation"] > limit:
                yield Finding(layer["max_violation"], limit, site)

    def advice(self, finding: Finding) -> str:
        return self.setup.balance()

    def is_collapse(self, findings: list[Finding], row: Mapping[str, Any]) -> bool:
        return True


class DeadExperts(Alarm):
    """Experts that hardly any token reaches, the same ones in every line; a collapse where it is half of them."""

    what, beyond = "load of experts", "below"

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        for site, layer in self._layers(row, "dead"):
            for expert in layer["dead"]:
                yield Finding(layer["load"][expert], self.dead_share / len(layer["load"]), site, expert)

    def advice(self, finding: Finding) -> str:
        return self.setup.balance()

    def is_collapse(self, findings: list[Finding], row: Mapping[str, Any]) -> bool:
        return 2 * len(findings) >= len(row["layers"][findings[0].site]["load"])


class Saturated(Alarm):
    """The router has no doubt about any token: its softmax is flat there, and hardly any gradient reaches it."""

    what, beyond = "entropy over ln E", "below"

    @dataclasses.dataclass(frozen=True)
    class Config(Alarm.Config):
        """Options.

        Attributes:
            lines: log lines in a row.
            below: entropy over ln E.
        """

        below: float = 0.02

    config: Saturated.Config

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        for site, layer in self._layers(row, "entropy_share"):
            if layer["entropy_share"] < self.config.below:
                yield Finding(layer["entropy_share"], self.config.below, site)

    def advice(self, finding: Finding) -> str:
        return f"{self.setup.loss('raise', 'z', 0.001)} (router z-loss), or {self.setup.rate('lower')}"

    def is_collapse(self, findings: list[Finding], row: Mapping[str, Any]) -> bool:
        return True


class Uniform(Alarm):
    """Far into training the router still prefers no expert: nothing has specialised."""

    what = "entropy over ln E"

    @dataclasses.dataclass(frozen=True)
    class Config(Alarm.Config):
        """Options.

        Attributes:
            lines: log lines in a row.
            above: entropy over ln E.
            after_steps: optimiser steps before which a router may be undecided.
        """

        above: float = 0.995
        after_steps: int = 1000

    config: Uniform.Config

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        if row["step"] > self.config.after_steps:
            for site, layer in self._layers(row, "entropy_share"):
                if layer["entropy_share"] > self.config.above:
                    yield Finding(layer["entropy_share"], self.config.above, site)

    def advice(self, finding: Finding) -> str:
        even = [name for name in EVEN if self.setup.losses.get(name)]
        lower = f", or {self.setup.loss('lower', even[0], 0)}" if even else ""
        return f"{self.setup.rate('raise')}{lower}"


class Drops(Alarm):
    """The capacity leaves many slots empty: those tokens pass the layer with fewer experts or none."""

    what = "drop rate"

    @dataclasses.dataclass(frozen=True)
    class Config(Alarm.Config):
        """Options.

        Attributes:
            lines: log lines in a row.
            above: share of the slots.
        """

        above: float = 0.2

    config: Drops.Config

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        for site, layer in row.get("layers", {}).items():
            if layer.get("drop_rate", 0.0) > self.config.above:
                yield Finding(layer["drop_rate"], self.config.above, site)

    def advice(self, finding: Finding) -> str:
        now = self.setup.factors.get(str(finding.site))
        factor = "" if now is None else f" (now {now:g})"
        return f"raise the factor of the capacity{factor}, or {self.setup.balance()}"


class ImagesToOne(Alarm):
    """Nearly all image tokens go through one expert that text does without: pictures have lost their choice."""

    what = "image tokens that one expert sees"

    @dataclasses.dataclass(frozen=True)
    class Config(Alarm.Config):
        """Options.

        Attributes:
            lines: log lines in a row.
            above: share of the image tokens that the expert sees.
            text_below: share of the text tokens that it sees; above it, the load as a whole is what is uneven.
        """

        above: float = 0.95
        text_below: float = 0.5

    config: ImagesToOne.Config

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        for site, layer in self._layers(row, "image_share", "experts_per_token"):
            images, slots = layer["image_tokens"], layer["experts_per_token"]
            by_design = site in self.setup.by_modality or 2 * slots > len(layer["load"])
            if by_design or not 0 < images < 1:
                continue
            for expert, (load, share) in enumerate(zip(layer["load"], layer["image_share"], strict=True)):
                seen = slots * load * (share or 0.0) / images
                text = slots * load * (1 - (share or 0.0)) / (1 - images)
                if seen > self.config.above and text < self.config.text_below:
                    yield Finding(seen, self.config.above, site, expert)

    def advice(self, finding: Finding) -> str:
        even = self.setup.loss("raise", "sequence", 1e-4)
        return f"{even} (it evens out each sample, of which pictures are most), or {self.setup.rate('lower')}"


class NoGradient(Alarm):
    """A balance loss with a coefficient depends on nothing that learns."""

    what = "gradient of a balance loss"
    beyond = "below"

    @dataclasses.dataclass(frozen=True)
    class Config(Alarm.Config):
        """Options.

        Attributes:
            lines: log lines in a row.
        """

        lines: int = 1

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        for name in row.get("without_gradient", []):
            if self.setup.losses.get(name):
                yield Finding(0.0, 0.0, name=name)

    def advice(self, finding: Finding) -> str:
        return f"{self.setup.rate('raise')}, or remove balance.losses.{finding.name}"


class ConstantLoss(Alarm):
    """A balance loss has exactly the same value again and again: it is stuck, and moves nothing. Zero is left alone,
    for some losses are 0 when they are content."""

    what = "change of a balance loss"
    beyond = "below"

    def __init__(self, config: Any, setup: Setup, dead_share: float) -> None:
        super().__init__(config, setup, dead_share)
        self._last: dict[str, float] = {}

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        last, self._last = self._last, {name: row[name] for name in self.setup.losses if name in row}
        stuck = row.get("without_gradient", [])
        for name, value in self._last.items():
            if value == last.get(name) and value != 0 and self.setup.losses[name] and name not in stuck:
                yield Finding(0.0, 0.0, name=name)

    def advice(self, finding: Finding) -> str:
        return f"see whether balance.losses.{finding.name} fits this router; {self.setup.rate('raise')}"


class LossSpike(Alarm):
    """The loss jumps far above what it was in the lines before, or is not finite."""

    what = "loss"

    @dataclasses.dataclass(frozen=True)
    class Config(Alarm.Config):
        """Options.

        Attributes:
            lines: log lines in a row.
            factor: times the median of the window.
            deviations: above that median, in robust standard deviations (1.4826 times the median deviation).
            window: lines that are compared with; half of them must be there.
        """

        lines: int = 1
        factor: float = 1.5
        deviations: float = 6.0
        window: int = 20

    config: LossSpike.Config

    def __init__(self, config: Any, setup: Setup, dead_share: float) -> None:
        super().__init__(config, setup, dead_share)
        self._before: deque[float] = deque(maxlen=config.window)

    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        loss, before = row.get("loss"), list(self._before)
        if "loss" in row.get("not_finite", []):  # as the log has it
            loss = math.nan
        if loss is None:
            return
        if not math.isfinite(loss):
            yield Finding(loss, math.inf)
            return
        self._before.append(loss)
        if 2 * len(before) < self.config.window:
            return
        middle = statistics.median(before)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in before)
        limit = max(self.config.factor * middle, middle + self.config.deviations * spread)
        if loss > limit:
            yield Finding(loss, limit)

    def advice(self, finding: Finding) -> str:
        return (
            "look at the data of these steps; if it comes again or stays, lower stage.learning_rates or "
            "train.max_grad_norm, or raise train.warmup_steps"
        )


ALARMS: Registry[type[Alarm]] = Registry("alarm")
ALARMS.register("imbalance", Imbalance)
ALARMS.register("dead_experts", DeadExperts)
ALARMS.register("saturated", Saturated)
ALARMS.register("uniform", Uniform)
ALARMS.register("drops", Drops)
ALARMS.register("images_to_one", ImagesToOne)
ALARMS.register("no_gradient", NoGradient)
ALARMS.register("constant_loss", ConstantLoss)
ALARMS.register("loss_spike", LossSpike)
