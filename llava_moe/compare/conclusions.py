"""What a comparison shows, what it leaves open and what it cannot say, in sentences made from the tests alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from llava_moe.compare.stats import ALPHA, OVERALL, Analysis, Difference, Result

FEW_SEEDS = 5  # fewer are called few
Kind = Literal["shown", "open", "training", "limit"]
ORDER: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Sentence:
    """A conclusion.

    Attributes:
        kind: shown (by a corrected test), open (not shown), training (what it changed of the parent, by the same
            tests), or limit (of what can be said at all).
    """

    kind: Kind
    text: str


def conclude(analysis: Analysis, failed: Mapping[str, Sequence[int]] | None = None) -> list[Sentence]:
    """All conclusions: what is shown first, then what is open, then the training itself, then the limits.

    Args:
        failed: by method, the seeds whose cells failed.
    """
    overall = analysis.overall
    where = "the mean over tasks" if len(analysis.tasks) > 1 else analysis.tasks[0].name
    found = _against(overall.to_dense, "the dense control", where)
    if analysis.random is not None:
        found += _against(overall.to_random, "the random router", where)
    found += _order(overall, where)
    if len(analysis.tasks) > 1:
        for kind, control in (("to_dense", "the dense control"), ("to_random", "the random router")):
            found += _by_task(analysis.tasks, kind, control)
    found += _training(overall.to_parent, where)
    found += _limits(analysis, failed or {})
    return sorted(found, key=lambda sentence: ORDER.index(sentence.kind))


def points(value: float, sign: str = "+") -> str:
    """A share as percentage points: +2.1; a value that rounds to zero has no sign."""
    text = f"{100 * value:{sign}.1f}"
    return text.lstrip("+-") if float(text) == 0 else text


def interval(bounds: tuple[float, float]) -> str:
    """[0.4, 3.8] in points."""
    return f"[{points(bounds[0], '')}, {points(bounds[1], '')}]"


def p_value(p: float) -> str:
    """.034, or < .001."""
    return "< .001" if p < 0.001 else f"= {p:.3f}".replace("0.", ".", 1) if p < 0.9995 else "= 1"


def names(of: Sequence[str]) -> str:
    """a, b and c."""
    return of[0] if len(of) == 1 else f"{', '.join(of[:-1])} and {of[-1]}"


def measured(one: Difference) -> str:
    """The numbers behind a sentence."""
    return f"{points(one.value)} points {interval(one.interval)}, p {p_value(one.p_holm)} after Holm"


def _against(found: Sequence[Difference], control: str, where: str) -> list[Sentence]:
    sentences = []
    for one in found:
        if one.shown:
            verdict = "better" if one.value > 0 else "worse"
            text = f"{one.a} is {verdict} than {control} on {where} ({measured(one)})."
            sentences.append(Sentence("shown", text))
    rest = [one for one in found if not one.shown]
    single = [one.a for one in rest if one.num_seeds == 1]
    rest = [one for one in rest if one.num_seeds > 1]
    if single:
        sentences.append(Sentence("open", f"One seed: no claim about {names(single)} against {control} on {where}."))
    if rest:
        text = f"No difference from {control} is shown on {where} for {names([one.a for one in rest])}; {_unseen(rest)}"
        sentences.append(Sentence("open", text))
    for one in rest:
        if not one.interval[0] <= 0 <= one.interval[1]:
            text = (
                f"{one.a} against {control} on {where}: {points(one.value)} points {interval(one.interval)} leaves out "
                f"0 on its own, but p {p_value(one.p_holm)} after Holm over {len(found)} comparisons: not a finding."
            )
            sentences.append(Sentence("open", text))
    return sentences


def _unseen(found: Sequence[Difference]) -> str:
    """How large a difference would have had to be."""
    least, most = (points(f(one.detectable for one in found), "") for f in (min, max))
    size = f"under {least} points" if least == most else f"under {least} to {most} points, by method,"
    return f"one {size} could not have been seen reliably (80 % power)."


def _order(result: Result, where: str) -> list[Sentence]:
    """Which method is the best, where the tests say so."""
    ordered = list(result.scores)
    if len(ordered) < 3:
        return []
    beaten = {pair.b for pair in result.pairs if pair.shown and pair.a == ordered[0]}
    if len(beaten) == len(ordered) - 1:
        return [Sentence("shown", f"{ordered[0]} is better than every other method on {where}.")]
    possible = [name for name, score in result.scores.items() if score.ranks[0] == 1]
    if len(possible) == len(ordered):
        text = f"The methods cannot be ranked on {where}: every one may be the best."
    else:
        text = f"Which method is the best on {where} is open between {names(possible)}."
    return [Sentence("open", text)]


def _by_task(tasks: Sequence[Result], kind: str, control: str) -> list[Sentence]:
    found = [(task, one) for task in tasks for one in getattr(task, kind)]
    shown = [(task, one) for task, one in found if one.shown]
    sentences = []
    for task, one in shown:
        verdict = "better" if one.value > 0 else "worse"
        text = f"{one.a} is {verdict} than {control} on {task.name} ({measured(one)} over {len(found)} comparisons)."
        sentences.append(Sentence("shown", text))
    if len(shown) < len(found):
        sizes = [one.detectable for _, one in found if not one.shown]
        text = (
            f"Single tasks against {control}: {len(found) - len(shown)} of {len(found)} comparisons show no "
            "difference; the smallest that could have been seen reliably is "
            f"{points(statistics.median(sizes), '')} points in the median "
            f"({points(min(sizes), '')} to {points(max(sizes), '')})."
        )
        sentences.append(Sentence("open", text))
    return sentences


def _training(found: Sequence[Difference], where: str) -> list[Sentence]:
    """Whether the methods have gained on the checkpoint that they started from."""
    if not found:
        return []
    texts = []
    for verdict, some in (
        ("better", [one for one in found if one.shown and one.value > 0]),
        ("worse", [one for one in found if one.shown and one.value < 0]),
    ):
        if some:
            is_one = len(some) == 1
            texts.append(
                f"{names([one.a for one in some])} {'is' if is_one else 'are'} {verdict} than the parent that "
                f"{'it' if is_one else 'they'} started from on {where}: {_sizes(some)} points (p "
                f"{p_value(max(one.p_holm for one in some))}{'' if is_one else ' or less'} after Holm)."
            )
    single = [one.a for one in found if not one.shown and one.num_seeds == 1]
    if single:
        texts.append(f"One seed: no claim about {names(single)} against the parent on {where}.")
    rest = [one for one in found if not one.shown and one.num_seeds > 1]
    if rest:
        texts.append(
            f"Neither gain nor loss against the parent is shown on {where} for {names([one.a for one in rest])}; "
            f"{_unseen(rest)}"
        )
    alone = [one for one in rest if not one.interval[0] <= 0 <= one.interval[1]]
    if alone:
        texts.append(
            f"The difference of {names([one.a for one in alone])} to the parent ({_sizes(alone)} points) leaves out 0 "
            f"on its own, but p {p_value(min(one.p_holm for one in alone))}{'' if len(alone) == 1 else ' or more'} "
            f"after Holm over {len(found)} comparisons: not a finding."
        )
    if not any(one.shown and one.value > 0 for one in found):
        texts.append(
            "No method is shown to gain on its parent, so nothing here says that this training improves the model: "
            "that is the first thing to look at, by more seeds or questions, or by other rates, steps or data."
        )
    return [Sentence("training", text) for text in texts]


def _sizes(of: Sequence[Difference]) -> str:
    """+0.4, or -3.0 to -3.3: the smallest and the largest, by size."""
    least, most = (points(f((one.value for one in of), key=abs)) for f in (min, max))
    return least if least == most else f"{least} to {most}"


def _limits(analysis: Analysis, failed: Mapping[str, Sequence[int]]) -> list[Sentence]:
    overall, count = analysis.overall, len(analysis.seeds)
    texts = []
    if count == 1:
        texts.append(
            "There is one seed: the intervals hold for these checkpoints on new questions, and nothing can be said "
            "about the methods. No difference is called shown."
        )
    elif count < FEW_SEEDS:
        texts.append(
            f"{count} seeds are few: the spread over seeds is pooled over the methods, and a method whose training "
            "fails now and then may not have shown it yet."
        )
    shares = [one.seed_share for one in overall.to_dense if one.num_seeds > 1]
    if shares:
        share = sum(shares) / len(shares)
        if share > 0.5:
            advice = "more seeds would narrow the intervals, more questions hardly"
        else:
            advice = "more questions would narrow the intervals, more seeds less so"
        texts.append(f"Of the variance of the differences, {100 * share:.0f} % comes from the seeds: {advice}.")
    for method, seeds in failed.items():
        if seeds:
            which = names([str(seed) for seed in seeds])
            texts.append(
                f"{method} failed with seed {which}: what stands here is of its other seeds, where it has any."
            )
    compared = {one.a for one in overall.to_dense}
    for method in overall.scores:
        if method not in compared and method != analysis.dense:
            texts.append(f"{method} has no seed in common with the dense control: they are not compared.")
    if overall.left_out:
        texts.append(f"No cell of {names(overall.left_out)} has answers to all tasks: left out of {OVERALL}.")
    texts.append(
        "All of it speaks of this parent, this data and this length of training. In each family of comparisons (a "
        "control, the parent, or all pairs; the mean, or the tasks together) a false claim has a chance of at most "
        f"{100 * ALPHA:.0f} %."
    )
    return [Sentence("limit", text) for text in texts]
