"""The tables of a comparison's report, in the one form that HTML and Markdown are both written from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_moe.compare.conclusions import interval, p_value, points
from llava_moe.compare.stats import Analysis, Difference, Score

if TYPE_CHECKING:
    from llava_moe.compare.report import MethodFacts, ReportInputs

NOT_MEASURED = "n/a"


@dataclass(frozen=True)
class Cell:
    """A cell: its main text, what stands small beside it, and whether it is a finding."""

    text: str
    small: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table, with a sentence on how to read it.

    Attributes:
        name: where the page puts it.
    """

    name: str
    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def all_tables(inputs: ReportInputs) -> dict[str, Table]:
    """By name; those without a row are left out."""
    made = [
        _main(inputs),
        _by_task(inputs.analysis),
        _costs(inputs),
        _stability(inputs),
        _pairs(inputs.analysis),
        _seeds(inputs.analysis),
    ]
    return {table.name: table for table in made if table.rows}


def markdown_cell(cell: Cell) -> str:
    """The cell in a Markdown table."""
    text = _escaped(cell.text)
    text = f"**{text}**" if cell.bold else text
    small = _escaped(cell.small)
    # beside a number stands another or an interval; beside a name, words
    return f"{text} ({small})" if text and small[:1].isalpha() else f"{text} {small}".strip()


def _escaped(text: str) -> str:
    for character in "\\|*_`<[":
        text = text.replace(character, "\\" + character)
    return text


def _method(name: str, inputs: ReportInputs) -> Cell:
    roles = {inputs.analysis.dense: "dense control", inputs.analysis.random: "random control"}
    facts = inputs.methods[name]
    small = [roles[name]] if name in roles else []
    small += [facts.about] if facts.about else []
    small += ["active parameters not matched"] if facts.unmatched else []
    return Cell(name, "; ".join(small))


def _difference(one: Difference | None) -> list[Cell]:
    """Difference, corrected p, and what could have been detected."""
    if one is None:
        return [Cell("")] * 3
    return [
        Cell(points(one.value), interval(one.interval), one.shown),
        Cell(_p(one)),
        Cell(points(one.detectable, "")),
    ]


def _p(one: Difference) -> str:
    return p_value(one.p_holm).removeprefix("= ") if one.num_seeds > 1 else "one seed"


def _score(score: Score) -> Cell:
    return Cell(points(score.value, ""), interval(score.interval))


def _main(inputs: ReportInputs) -> Table:
    analysis = inputs.analysis
    dense = {one.a: one for one in analysis.overall.to_dense}
    random = {one.a: one for one in analysis.overall.to_random}
    head = ["method", "score", "above dense", "p", "detectable"]
    head += ["above random", "p", "detectable"] if analysis.random is not None else []
    head += ["above parent", "p"] if analysis.overall.to_parent else []
    parent = {one.a: one for one in analysis.overall.to_parent}
    rows = []
    for name, score in analysis.overall.scores.items():
        row = [_method(name, inputs), _score(score), *_difference(dense.get(name))]
        row += _difference(random.get(name)) if analysis.random is not None else []
        row += _difference(parent[name])[:2] if parent else []
        low, high = score.ranks
        rows.append([*row, Cell(str(score.rank), f"[{low}, {high}]"), Cell(str(len(score.by_seed)))])
    note = (
        "Percent and points, with 95 % intervals for new seeds and new questions. p: after Holm's correction over the "
        "methods of the column. Detectable: the difference that would have been found four times out of five. Rank: "
        "with those that the tests of all pairs leave open. Bold: a difference that the corrected test shows."
    )
    if analysis.overall.parent is not None:
        note += f" Parent: the checkpoint that all started from, with {points(analysis.overall.parent, '')}."
    title = "Scores, mean over tasks" if len(analysis.tasks) > 1 else f"Scores on {analysis.tasks[0].name}"
    return Table("main", title, note, [*head, "rank", "seeds"], rows)


def _by_task(analysis: Analysis) -> Table:
    rows = []
    for method in (*analysis.overall.scores, *analysis.overall.left_out):
        row = [Cell(method)]
        for task in analysis.tasks:
            if method not in task.scores:
                row.append(Cell("failed"))
                continue
            one = next((one for one in task.to_dense if one.a == method), None)
            score = points(task.scores[method].value, "")
            if one is None:
                row.append(Cell(score, interval(task.scores[method].interval)))
            else:
                row.append(Cell(score, f"{points(one.value)} {interval(one.interval)}", one.shown))
        rows.append(row)
    if analysis.overall.parent is not None:
        rows.append([Cell("parent", "before"), *(Cell(_number(task.parent, 100, "{:.1f}")) for task in analysis.tasks)])
    detectable = [Cell("detectable")]
    for task in analysis.tasks:
        sizes = [one.detectable for one in task.to_dense]
        detectable.append(Cell("", f"{points(min(sizes), '')} to {points(max(sizes), '')}" if sizes else NOT_MEASURED))
    number = sum(len(task.to_dense) for task in analysis.tasks)
    note = (
        "Small: the dense control's own interval, and for the others the difference from it with its 95 % interval. "
        f"Bold where that difference is shown after Holm's correction over all {number} comparisons of this table."
    )
    head = ["method", *(f"{task.name} ({task.num_questions})" for task in analysis.tasks)]
    return Table("tasks", "By task (number of questions)", note, head, [*rows, detectable])


