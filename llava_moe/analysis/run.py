"""`llava-moe analyze run DIR ...`: what the logs of training runs show, from metrics.jsonl alone."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_moe.analysis.base import Analysis, AnalysisError, need_matplotlib
from llava_moe.analysis.numbers import as_markdown, summarise, terms
from llava_moe.analysis.page import Section, render
from llava_moe.analysis.records import Run, read_runs

PAGE, NUMBERS, TEXT = "index.html", "summary.json", "summary.md"
_MAX_VIOLATION = "largest violation (MaxVio)"
_ENTROPY = "entropy of the router over ln E"


class RunAnalysis(Analysis):
    """Plots of training runs, finished or not: losses, rates, speed, and the routing of every layer. Several runs are
    laid over each other, e.g. a sparse one and its dense control."""

    summary = "losses, speed and routing of one or several training runs"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="the output_dir of a run")
        parser.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            help="where index.html, summary.json and summary.md go; FIRST DIR/analysis",
        )

    @staticmethod
    def run(arguments: argparse.Namespace) -> Path:
        return analyze(arguments.runs, arguments.out)


def analyze(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes page, numbers and text, and returns the page.

    Raises:
        AnalysisError: a folder holds no run, or none of its rows yet; or `out` is a file.
    """
    need_matplotlib()
    runs = read_runs(folders)
    out = runs[0].path / "analysis" if out is None else out
    if out.exists() and not out.is_dir():
        raise AnalysisError(f"--out {out} is a file; name a directory")
    summaries = [summarise(run) for run in runs]
    page = render(summaries, _sections(runs, summaries), _missing(runs))
    out.mkdir(parents=True, exist_ok=True)
    _write(out / NUMBERS, json.dumps({"runs": summaries}, indent=2) + "\n")
    _write(out / TEXT, as_markdown(summaries))
    _write(out / PAGE, page)
    return out / PAGE


def _sections(runs: Sequence[Run], summaries: Sequence[dict[str, Any]]) -> list[Section]:
    from llava_moe.analysis import curves

    found = [
        Section(
            "Losses",
            "Means over the steps since the line before. Balance losses are without their coefficient. Faint: as "
            "logged; strong: smoothed.",
            curves.losses(runs),
        ),
        Section("Scores while training", "", curves.scores(runs)),
        Section("Speed", "Time between log lines, without checkpoints and scoring.", curves.speed(runs)),
        Section("Learning rates", "", curves.rates(runs)),
    ]
    for run, summary in zip(runs, summaries, strict=True):
        found += _routing(run, summary)
    return found


def _routing(run: Run, summary: dict[str, Any]) -> list[Section]:
    from llava_moe.analysis import curves, maps

    if not run.sites:
        return [Section(f"Alarms of {run.label}", "", [], alarms=summary["alarms"])]
    note = "" if summary["alarms"] else "No alarm."
    head = Section(f"Routing of {run.label}", note, [], alarms=summary["alarms"], optional=False)
    few = len(run.sites) <= curves.MAX_LINES
    wanted: tuple[tuple[str, str, float | None], ...] = (
        ("max_violation", _MAX_VIOLATION, None),
        ("entropy_share", _ENTROPY, 1.0),
        ("confidence", "weight of the best expert", None),
        ("num_dead", "dead experts", None),
        ("experts_per_token", "experts of a token", None),
        ("without_expert", "share of tokens without expert", None),
        ("drop_rate", "drop rate of the capacity", None),
    )
    wanted += tuple((f"losses/{name}", f"{name} loss, by layer", None) for name in terms(run))
    over_time = [
        curves.layers(run, key, title, "", (0, top if top is None else 1.03 * top))
        if few
        else maps.layers(run, key, title, top)
        for key, title, top in wanted
        if not (key == "experts_per_token" and _is_constant(run, key))
    ]
    loads = [maps.load(run, site) for site in run.sites if run.lists("layers", site, "load")[0]]
    return [
        head,
        Section(
            "Layers over the steps",
            "MaxVio is the largest load over the mean, minus 1: 0 is even, E / k - 1 the most. An entropy of 1 is a "
            "router without preference, 0 one without doubt. Dotted upright lines: an alarm began.",
            [figure for figure in over_time if figure],
            level=3,
        ),
        Section(
            "Load of every expert",
            "Share of the slots over an even share: white is even, orange more, violet less.",
            loads,
            level=3,
        ),
        Section(
            "Images and text at the end",
            "Above: the slots of each expert. Below: the share of image tokens in them, dotted their share of all "
            "tokens; an expert away from that line is drawn to pictures or to text.",
            [figure for site in run.sites if (figure := maps.modality(run, site))],
            level=3,
        ),
    ]


def _is_constant(run: Run, key: str) -> bool:
    """Whether the number is the same in all rows of each layer: most routers use k experts and that is all."""
    series = [run.series("layers", site, key)[1] for site in run.sites]
    return all(max(values) - min(values) < 1e-3 for values in series if values)


def _missing(runs: Sequence[Run]) -> list[str]:
    """What a reader might look for in vain."""
    dense = [run.label for run in runs if not run.sites]
    found = [f"{', '.join(dense)}: no routing in the log (a dense model, or telemetry.every: 0)."] if dense else []
    old = [run.label for run in runs if not run.series("tokens_per_second")[0]]
    if old:
        found.append(
            f"{', '.join(old)}: a log of an older version, without tokens per second, waiting for data, dead experts "
            "and images."
        )
    return found


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
