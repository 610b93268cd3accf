"""scores.md, scores.csv, scores.json: every score of every checkpoint of a command, side by side."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_moe.evaluation import records
from llava_moe.evaluation.suites import BENCHMARKS

NAME = "scores"
COLUMNS = ("checkpoint", "task", "n", "metric", "headline", "value", "of", "percent", "low", "high")
MISSING = "-"
PERCENT_SCALES = (1.0, 100.0)
Results = Mapping[str, Any]


def write(out: Path, runs: Mapping[str, Results]) -> Path:
    """Writes the three files.

    Args:
        out: folder.
        runs: by the name of its column the content of a results.json.

    Returns:
        The Markdown file.
    """
    rows = [row for name, results in runs.items() for row in rows_of(name, results)]
    _put(out / f"{NAME}.md", markdown(runs))
    _put(out / f"{NAME}.csv", _as_csv(rows))
    about = {
        name: {key: value for key, value in run.items() if key not in ("tasks", "families")}
        for name, run in runs.items()
    }
    records.write_json(out / f"{NAME}.json", {"scores": rows, "runs": about})
    return out / f"{NAME}.md"


def rows_of(name: str, results: Results) -> list[dict[str, Any]]:
    """One row for each metric of each task; the headline, where there is one, comes first, with interval."""
    rows: list[dict[str, Any]] = []
    for task, score in results["tasks"].items():
        base = {"checkpoint": name, "task": task, "n": score["n"]}
        headline = score.get("headline")
        if headline is not None:
            low, high = headline["interval"] or (None, None)
            numbers = {"value": headline["value"], "of": headline["of"], "percent": _percent(headline["share"])}
            bounds = {"low": _percent(low), "high": _percent(high)}
            rows.append({**base, "metric": headline["metric"], "headline": True, **numbers, **bounds})
        rows += [
            {**dict.fromkeys(COLUMNS), **base, "metric": metric, "headline": False, "value": value}
            for metric, value in score["official"].items()
            if headline is None or metric != headline["metric"]
        ]
    return rows


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 6)


def cell(score: Mapping[str, Any] | None) -> str:
    """A task's headline with its interval: percent, or points where the score has another scale than percent."""
    if score is None:
        return MISSING
    headline = score.get("headline")
    if headline is None:
        return "; ".join(f"{metric} {value:.4g}" for metric, value in score["official"].items()) or MISSING
    scale = 100.0 if headline["of"] in PERCENT_SCALES else headline["of"]
    interval = ""
    if headline["interval"] is not None:
        low, high = (scale * bound for bound in headline["interval"])
        interval = f" [{low:.1f}, {high:.1f}]"
    return f"{scale * headline['share']:.1f}{interval}"


def markdown(runs: Mapping[str, Results]) -> str:
    """scores.md."""
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run["tasks"]))
    lines = [
        "# Scores",
        "",
        f"| task | metric | n | {' | '.join(runs)} |",
        f"| --- | --- | ---: |{' --- |' * len(runs)}",
    ]
    notes: list[str] = []
    for task in tasks:
        found = [run["tasks"].get(task) for run in runs.values()]
        there = [score for score in found if score is not None]
        numbers = sorted({score["n"] for score in there})
        lines.append(
            f"| {task} | {metric(there[0])} | {' / '.join(map(str, numbers))} | {' | '.join(map(cell, found))} |"
        )
        if task in BENCHMARKS and BENCHMARKS.get(task).note and BENCHMARKS.get(task).sources:
            notes.append(f"- {task}: {BENCHMARKS.get(task).note}.")
    lines += [
        "",
        "Percent, or points where the metric says of how many. The 95 % intervals (Wilson; bootstrap for F1 and MME)",
        "are those of single scores. Whether two checkpoints differ on the same questions is another question, which",
        "`llava-moe compare` answers.",
    ]
    notes += [
        f"- {name}: {task}: {score['unjudged']} of {score['n']} answers got no verdict of the judge and count as wrong."
        for name, run in runs.items()
        for task, score in run["tasks"].items()
        if score.get("unjudged")
    ]
    failed = [
        f"- {name}: {task} failed: {why}" for name, run in runs.items() for task, why in run.get("failed", {}).items()
    ]
    for heading, block in (("Failed", failed), ("Notes", notes), ("Runs", [_about(n, run) for n, run in runs.items()])):
        if block:
            lines += ["", f"## {heading}", "", *block]
    return "\n".join([*lines, ""])


def metric(score: Mapping[str, Any]) -> str:
    """The name of a headline, with its scale where that is not percent."""
    headline = score.get("headline")
    if headline is None:
        return MISSING
    of = "" if headline["of"] in PERCENT_SCALES else f" (of {headline['of']:g})"
    return f"{headline['metric'].replace('+', ' + ')}{of}"


def _about(name: str, run: Results) -> str:
    arguments, versions = run["arguments"], run["versions"]
    parts = [
        f"{run['checkpoint']}, sha256 {run['checkpoint_sha256'][:12]}, template {run['template']}",
        f"{arguments['dtype']}, batch size {arguments['batch_size']}, seeds {sorted(set(run['seeds'].values()))}",
        *(["grey pictures"] if arguments["blank_images"] else []),
        *([f"the first {arguments['limit']} questions of each task"] if arguments["limit"] is not None else []),
        *([f"judged by {run['judge']['model']} ({run['judge']['kind']})"] if run["judge"] else []),
        f"{run['hardware']}, {run['seconds']:.0f} s",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
    ]
    return f"- {name}: {'; '.join(parts)}."


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _put(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
