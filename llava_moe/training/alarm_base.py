"""The contract of an alarm: what it looks for in the rows of a run's log, and what it advises.

An alarm sees one row after the other, as `RoutingMeter.flush` and the log made them, and says where a value is beyond
its limit; `alarms.py` counts the lines. Limits that no paper gives are ours, and each can be set in the recipe.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_moe.config import RunConfig
from llava_moe.moe import SiteKey
from llava_moe.moe.component import Component
from llava_moe.moe.controllers import knobs
from llava_moe.moe.controllers.loss_free_bias import KNOB
from llava_moe.training.telemetry import site_name

EVEN = ("switch", "gshard", "sequence", "global_batch", "importance_load", "heterogeneous", "localised")
_BIAS = "loss_free_bias"


@dataclass(frozen=True)
class Setup:
    """What the advice of an alarm depends on.

    Attributes:
        losses: coefficient of each balance loss.
        controllers: options of each controller.
        rates: learning rate of each part.
        biased: whether a router has the knob of the controller loss_free_bias.
        fixed: sites whose router has nothing that learns.
        by_modality: sites whose router has other experts for pictures than for text.
        factors: capacity factor of the sites that have a capacity.
    """

    losses: Mapping[str, float]
    controllers: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, float]
    biased: bool = False
    fixed: frozenset[str] = frozenset()
    by_modality: frozenset[str] = frozenset()
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(config: RunConfig, layers: Mapping[SiteKey, Any]) -> Setup:
        """From a recipe and the layers of its model."""
        routers = {site_name(site): layer.router for site, layer in layers.items()}
        capacities = {site_name(site): layer.capacity for site, layer in layers.items() if layer.capacity is not None}
        return Setup(
            losses={name: coefficient for name, (coefficient, _) in config.balance.weighted_losses().items()},
            controllers=config.balance.controller_options(),
            rates=dict(config.stage.learning_rates),
            biased=bool(knobs(layers, KNOB)),
            fixed=frozenset(site for site, router in routers.items() if not router.learned),
            by_modality=frozenset(site for site, router in routers.items() if getattr(router, "text_start", 0) > 0),
            factors={site: capacity.config.factor for site, capacity in capacities.items()},
        )

    def rate(self, verb: str) -> str:
        """Advice on the learning rate of the routers."""
        if "router" not in self.rates:
            return "name router in stage.learning_rates: the routers are frozen in this stage"
        return f"{verb} stage.learning_rates.router (now {self.rates['router']:g})"

    def loss(self, verb: str, name: str, start: float) -> str:
        """Advice on the coefficient of a loss that there may be already."""
        if self.losses.get(name):
            return f"{verb} balance.losses.{name} (now {self.losses[name]:g})"
        return f"add balance.losses.{name}: {start:g}"

    def balance(self) -> str:
        """Advice for a load that is too uneven."""
        present = [name for name in EVEN if self.losses.get(name)]
        advice = [self.loss("raise", present[0] if present else "switch", 0.01)]
        if _BIAS in self.controllers:
            rate = self.controllers[_BIAS].get("rate")
            advice.append(f"raise balance.controllers.{_BIAS}.rate" + (f" (now {rate:g})" if rate is not None else ""))
        elif self.biased:
            advice.append(f"add balance.controllers.{_BIAS}: {{rate: 0.001}}")
        return ", or ".join([*advice, self.rate("lower")])


@dataclass(frozen=True)
class Finding:
    """A value beyond its limit: at a site (None: of the whole run), of an expert (None: of no single one)."""

    value: float
    limit: float
    site: str | None = None
    expert: int | None = None
    name: str = ""


class Alarm(Component, ABC):
    """Looks for one thing.

    Attributes:
        what: the value in words, for the line that is printed.
        beyond: whether a value above or below its limit is found.
    """

    kind: ClassVar[str] = "alarm"
    what: ClassVar[str]
    beyond: ClassVar[str] = "above"

    @dataclasses.dataclass(frozen=True)
    class Config(Component.Config):
        """Options.

        Attributes:
            lines: log lines in a row that a value must be beyond its limit.
        """

        lines: int = 5

    def __init__(self, config: Any, setup: Setup, dead_share: float) -> None:
        for name, value in dataclasses.asdict(config).items():
            least = 1 if name in ("lines", "window") else 0
            if not least <= value < math.inf:
                raise ValueError(f"{name}={value} must be a number of at least {least}")
        self.config = config
        self.setup = setup
        self.dead_share = dead_share

    @abstractmethod
    def find(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        """What this row has beyond the limit; called with every row of the run, in order."""

    @abstractmethod
    def advice(self, finding: Finding) -> str:
        """What may mend it."""

    def is_collapse(self, findings: list[Finding], row: Mapping[str, Any]) -> bool:
        """Whether findings of one site mean that its routing has broken down; `on_collapse: stop` ends a run then."""
        return False

    def _layers(self, row: Mapping[str, Any], *keys: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The sites whose routers learn, if they have these values."""
        for site, layer in row.get("layers", {}).items():
            if site not in self.setup.fixed and all(layer.get(key) is not None for key in keys):
                yield site, layer
