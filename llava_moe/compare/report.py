"""report.html, report.md and comparison.json: what a comparison of methods found.

The page needs no script and no network. The same tables are written in both forms; a number is bold where a corrected
test shows a difference, and never where its interval holds 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llava_moe.compare import figures, report_tables
from llava_moe.compare.conclusions import ORDER, conclude
from llava_moe.compare.figures import Curve
from llava_moe.compare.stats import KINDS, Analysis
from llava_moe.evaluation import EvaluationError

HTML, MARKDOWN, JSON = "report.html", "report.md", "comparison.json"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class MethodFacts:
    """What a method costs and how its training went; None or empty where it was not measured.

    Attributes:
        about: what it is, in a few words.
        parameters: all; `active_parameters`: that one token meets.
        unmatched: its active parameters differ from the others' by more than the matrix allows, and it was let pass.
        flops_per_token: of a forward pass, active parts only.
        seconds_per_step: median; `peak_memory_gib`: the largest.
        max_violation: load of the fullest expert over the even share, minus 1, at the end: mean over layers and seeds;
            `entropy`: of the router, at the end, in shares of the largest possible.
        losses: by seed, (step, training loss).
        checkpoints: by seed, (step, score over all tasks) of the last checkpoints.
        without_top: by seed, (score, score without each token's top expert) on the same questions.
    """

    about: str = ""
    parameters: int | None = None
    active_parameters: int | None = None
    unmatched: bool = False
    flops_per_token: float | None = None
    seconds_per_step: float | None = None
    peak_memory_gib: float | None = None
    max_violation: float | None = None
    entropy: float | None = None
    losses: Mapping[int, Curve] = field(default_factory=dict)
    checkpoints: Mapping[int, Curve] = field(default_factory=dict)
    without_top: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A cell that failed: at which stage, and the last lines of its log."""

    method: str
    seed: int
    stage: str
    log: str


@dataclass(frozen=True)
class ReportInputs:
    """What the report shows.

    Attributes:
        facts: what was run, in label and value: parent, data, steps, machine, versions.
        methods: facts of each method of the analysis, in the order of the matrix.
        failures: cells that are missing from the analysis.
        notices: shown first: substitutes, limits on the questions.
    """

    title: str
    analysis: Analysis
    methods: Mapping[str, MethodFacts]
    facts: Mapping[str, str] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    notices: Sequence[str] = ()


def write_report(folder: Path, inputs: ReportInputs) -> None:
    """Writes the three files.

    Raises:
        EvaluationError: a method lacks its facts, or the seeds of a curve have no step in common.
    """
    _check(inputs)
    failed: dict[str, list[int]] = {}
    for failure in inputs.failures:
        failed.setdefault(failure.method, []).append(failure.seed)
    sentences = conclude(inputs.analysis, {method: sorted(set(seeds)) for method, seeds in failed.items()})
    shared = {
        "inputs": inputs,
        "sentences": {kind: [s.text for s in sentences if s.kind == kind] for kind in ORDER},
        "tables": report_tables.all_tables(inputs),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: [Markup(svg) for svg in svgs] for name, svgs in _figures(inputs).items()}
    _write(folder / HTML, _template("compare.html.j2", escape=True).render(**shared, figures=drawn))
    _write(folder / MARKDOWN, _template("compare.md.j2", escape=False).render(**shared))
    _write(
        folder / JSON, json.dumps(_numbers(inputs, [asdict(s) for s in sentences]), indent=1, allow_nan=False) + "\n"
    )


def _check(inputs: ReportInputs) -> None:
    if missing := [name for name in inputs.analysis.overall.scores if name not in inputs.methods]:
        raise EvaluationError(f"the report has scores but no facts of {', '.join(missing)}")
    for method, facts in inputs.methods.items():
        for what, by_seed in (("losses", facts.losses), ("checkpoints", facts.checkpoints)):
            if by_seed and not set.intersection(*({step for step, _ in curve} for curve in by_seed.values())):
                raise EvaluationError(
                    f"the {what} of {method!r} share no step between seeds {', '.join(map(str, by_seed))}; "
                    "log all seeds at the same steps"
                )


def _template(name: str, escape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = report_tables.markdown_cell
    return environment.get_template(name)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _figures(inputs: ReportInputs) -> dict[str, list[str]]:
    overall, methods = inputs.analysis.overall, inputs.methods
    drawn = {"scores": [figures.scores(overall.scores)], "pareto": [], "balance": [], "curves": []}
    for found, control in (
        (overall.to_dense, inputs.analysis.dense),
        (overall.to_random, inputs.analysis.random),
        (overall.to_parent, "parent"),
    ):
        if found:
            drawn["scores"].append(figures.differences(found, str(control), f"against-{control}"))
    costs = (
        ("flops_per_token", 1e-9, "GFLOPs per token, active"),
        ("seconds_per_step", 1.0, "seconds per training step"),
        ("peak_memory_gib", 1.0, "peak memory in training, GiB"),
    )
    for key, factor, label in costs:
        cost = {m: factor * value for m, f in methods.items() if (value := getattr(f, key)) is not None}
        if any(method in overall.scores for method in cost):
            drawn["pareto"].append(figures.pareto(overall.scores, cost, label, f"pareto-{key}"))
    for key, title, unit in (
        ("max_violation", "largest violation of balance", "load of the fullest expert above an even share; 0 is even"),
        ("entropy", "router entropy", "share of the largest possible"),
    ):
        values = {m: value for m, f in methods.items() if (value := getattr(f, key)) is not None}
        if values:
            drawn["balance"].append(figures.bars(values, title, unit, key))
    losses = {m: f.losses for m, f in methods.items() if f.losses}
    if losses:
        drawn["curves"].append(figures.curves(losses, "training loss, mean and range of seeds", "loss", "losses"))
    steps = {
        m: {seed: [(step, 100 * score) for step, score in curve] for seed, curve in f.checkpoints.items()}
        for m, f in methods.items()
        if f.checkpoints
    }
    if steps:
        title = "score of the last checkpoints, mean and range of seeds"
        drawn["curves"].append(figures.curves(steps, title, "score, %", "checkpoints", marker="o"))
    return drawn


def _numbers(inputs: ReportInputs, sentences: list[dict[str, str]]) -> dict[str, Any]:
    analysis = asdict(inputs.analysis)
    for result in (analysis["overall"], *analysis["tasks"]):
        for kind in KINDS:
            for one in result[kind]:
                parts = one.pop("parts")
                one["variance"] = {
                    name: {"variance": part.variance, "df": part.df}
                    for name, part in zip(("seeds", "questions"), parts, strict=True)
                }
    methods = {name: asdict(facts) for name, facts in inputs.methods.items()}
    return {
        "title": inputs.title,
        "facts": dict(inputs.facts),
        "notices": list(inputs.notices),
        "conclusions": sentences,
        "analysis": analysis,
        "methods": methods,
        "failures": [asdict(failure) for failure in inputs.failures],
    }
