"""report.html: one self-contained page about a recipe run (no script, no network, figures and pictures inside)."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as parquet
from markupsafe import Markup
from PIL import Image

from llava_moe.evaluation import EvaluationError, figures, records
from llava_moe.evaluation.summarize import ALL_YES_NO, HEADLINE, verdict
from llava_moe.evaluation.tasks import LOCAL_TASKS

NUM_SAMPLES = 24
TEMPLATE = "report.html.j2"
VERDICT_MARKS = {"better": "▲", "worse": "▼", "no difference shown": "≈"}


@dataclass(frozen=True)
class ReportSample:
    """One question with its picture and both models' answers."""

    image: Image.Image
    family: str
    question: str
    target: str
    moe_answer: str
    moe_correct: bool
    dense_answer: str
    dense_correct: bool


@dataclass(frozen=True)
class ReportInputs:
    """All that the page shows; an empty part is left out of it.

    Attributes:
        title: of the page.
        facts: what was run, on what: label to value (recipe, profile, processor, cores, ...).
        notices: fallbacks that were used; shown in a box at the top.
        results: what `summarize` returned.
        losses: stage to the points of its log: {"step", "loss", and other losses}.
        expert_load: layer to the share of the tokens that each of its experts got, adding up to 1.
        family_load: question family to such loads per layer.
        parameters: label to number of parameters (total, active for each token, ...).
        samples: pictures with questions and answers.
    """

    title: str
    facts: Mapping[str, str]
    results: Mapping[str, Any]
    notices: Sequence[str] = ()
    losses: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    expert_load: Mapping[str, Sequence[float]] = field(default_factory=dict)
    family_load: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    samples: Sequence[ReportSample] = ()


def write_report(out_html: Path, inputs: ReportInputs) -> None:
    """Writes the page.

    Raises:
        EvaluationError: the results have no tasks, or the loads of the families do not fit each other.
    """
    if not inputs.results.get("tasks"):
        raise EvaluationError("the report needs results with at least one task; run the scoring first")
    _check_loads(inputs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "number": _number, "data_uri": _data_uri}
    tasks = inputs.results["tasks"]
    page = environment.get_template(TEMPLATE).render(
        inputs=inputs,
        tasks=tasks,
        headline=HEADLINE if HEADLINE in tasks else next(iter(tasks)),
        all_yes_no=ALL_YES_NO,
        verdicts={name: verdict(row) for name, row in tasks.items()},
        marks=VERDICT_MARKS,
        figures={name: [Markup(svg) for svg in drawn] for name, drawn in _figures(inputs).items()},
    )
    out_html.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_html.with_name(out_html.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out_html)


def pick_samples(moe_run: Path, dense_run: Path, data: Path, count: int = NUM_SAMPLES) -> list[ReportSample]:
    """Questions for the page: the families in turn, and of each first those that a model got wrong.

    Args:
        moe_run: folder of the MoE's finished run.
        dense_run: folder of the dense control's finished run on the same questions.
        data: folder with the parquet files that both answered.
        count: how many.

    Raises:
        EvaluationError: a run is unfinished, or the dense run lacks a question.
    """
    dense = {(sample["task"], sample["id"]): sample for sample in records.read_samples(dense_run)}
    families: dict[str, list[dict[str, Any]]] = {}
    for sample in records.read_samples(moe_run):
        if sample["task"] not in LOCAL_TASKS:
            continue
        key = (sample["task"], sample["id"])
        if key not in dense:
            raise EvaluationError(f"{dense_run} has no answer to {sample['id']!r} of {sample['task']}; score it again")
        families.setdefault(sample["family"], []).append(sample | {"dense": dense[key]})
    for members in families.values():
        # wrong by the MoE, then wrong by the dense control only, then right by both
        members.sort(key=lambda sample: (sample["correct"], sample["dense"]["correct"]))
    rounds = max(map(len, families.values()), default=0)
    in_turn = [members[i] for i in range(rounds) for members in families.values() if i < len(members)]
    return _with_pictures(in_turn[:count], data)


def _with_pictures(chosen: Sequence[dict[str, Any]], data: Path) -> list[ReportSample]:
    pictures: dict[tuple[str, int], bytes] = {}
    for task in records.local_tasks(dict.fromkeys(sample["task"] for sample in chosen)):
        column = parquet.read_table(records.data_file(data, task), columns=["image"]).column("image")
        for sample in chosen:
            if sample["task"] == task.name:
                pictures[task.name, sample["doc_id"]] = column[sample["doc_id"]].as_py()["bytes"]
    return [
        ReportSample(
            image=Image.open(io.BytesIO(pictures[sample["task"], sample["doc_id"]])).convert("RGB"),
            family=sample["family"],
            question=_shown_question(sample),
            target=str(sample["target"]),
            moe_answer=str(sample["answer"]),
            moe_correct=bool(sample["correct"]),
            dense_answer=str(sample["dense"]["answer"]),
            dense_correct=bool(sample["dense"]["correct"]),
        )
        for sample in chosen
    ]


def _shown_question(sample: Mapping[str, Any]) -> str:
    """The prompt without the sentence that asks for a form of answer: with a choice's options, short otherwise."""
    return str(sample["prompt"]).rsplit("\nAnswer ", 1)[0].strip() or str(sample["question"])


def _figures(inputs: ReportInputs) -> dict[str, list[str]]:
    drawn = {"scores": [figures.scores(inputs.results["tasks"])]}
    if inputs.losses:
        drawn["losses"] = figures.losses(inputs.losses)
    if inputs.expert_load:
        drawn["expert_load"] = figures.expert_load(inputs.expert_load)
    if inputs.family_load:
        drawn["family_load"] = [figures.family_load(inputs.family_load)]
    if inputs.results.get("seconds"):
        drawn["seconds"] = [figures.seconds(inputs.results["seconds"])]
    return drawn


def _check_loads(inputs: ReportInputs) -> None:
    shapes = {
        family: {layer: len(shares) for layer, shares in layers.items()}
        for family, layers in inputs.family_load.items()
    }
    if len({tuple(shape.items()) for shape in shapes.values()}) > 1:
        raise EvaluationError(f"the families' expert loads name different layers or numbers of experts: {shapes}")


def _percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}"


def _interval(interval: Sequence[float], sign: str = "") -> str:
    low, high = interval
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _number(value: int) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
