"""Alarms: lines of a run's log that say that its routing goes wrong, and what may mend it.

Alarms are a function of the rows of the log alone. So all ranks, which have the same rows, come to the same alarms; and
a resumed run is fed the rows that there are, and goes on as if it had not been interrupted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava_moe.config import RecipeError, RunConfig, TelemetrySection
from llava_moe.moe import SiteKey
from llava_moe.registry import near_misses
from llava_moe.training import distributed
from llava_moe.training.alarm_base import Alarm, Finding, Setup
from llava_moe.training.alarm_kinds import ALARMS
from llava_moe.training.metrics import FILE
from llava_moe.training.telemetry import RoutingMeter

KEY = "alarms"
_ON_COLLAPSE = ("warn", "stop")
_Key = tuple[str, str | None, int | None, str]


class CollapseError(ValueError):
    """The routing has collapsed, and the recipe asks to stop then."""


def make_meter(section: TelemetrySection) -> RoutingMeter:
    """The meter of a recipe.

    Raises:
        RecipeError: a value is refused.
    """
    if section.every < 0:
        raise RecipeError(f"telemetry.every={section.every} must be at least 0; 0 measures no routing")
    if not 0 <= section.dead_share < 1:
        raise RecipeError(f"telemetry.dead_share={section.dead_share} must be at least 0 and below 1")
    if section.on_collapse not in _ON_COLLAPSE:
        known = near_misses(section.on_collapse, list(_ON_COLLAPSE))
        raise RecipeError(f"telemetry.on_collapse={section.on_collapse!r} must be warn or stop; {known}")
    if section.on_collapse == "stop" and section.every == 0:
        raise RecipeError("telemetry.on_collapse=stop needs a routing that is measured, but telemetry.every is 0")
    return RoutingMeter(section.every, section.images, section.dead_share)


def check_telemetry(section: TelemetrySection) -> None:
    """What can be said of the section without a model.

    Raises:
        RecipeError: a value is refused, or an alarm or one of its options is unknown.
    """
    make_meter(section)
    _build(section, Setup(losses={}, controllers={}, rates={}))


class Alarms:
    """All alarms of a run.

    Args:
        section: of the recipe.
        setup: what their advice depends on.

    Raises:
        RecipeError: an alarm is unknown, or refuses an option.
    """

    def __init__(self, section: TelemetrySection, setup: Setup) -> None:
        self.on_collapse = section.on_collapse
        self._alarms = _build(section, setup)
        self._beyond: dict[_Key, int] = {}  # lines in a row that something was beyond its limit
        self._quiet: dict[_Key, int] = {}  # of what was raised: lines in a row that it was within its limit again
        self._collapse = ""

    @staticmethod
    def build(config: RunConfig, layers: Mapping[SiteKey, Any]) -> Alarms:
        """The alarms of a recipe for the layers of its model."""
        return Alarms(config.telemetry, Setup.of(config, layers))

    def resume(self, output_dir: str | Path, checkpoint: str | Path) -> None:
        """Takes the rows of an interrupted run up to the checkpoint from which it goes on; every rank must call it."""
        step = int(Path(checkpoint).name.rsplit("-", 1)[1])
        for row in _rows(output_dir):
            if row["step"] <= step:
                self.update(row)
        self._collapse = ""
        distributed.barrier()  # the first rank will write to the file

    def watch(self, row: MutableMapping[str, Any]) -> None:
        """Takes the next row of the log, adds the alarms that begin with it, and prints them on the first rank."""
        records = self.update(row)
        if records:
            row[KEY] = records
        if distributed.rank() == 0:
            for line in lines_of(row["step"], records):
                print(line, flush=True)

    def update(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Takes the next row of the log.

        Returns:
            The alarms that begin with it, at most one of each kind and site: {alarm, site, what, value, limit, lines,
            advice}, with `experts` or `loss` where it is about some, and `collapse` where it is one. None begins again
            before it was over for as many lines as it took.
        """
        records = []
        for name, alarm in self._alarms.items():
            found = {(name, f.site, f.expert, f.name): f for f in alarm.find(row)}
            fresh = self._count(name, alarm.config.lines, found)
            for group in _by_site(fresh):
                collapse = alarm.is_collapse(_of_site(found.values(), group[0].site), row)
                records.append(_record(name, alarm, group) | ({"collapse": True} if collapse else {}))
        self._collapse = next((_line(row["step"], [r]) for r in records if r.get("collapse")), self._collapse)
        return records

    def _count(self, name: str, lines: int, found: Mapping[_Key, Finding]) -> list[Finding]:
        """Counts the lines of one alarm; returns what has just reached its number."""
        for key in [key for key in self._beyond if key[0] == name and key not in found]:
            del self._beyond[key]
        for key in [key for key in self._quiet if key[0] == name]:
            self._quiet[key] = 0 if key in found else self._quiet[key] + 1
            if self._quiet[key] >= lines:
                del self._quiet[key]
        fresh = []
        for key, finding in found.items():
            self._beyond[key] = self._beyond.get(key, 0) + 1
            if self._beyond[key] >= lines and key not in self._quiet:
                self._quiet[key] = 0
                fresh.append(finding)
        return fresh

    def stop_if_collapsed(self) -> None:
        """To be called on every rank when the row is written.

        Raises:
            CollapseError: the routing has collapsed, and `telemetry.on_collapse` is stop.
        """
        if self._collapse and self.on_collapse == "stop":
            raise CollapseError(
                f"telemetry.on_collapse=stop: {self._collapse}. No checkpoint was written at this step; to go on "
                "from the last one as it is, set telemetry.on_collapse=warn"
            )


