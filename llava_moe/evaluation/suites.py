"""Suites of benchmarks by name, and what is known about each benchmark: metric, scale, data sets, judge, caveats.

The tasks are lmms-eval's own definitions, or ours in `tasks/benchmarks/` where lmms-eval has none that scores without a
judge. Facts about them stand in `catalogue.py`; a task of lmms-eval that is not in it can still be scored, only without
the checks that need these facts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.stats import Interval
from llava_moe.registry import Registry, near_misses

Judge = Literal["none", "openai", "server"]
Credit = Callable[[dict[str, Any]], float | None]
Estimate = Callable[[Sequence[Mapping[str, Any]]], tuple[float, Interval | None]]


@dataclass(frozen=True)
class Source:
    """One split of a data set that a task reads.

    Attributes:
        repo: `organisation/name` on the Hugging Face Hub, which is also its folder below a mirror.
        config: the configuration that is loaded; None for the only one.
        split: the split that is read.
    """

    repo: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return "/".join(part for part in (self.repo, self.config, self.split) if part)


@dataclass(frozen=True)
class Benchmark:
    """What is known about a task.

    Attributes:
        name: of the task in lmms-eval, or of ours.
        metrics: the official metrics whose sum is the score that is shown first.
        scale: that score of a perfect model.
        sources: what it reads; the first holds the questions.
        judge: "none"; "openai" where the scorer speaks to an OpenAI-like endpoint by itself; "server" where it goes
            through lmms-eval's `llm_judge`.
        credit: from a logged sample, the credit in [0, 1] that the official scorer gives to the answer; None where only
            the whole can be scored, or where it returns None for a question that counts elsewhere.
        is_mean: the score divided by `scale` is the mean credit (up to rounding), which is checked.
        estimate: for a score that is no such mean: from all logged samples the score and its 95 % interval, if any.
        unjudged: whether a judged answer got no verdict, which the scorer counts as wrong without a word.
        group: questions of one picture that are scored together; a limit must be a multiple of it.
        whole: a limit makes the score meaningless, since it is divided by the number of all questions.
        prompt: the prompt variant, for the records.
        ocr: whether OCR tokens stand in the prompt; None where the question does not arise.
        note: what a reader of the score must know.
    """

    name: str
    metrics: tuple[str, ...]
    scale: float
    sources: tuple[Source, ...]
    judge: Judge = "none"
    credit: Credit | None = None
    is_mean: bool = False
    estimate: Estimate | None = None
    unjudged: Callable[[dict[str, Any]], bool] | None = None
    group: int = 1
    whole: bool = False
    prompt: str = "default"
    ocr: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks that are scored together.

    Attributes:
        name: as on the command line.
        summary: one line.
        tasks: names of tasks.
    """

    name: str
    summary: str
    tasks: tuple[str, ...]


BENCHMARKS: Registry[Benchmark] = Registry("benchmark")
SUITES: Registry[Suite] = Registry("suite")


def expand(names: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """The tasks behind names of suites and tasks, each once, in the order of their first mention.

    Args:
        names: suites, tasks of the catalogue, local tasks or other tasks of lmms-eval; one with "-" in front is left
            out of what stands before it ("libmoe12", "-mathvista_testmini_format").
        known: tasks that exist besides the catalogue's; without any, unknown names pass and are checked later.

    Raises:
        EvaluationError: nothing is named, a name is neither a suite nor a task, or what is left out was not in.
    """
    tasks: dict[str, None] = {}
    everything = [*SUITES.names(), *BENCHMARKS.names(), *known]
    for name in names:
        kept = name.removeprefix("-")
        if kept in SUITES:
            found = SUITES.get(kept).tasks
        elif kept in BENCHMARKS or not known or kept in known:
            found = (kept,)
        else:
            raise EvaluationError(f"unknown suite or task {kept!r}; {near_misses(kept, everything)}")
        if kept == name:
            tasks |= dict.fromkeys(found)
        elif not set(found) & set(tasks):
            raise EvaluationError(f"{name} leaves out what is not there ({', '.join(tasks) or 'nothing'})")
        else:
            tasks = {task: None for task in tasks if task not in found}
    if not tasks:
        raise EvaluationError(f"no task given; suites are {', '.join(SUITES.names())}")
    return list(tasks)


def check_limit(tasks: Sequence[str], limit: int | None) -> None:
    """Refuses a limit that would split questions scored together, or make a score meaningless.

    Raises:
        EvaluationError: the limit, the task and the mend.
    """
    if limit is None:
        return
    if limit < 1:
        raise EvaluationError(f"limit must be a whole number from 1 on, not {limit}")
    for name in tasks:
        if name not in BENCHMARKS:
            continue
        benchmark = BENCHMARKS.get(name)
        if limit % benchmark.group:
            better = limit + benchmark.group - limit % benchmark.group
            raise EvaluationError(
                f"limit {limit} splits questions of task {name!r} that are scored {benchmark.group} at a time; "
                f"use a multiple, for example {better}"
            )
        if benchmark.whole:
            raise EvaluationError(
                f"task {name!r} divides by the number of all its questions, so a limit makes its score meaningless; "
                "leave out --limit or the task"
            )


def score_of(benchmark: Benchmark, official: dict[str, float]) -> float:
    """The score that is shown first, out of the official metrics.

    Raises:
        EvaluationError: the scorer did not return a metric; the message names it.
    """
    missing = [metric for metric in benchmark.metrics if metric not in official]
    if missing:
        raise EvaluationError(
            f"task {benchmark.name!r}: the scorer returned {', '.join(official) or 'nothing'}, but not "
            f"{', '.join(missing)}; the installed lmms-eval differs from 0.7.3"
        )
    return sum(official[metric] for metric in benchmark.metrics)


def _register() -> None:
    from llava_moe.evaluation import catalogue

    for benchmark in catalogue.BENCHMARKS:
        BENCHMARKS.register(benchmark.name, benchmark)
    for suite in catalogue.SUITES:
        SUITES.register(suite.name, suite)


_register()
