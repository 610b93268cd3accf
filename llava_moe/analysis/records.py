"""A run as its folder tells it: the rows of its log, and what recipe.yaml and done.json say beside them.

Reads `metrics.jsonl`, or `telemetry.jsonl` as runs before version 0.2 wrote it; runs that go on, or were interrupted,
are read as far as they came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_moe.analysis.base import AnalysisError

LOGS = ("metrics.jsonl", "telemetry.jsonl")  # the first that is there; both are written by llava_moe.training


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: its folder.
        label: its name in figures; no other run of the same analysis has it.
        rows: of its log, by step.
        recipe: recipe.yaml, empty where there is none.
        done: done.json of a finished run, None otherwise.
    """

    path: Path
    label: str
    rows: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    done: Mapping[str, Any] | None = None

    @property
    def sites(self) -> list[str]:
        """The layers that routed, decoder first and in their order."""
        names = dict.fromkeys(name for row in self.rows for name in row.get("layers", {}))
        return sorted(names, key=_site_order)

    @property
    def stage(self) -> str:
        return str((self.done or {}).get("stage") or (self.recipe.get("stage") or {}).get("name") or "unknown")

    @property
    def planned_steps(self) -> int | None:
        """Where the recipe names them."""
        steps = (self.recipe.get("train") or {}).get("max_steps")
        return int(steps) if steps and int(steps) > 0 else None

    @property
    def status(self) -> str:
        last, planned = self.rows[-1]["step"], self.planned_steps
        if self.done is not None:
            return f"finished after {self.done.get('steps', last)} steps"
        return f"not finished: step {last}{f' of {planned}' if planned else ''} is the last in its log"

    def series(self, *keys: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number in the rows, e.g. `series("layers", "0", "entropy")`; rows without it are left
        out."""
        points = [(row["step"], value) for row in self.rows if (value := _number(row, keys)) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def lists(self, *keys: str) -> tuple[list[int], list[list[float | None]]]:
        """The same for a list of numbers."""
        points = [(row["step"], value) for row in self.rows if isinstance(value := _at(row, keys), list)]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def alarm_steps(self) -> list[int]:
        """Where alarms of layers began."""
        return sorted({record["step"] for record in self.alarms if record.get("site") is not None})

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Every alarm with the step at which it began."""
        return [{"step": row["step"], **record} for row in self.rows for record in row.get("alarms", [])]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of some folders, with names that tell them apart.

    Raises:
        AnalysisError: a folder is named twice, holds no run, or one without a single row.
    """
    whole = [path.resolve() for path in paths]
    twice = next((path for path in whole if whole.count(path) > 1), None)
    if twice is not None:
        raise AnalysisError(f"{twice} is named twice")
    return [_read(path, label) for path, label in zip(whole, _labels(whole), strict=True)]


def _read(path: Path, label: str) -> Run:
    log = next((path / name for name in LOGS if (path / name).is_file()), None)
    if log is None:
        raise AnalysisError(_no_run(path))
    rows = _rows(log)
    if not rows:
        raise AnalysisError(f"{log} holds no row yet: the run has not come to its first log step (train.logging_steps)")
    recipe, done = path / "recipe.yaml", path / "done.json"
    return Run(
        path=path,
        label=label,
        rows=rows,
        recipe=(yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}) if recipe.is_file() else {},
        done=json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None,
    )


def _no_run(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: no such directory"
    inner = sorted({log.parent.name for name in LOGS for log in path.glob(f"*/{name}")})
    remedy = f"runs in it: {', '.join(inner)}" if inner else "name the output_dir of a run"
    return f"{path}: no run directory, for it holds neither {' nor '.join(LOGS)}; {remedy}"


def _rows(log: Path) -> list[dict[str, Any]]:
    """By step; a step that was run again counts as it was last. The end of a line may still be on its way."""
    lines = log.read_text(encoding="utf-8").splitlines()
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise AnalysisError(f"{log}: line {number} is not JSON ({error.msg}); remove it") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise AnalysisError(f"{log}: line {number} is no row of a run's log: it has no step")
        rows[row["step"]] = row
        for layer in row.get("layers", {}).values():
            if "entropy" in layer and "entropy_share" not in layer and len(layer["load"]) > 1:  # older than the key
                layer["entropy_share"] = layer["entropy"] / math.log(len(layer["load"]))
    return [rows[step] for step in sorted(rows)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    depth = 1
    while True:
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
        depth += 1


def _site_order(name: str) -> tuple[int, str, int]:
    part, _, layer = name.rpartition(".")
    return (("", "projector", "vision").index(part) if part in ("", "projector", "vision") else 3, part, int(layer))


def _at(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number(row: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    value = _at(row, keys)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
