"""Intervals, paired tests and ranks of methods that were trained with several seeds and answered the same questions.

Legend: M methods, S seeds, Q questions. A score is the mean over seeds and questions of numbers in [0, 1]; the score
over tasks is the mean of the tasks' scores, each with the same weight. Everything here speaks of new seeds *and* new
questions of the same kind, not of these checkpoints on these questions.

**Where the intervals come from.** Seeds and questions are crossed: every seed answers every question. The variance of a
mean is estimated from the mean squares of the two-way layout (seed, question), in two parts,
`MS_seed / (S Q)` and `(MS_question - MS_rest) / (S Q)` (its bootstrap is Owen's pigeonhole bootstrap, 2007, arXiv
0712.1111); each has its own t, and the two margins are squared and added (`variance.margin`). For a difference of two
methods this is computed on the differences, question by question and seed by seed, so that what both find hard cancels.
For answers that differ between seeds alone it is the paired t-test over seeds, with one seed that over questions.

**Three seeds are few.** Two degrees of freedom make a t of 4.3, and hardly any difference survives a correction. So the
seeds' variance is pooled over the methods (residual of method + seed), and a comparison uses the *larger* of its own
and of the pooled one, with the pooled degrees of freedom; where its own is larger than that of the other methods at
p < 0.1 (F-test), it stands alone, with S - 1. An unstable method thus pays for itself.

**Why not the percentile bootstrap.** Resampling three seeds shows two thirds of their variance and knows no t: it does
well where the questions make most of the variance, and fails where the seeds do. Nor is a bootstrap of ranks used: the
ranks are those that the tests of all pairs leave open, which cannot contradict the tests. `bootstrap.py` computes the
bootstrap of the scores all the same, and the reports print it beside ours.

**Measured**: 200 simulated experiments of 6 methods and 300 questions, true score 70 %, binary answers from latent
abilities (tests/compare/simulate.py). Percent of the 95 % intervals that hold the truth, and of the experiments with
any false claim among all 15 pairs; the percentile bootstrap (1,000 resamples) beside them:

| seeds, spread over seeds | score | its bootstrap | difference | its bootstrap | false claims |
| --- | --- | --- | --- | --- | --- |
| 3, 0.8 points | 96.1 | 95.9 | 95.7 | 97.0 | 1.0 |
| 3, 3.3 points | 96.8 | 94.6 | 95.6 | 87.6 | 0.5 |
| 3, 0.8 points, 100 questions | 96.3 | 95.1 | 96.2 | 98.1 | 1.5 |
| 3, 3.3 points common to all methods | 97.7 | 93.7 | 95.8 | 96.3 | 2.0 |
| 3, two tasks | 94.1 | 93.9 | 96.3 | 98.0 | 0.5 |
| 3, true score 97 % | 94.5 | 92.9 | 96.6 | 98.1 | 1.0 |
| 3, one method 4 times as unstable | 96.8 | 95.7 | 97.0 | 96.4 | 3.5 |
| 3, the control 4 times as unstable | 96.7 | 95.6 | 91.3 | 90.3 | 4.0 |
| 5, 0.8 points | 96.3 | 96.7 | 96.3 | 98.1 | 3.0 |
| 5, 3.3 points | 96.3 | 94.3 | 96.6 | 92.8 | 3.5 |
| 5, 0.8 points, 100 questions | 94.2 | 94.3 | 95.9 | 97.2 | 2.5 |
| 5, the control 4 times as unstable | 96.4 | 96.3 | 93.2 | 93.6 | 3.5 |

Against the parent, which is one checkpoint without seeds of its own, 95.2 to 97.3 % of the intervals hold the truth and
1.5 to 3 % of the experiments claim a gain or loss that is none (6 methods, 3 or 5 seeds, 100 to 300 questions, one task
or two, 0.8 to 3.3 points over seeds; tests/compare/test_parent.py).

So one case in the table stays under 93: three seeds and a dense control far less stable than every router.
Satterthwaite's single t in the place of `variance.margin` made false claims in 8 % (3 seeds, 100 questions), and with
each comparison's own variance in up to 12 % (5 comparisons with the control). Of true differences of 6 points 65 % are
shown with 3 seeds, of 4 points 26 %; with 5 seeds 86 % and 48 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llava_moe.compare.answers import Answers
from llava_moe.compare.bootstrap import bootstrap_intervals
from llava_moe.compare.student import t_quantile
from llava_moe.compare.variance import (
    Part,
    margin,
    question_part,
    seed_part_of_difference,
    seed_part_of_score,
    two_sided,
)
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.stats import Interval

ALPHA = 0.05
POWER = 0.8
OVERALL = "mean over tasks"
PARENT = "the parent"
KINDS = ("to_dense", "to_random", "pairs", "to_parent")  # of comparisons, each a family of its own


@dataclass(frozen=True)
class Score:
    """A method's score.

    Attributes:
        value: the mean over seeds, questions and tasks.
        interval: 95 %.
        bootstrap: of the percentile bootstrap, for comparison.
        by_seed: the score of each seed that has answers.
        seed_sd: their standard deviation; None with one seed.
        rank: 1 plus the number of methods with a higher score.
        ranks: the ranks that the corrected tests leave open.
    """

    value: float
    interval: Interval
    bootstrap: Interval
    by_seed: dict[int, float]
    seed_sd: float | None
    rank: int = 0
    ranks: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Difference:
    """A method against another on the same seeds and questions.

    Attributes:
        value: score(a) - score(b).
        interval: 95 %, of this difference alone.
        p: two-sided.
        p_holm: p after Holm's correction over the family.
        detectable: the difference that this comparison would have found with 80 % power at 5 % over the family's
            number of comparisons (Holm's first step), by the variances found.
        parts: variance from seeds, and from questions, each with its degrees of freedom.
        seed_share: share of the variance that comes from seeds: more seeds would shrink it, more questions would not.
        num_seeds: that both have. With one, all numbers hold for these checkpoints only.
        seeds_won: in how many of them a was ahead.
    """

    a: str
    b: str
    value: float
    interval: Interval
    p: float
    parts: tuple[Part, Part]
    seed_share: float
    num_seeds: int
    seeds_won: int
    p_holm: float = 1.0
    detectable: float = math.inf

    @property
    def error(self) -> float:
        """Standard error."""
        return math.sqrt(sum(part.variance for part in self.parts))

    @property
    def shown(self) -> bool:
        """Whether the data show a difference; never where the interval holds 0, never with a single seed."""
        return self.num_seeds > 1 and self.p_holm < ALPHA and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Result:
    """One table: a task, or the mean over tasks.

    Attributes:
        scores: by method, best first.
        to_dense: the others against the dense control; `to_random`: the others, dense left out, against the random one.
        pairs: all pairs, the better one first.
        left_out: methods without a cell that has all tasks of this table.
        parent: score of the checkpoint that all methods started from; None where it was not asked.
        to_parent: all methods against it.
    """

    name: str
    num_questions: int
    scores: dict[str, Score]
    to_dense: tuple[Difference, ...]
    to_random: tuple[Difference, ...]
    pairs: tuple[Difference, ...]
    left_out: tuple[str, ...] = ()
    parent: float | None = None
    to_parent: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """All tables.

    Holm's families are the four kinds of comparison (to_dense, to_random, pairs, to_parent) of `overall`, and the same
    four of all tasks together: eight, each with a chance of at most 5 % for any false claim in it.
    """

    dense: str
    random: str | None
    seeds: tuple[int, ...]
    overall: Result
    tasks: tuple[Result, ...] = field(default_factory=tuple)


def analyse(
    answers: Sequence[Answers], dense: str, random: str | None, parent: Mapping[str, Mapping[str, float]] | None = None
) -> Analysis:
    """All scores and comparisons.

    Args:
        answers: one table per task, with the same methods and seeds.
        dense: name of the dense control; `random`: of the random-router control, None where there is none.
        parent: by task, {question: score} of the checkpoint that all methods started from.

    Raises:
        EvaluationError: no task, two tables that differ in methods or seeds, a control that is not there, or a parent
            that answered other questions.
    """
    if not answers:
        raise EvaluationError("nothing to compare: no task has answers")
    first = answers[0]
    for other in answers[1:]:
        if (other.methods, other.seeds) != (first.methods, first.seeds):
            raise EvaluationError(f"tasks {first.task!r} and {other.task!r} have different methods or seeds")
    for role, name in (("dense", dense), ("random-router", random)):
        if name is not None and name not in first.methods:
            raise EvaluationError(f"the {role} control {name!r} is not among the methods: {', '.join(first.methods)}")
    starts = [None if parent is None else one.aligned(parent.get(one.task, {})) for one in answers]
    overall = _table(OVERALL, answers, dense, random, starts)
    for role, name in (("dense", dense), ("random-router", random)):
        if name is not None and name not in overall.scores:
            raise EvaluationError(
                f"the {role} control {name!r} has no cell with answers to every task: nothing can be compared with it; "
                "repeat its cells"
            )
    tasks = [_table(one.task, [one], dense, random, [start]) for one, start in zip(answers, starts, strict=True)]
    return Analysis(
        dense, random, first.seeds, _ranked(_corrected([overall])[0]), tuple(map(_ranked, _corrected(tasks)))
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (S. Holm, 1979): the family-wise error rate holds under any dependence."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - step)))
        adjusted[index] = highest
    return adjusted


def _table(
    name: str, answers: Sequence[Answers], dense: str, random: str | None, starts: Sequence[np.ndarray | None]
) -> Result:
    methods = answers[0].methods
    mean_MS = np.mean([one.scores_MSQ.mean(axis=2) for one in answers], axis=0)  # NaN where any task is missing
    present = [m for m in range(len(methods)) if not np.isnan(mean_MS[m]).all()]
    tables = [one.scores_MSQ[present] for one in answers]
    names, mean_MS = [methods[m] for m in present], mean_MS[present]
    boots = bootstrap_intervals(tables)
    unsorted = {n: _score(tables, mean_MS, m, answers[0].seeds, boots[m]) for m, n in enumerate(names)}
    scores = dict(sorted(unsorted.items(), key=lambda item: -item[1].value))

    def against(control: str | None, leave_out: tuple[str | None, ...]) -> tuple[Difference, ...]:
        others = [n for n in scores if n not in leave_out] if control in scores else []
        return _differences(tables, mean_MS, names, [(n, str(control)) for n in others])

    parent = [start for start in starts if start is not None]
    ordered = list(scores)
    pairs = [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]]
    return Result(
        name=name,
        num_questions=sum(len(one.questions) for one in answers),
        scores=scores,
        to_dense=against(dense, (dense,)),
        to_random=against(random, (random, dense)),
        pairs=_differences(tables, mean_MS, names, pairs),
        left_out=tuple(n for n in methods if n not in scores),
        parent=float(np.mean([start.mean() for start in parent])) if parent else None,
        to_parent=_from_parent(tables, mean_MS, names, ordered, parent) if parent else (),
    )


def _score(
    tables: Sequence[np.ndarray], mean_MS: np.ndarray, m: int, seeds: Sequence[int], bootstrap: Interval
) -> Score:
    """Wilson's interval with the number of independent questions that the variance amounts to (Korn and Graubard, 1998)
    and t in the place of z, so that it stays in [0, 1] and is not empty where every answer is right."""
    have = ~np.isnan(mean_MS[m])
    value = float(mean_MS[m, have].mean())
    questions = question_part([table[m, have] for table in tables], floor=False)
    parts = [seed_part_of_score(mean_MS, m), questions]
    total = sum(part.variance for part in parts)
    whole = len(tables) ** 2 / sum(1 / table.shape[2] for table in tables)  # questions, were all tasks one
    spread = value * (1 - value)
    number = min(spread / total, int(have.sum()) * whole) if total > 0 and spread > 0 else whole
    z = margin(parts, 1 - ALPHA / 2) / math.sqrt(total) if total > 0 else t_quantile(1 - ALPHA / 2, whole)
    centre = (value + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(spread / number + z**2 / (4 * number**2))
    interval = (max(0.0, centre - half), min(1.0, centre + half))
    by_seed = {seed: float(mean_MS[m, s]) for s, seed in enumerate(seeds) if have[s]}
    sd = float(mean_MS[m, have].std(ddof=1)) if have.sum() > 1 else None
    return Score(value, interval, bootstrap, by_seed, sd)


def _differences(
    tables: Sequence[np.ndarray], mean_MS: np.ndarray, names: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> tuple[Difference, ...]:
    found = []
    for name_a, name_b in pairs:
        a, b = names.index(name_a), names.index(name_b)
        by_seed = mean_MS[a] - mean_MS[b]
        both = ~np.isnan(by_seed)
        if not both.any():
            continue  # no seed in common: nothing is paired
        seed = seed_part_of_difference(mean_MS, a, b)
        questions = question_part([table[a, both] - table[b, both] for table in tables], floor=True)
        found.append(_difference(name_a, name_b, by_seed[both], (seed, questions)))
    return tuple(found)


def _from_parent(
    tables: Sequence[np.ndarray],
    mean_MS: np.ndarray,
    names: Sequence[str],
    ordered: Sequence[str],
    parent: Sequence[np.ndarray],
) -> tuple[Difference, ...]:
    """What the training has changed. The parent is one checkpoint: seeds vary in the method alone."""
    found, start = [], float(np.mean([one.mean() for one in parent]))
    for name in ordered:
        m = names.index(name)
        have = ~np.isnan(mean_MS[m])
        questions = question_part([t[m, have] - one for t, one in zip(tables, parent, strict=True)], floor=True)
        found.append(_difference(name, PARENT, mean_MS[m, have] - start, (seed_part_of_score(mean_MS, m), questions)))
    return tuple(found)


def _difference(a: str, b: str, by_seed: np.ndarray, parts: tuple[Part, Part]) -> Difference:
    value, half = float(by_seed.mean()), margin(parts, 1 - ALPHA / 2)
    interval, share = (value - half, value + half), parts[0].variance / sum(part.variance for part in parts)
    return Difference(
        a, b, value, interval, two_sided(parts, value), parts, share, len(by_seed), int((by_seed > 0).sum())
    )


def _corrected(results: Sequence[Result]) -> list[Result]:
    """Holm's correction within each kind of comparison, over all the tables given, and what could be detected."""
    for kind in KINDS:
        family: list[Difference] = [one for result in results for one in getattr(result, kind)]
        adjusted = iter(holm([one.p for one in family]))
        strict = 1 - ALPHA / 2 / max(1, len(family))
        replaced = []
        for result in results:
            corrected: Any = tuple(
                replace(one, p_holm=next(adjusted), detectable=margin(one.parts, strict) + margin(one.parts, POWER))
                for one in getattr(result, kind)
            )
            replaced.append(replace(result, **{kind: corrected}))
        results = replaced
    return list(results)


def _ranked(result: Result) -> Result:
    """Ranks with the intervals that the tests of all pairs leave open (Mogstad, Romano, Shaikh and Wilhelm, 2024)."""
    scores = {}
    for name, score in result.scores.items():
        better = sum(pair.shown and pair.b == name for pair in result.pairs)
        worse = sum(pair.shown and pair.a == name for pair in result.pairs)
        rank = 1 + sum(other.value > score.value for other in result.scores.values())
        scores[name] = replace(score, rank=rank, ranks=(1 + better, len(result.scores) - worse))
    return replace(result, scores=scores)