def _costs(inputs: ReportInputs) -> Table:
    rows = []
    for name, facts in inputs.methods.items():
        values = [
            _number(facts.parameters, 1e-6, "{:.1f} M"),
            _number(facts.active_parameters, 1e-6, "{:.1f} M"),
            _number(facts.flops_per_token, 1e-9, "{:.3f} G"),
            _number(facts.seconds_per_step, 1, "{:.2f} s"),
            _number(facts.peak_memory_gib, 1, "{:.2f} GiB"),
            _number(facts.max_violation, 1, "{:.2f}"),
            _number(facts.entropy, 1, "{:.2f}"),
        ]
        if any(value != NOT_MEASURED for value in values):
            rows.append([_method(name, inputs), *map(Cell, values)])
    head = ["method", "parameters", "active", "FLOPs per token", "time per step", "peak memory", "MaxVio", "entropy"]
    note = (
        "FLOPs: a token's forward pass through what is active. Time: median training step; memory: largest. MaxVio: "
        "how far the fullest expert lies above an even share at the end, 0 is even; entropy of the router, 1 is the "
        "largest."
    )
    return Table("costs", "Cost and balance", note, head, rows)


def _number(value: float | None, factor: float, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(factor * value)


def _stability(inputs: ReportInputs) -> Table:
    rows = [
        [_method(name, inputs), *_checkpoints(facts), *_without_top(facts)]
        for name, facts in inputs.methods.items()
        if facts.checkpoints or facts.without_top
    ]
    head = ["method", "sd over checkpoints", "checkpoints", "intact", "top expert dropped", "change"]
    note = (
        "Sd: of the score over the last checkpoints of a run, in points, root mean square over seeds: a difference "
        "between methods that is smaller than this may be an accident of where training stopped. Dropped: each token's "
        "top expert is taken away in every layer and the next one takes over; mean over seeds, on the same questions; "
        "small: the single seeds."
    )
    return Table("stability", "Stability and brittleness", note, head, rows)


def _checkpoints(facts: MethodFacts) -> list[Cell]:
    curves = [[score for _, score in curve] for curve in facts.checkpoints.values() if len(curve) > 1]
    if not curves:
        return [Cell(NOT_MEASURED), Cell(NOT_MEASURED)]
    sd = statistics.fmean(statistics.variance(curve) for curve in curves) ** 0.5
    numbers = sorted({len(curve) for curve in curves})
    return [Cell(points(sd, "")), Cell(" or ".join(map(str, numbers)))]


def _without_top(facts: MethodFacts) -> list[Cell]:
    if not facts.without_top:
        return [Cell(NOT_MEASURED)] * 3
    intact, dropped = (statistics.fmean(pair[i] for pair in facts.without_top.values()) for i in (0, 1))
    single = ", ".join(points(after - before) for before, after in facts.without_top.values())
    return [Cell(points(intact, "")), Cell(points(dropped, "")), Cell(points(dropped - intact), single)]


def _pairs(analysis: Analysis) -> Table:
    rows = [
        [
            Cell(f"{one.a} against {one.b}"),
            Cell(points(one.value), interval(one.interval), one.shown),
            Cell(p_value(one.p).removeprefix("= ")),
            Cell(_p(one)),
            Cell(points(one.detectable, "")),
            Cell(f"{one.seeds_won} of {one.num_seeds}"),
            Cell(f"{100 * one.seed_share:.0f} %" if one.num_seeds > 1 else NOT_MEASURED),
        ]
        for one in analysis.overall.pairs
    ]
    head = ["pair", "difference", "p alone", "p", "detectable", "seeds won", "variance from seeds"]
    note = f"p: after Holm's correction over these {len(rows)} pairs. Seeds won: in how many the first was ahead."
    return Table("pairs", "All pairs, mean over tasks" if len(analysis.tasks) > 1 else "All pairs", note, head, rows)


def _seeds(analysis: Analysis) -> Table:
    rows = []
    for name, score in analysis.overall.scores.items():
        seeds = [Cell(points(score.by_seed[s], "") if s in score.by_seed else "missing") for s in analysis.seeds]
        sd = points(score.seed_sd, "") if score.seed_sd is not None else NOT_MEASURED
        rows.append([Cell(name), *seeds, Cell(sd), Cell(interval(score.interval)), Cell(interval(score.bootstrap))])
    head = ["method", *(f"seed {seed}" for seed in analysis.seeds), "sd", "interval", "percentile bootstrap"]
    note = (
        "The hierarchical percentile bootstrap (seeds, then questions, the same for all methods) stands here for "
        "comparison: it is too narrow where few seeds make most of the variance, and no verdict is drawn from it."
    )
    return Table("seeds", "Single seeds", note, head, rows)