class AlarmCallback(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Ends a run whose routing has collapsed, where the recipe asks for it; it must come behind what writes the log."""

    def __init__(self, alarms: Alarms) -> None:
        self.alarms = alarms

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.alarms.stop_if_collapsed()


def lines_of(step: int, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is printed: one line for each kind of alarm, whatever the number of its sites."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        kinds.setdefault((record["alarm"], record.get("loss", "")), []).append(record)
    return [f"alarm: {_line(step, same)}" for same in kinds.values()]


def summary(output_dir: str | Path) -> list[dict[str, Any]]:
    """The alarms of a run, from its log: of each kind and site the first and last step, how often, the last value."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in _rows(output_dir):
        for record in row.get(KEY, []):
            key = (record["alarm"], record.get("site"), record.get("loss"))
            known = found.setdefault(key, {**record, "first_step": row["step"], "times": 0})
            known |= {"value": record["value"], "last_step": row["step"], "times": known["times"] + 1}
    return list(found.values())


def _rows(output_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a run's log; a crash may have cut off the last."""
    path = Path(output_dir) / FILE
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _build(section: TelemetrySection, setup: Setup) -> dict[str, Alarm]:
    for name in section.alarms:
        if name not in ALARMS:
            raise RecipeError(f"telemetry.alarms: unknown alarm {name!r}; {near_misses(str(name), ALARMS.names())}")
    made = {}
    for name in ALARMS:
        options = section.alarms.get(name, {})
        if options is None:
            continue
        try:
            if not isinstance(options, dict):
                raise ValueError(f"{options!r} must be a mapping of options, or null for off")
            made[name] = ALARMS.get(name)(ALARMS.get(name).parse(options), setup, section.dead_share)
        except ValueError as error:
            raise RecipeError(f"telemetry.alarms.{name}: {error}") from error
    return made


def _by_site(findings: Iterable[Finding]) -> list[list[Finding]]:
    groups: dict[tuple[str | None, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.site, finding.name), []).append(finding)
    return list(groups.values())


def _of_site(findings: Iterable[Finding], site: str | None) -> list[Finding]:
    return [finding for finding in findings if finding.site == site]


def _record(name: str, alarm: Alarm, group: list[Finding]) -> dict[str, Any]:
    worst = (max if alarm.beyond == "above" else min)(group, key=lambda f: f.value)
    record: dict[str, Any] = {"alarm": name, "site": worst.site, "what": alarm.what, "value": round(worst.value, 5)}
    record |= {"limit": round(worst.limit, 5), "lines": alarm.config.lines}
    experts = [f.expert for f in group if f.expert is not None]
    if experts:
        record["experts"] = experts
    if worst.name:
        record["loss"] = worst.name
    return record | {"advice": alarm.advice(worst)}


def _line(step: int, same: list[Any]) -> str:
    """One line for records of one kind."""
    first = same[0]
    sites = [r["site"] for r in same if r["site"] is not None]
    where = ""
    if sites:
        where = f" in layer{'s' if len(sites) > 1 else ''} {', '.join(_site(r) for r in same)}"
    if "loss" in first:
        where = f" of balance.losses.{first['loss']}"
    value = max((r["value"] for r in same), key=lambda v: abs(v - first["limit"]))
    lines = f" for {first['lines']} log lines" if first["lines"] > 1 else ""
    return (
        f"step {step}: {first['alarm']}{where}: {first['what']} {value:.4g} (limit {first['limit']:.4g}){lines}; "
        f"{first['advice']}"
    )


def _site(record: Mapping[str, Any]) -> str:
    experts = record.get("experts")
    if not experts:
        return str(record["site"])
    shown = ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
    return f"{record['site']} (expert{'s' if len(experts) > 1 else ''} {shown})"
