"""From lmms-eval's raw results to answers in files and scores: official metrics, credits of single answers, intervals.

Where the official score is the mean of credits that each answer gets (accuracy, VQA accuracy, ANLS), both are compared:
another lmms-eval than 0.7.3 that scores in another way is noticed, and not averaged over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError, records, stats
from llava_moe.evaluation.suites import BENCHMARKS, Benchmark, score_of
from llava_moe.evaluation.tasks import LOCAL_TASKS

YES_NO = {"yes", "no"}
ROUNDING = 1e-4  # some official scores come rounded
ARGUMENTS_OF_CHOICE = 5  # context, continuation, document, task and split of each option in a logged sample


def score_answers(raw: dict[str, Any], rows: dict[str, list[dict[str, Any]]], out: Path) -> dict[str, Any]:
    """Writes the answers to each task; the scores of the tasks and families.

    Args:
        raw: what lmms-eval returned, `samples` and `results` by task.
        rows: the records of the local tasks.
        out: gets samples_TASK.jsonl.

    Raises:
        EvaluationError: a score disagrees with the credits of its answers, or lacks a metric.
    """
    samples = {name: _samples(name, raw["samples"][name], rows.get(name)) for name in raw["samples"]}
    tasks = {name: task_score(name, raw, samples[name]) for name in samples}
    for name, task_samples in samples.items():
        records.write_samples(out, name, task_samples)
    return {"tasks": tasks, "families": family_scores([sample for name in rows for sample in samples[name]])}


def _samples(
    name: str, logged_samples: Sequence[dict[str, Any]], rows: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """The answers to one task in the order of its documents."""
    samples = []
    for doc_id, logged in sorted(_first_of_each(logged_samples).items()):
        prompt = str(logged["arguments"][0]) if logged.get("arguments") else str(logged.get("input", ""))
        credit = _credit(name, logged)
        sample = {
            "doc_id": doc_id,
            "id": str(doc_id),
            "family": name,
            "question": prompt,
            "prompt": prompt,
            "target": logged["target"],
            "answer": _answer(logged),
            "correct": None,  # of local records only
            "credit": credit,
        }
        if rows is not None:
            row = rows[doc_id]
            sample |= {"id": row["id"], "family": row["family"], "question": row["question"], "correct": credit == 1.0}
        samples.append(sample)
    return samples


def _first_of_each(logged_samples: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By document; a task with several filters logs each once for every filter."""
    found: dict[int, dict[str, Any]] = {}
    for logged in logged_samples:
        found.setdefault(int(logged["doc_id"]), logged)
    return found


def _credit(name: str, logged: dict[str, Any]) -> float | None:
    judged = BENCHMARKS.get(name).credit if name in BENCHMARKS else None
    if judged is None:
        return None
    try:
        return judged(logged)
    except (KeyError, TypeError, IndexError) as error:
        raise EvaluationError(
            f"task {name!r}, document {logged['doc_id']}: the scorer's row has another form than lmms-eval 0.7.3 gives "
            f"it ({type(error).__name__}: {error})"
        ) from error


def _answer(logged: dict[str, Any]) -> Any:
    """The text; of options that were compared by their losses, the one with the smallest."""
    responses = logged["filtered_resps"]
    options = [response for response in responses if isinstance(response, list | tuple) and len(response) == 2]
    if len(responses) > 1 and len(options) == len(responses):
        best = min(range(len(options)), key=lambda place: options[place][0])
        texts = logged["arguments"][1::ARGUMENTS_OF_CHOICE]
        return str(texts[best]).strip() if len(texts) == len(options) else best
    while isinstance(responses, list) and len(responses) == 1:
        responses = responses[0]
    return responses


def task_score(name: str, raw: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The official metrics of a task; its headline and interval where the catalogue knows them.

    `metric`, `score` (0 to 1) and `interval` stand for a local task only, `headline` for every task of the catalogue.

    Raises:
        EvaluationError: see `score_answers`.
    """
    metrics: dict[str, float] = {}
    for metric, value in raw["results"][name].items():
        if "_stderr" not in metric and isinstance(value, Real) and not isinstance(value, bool):
            metrics.setdefault(metric.partition(",")[0], float(value))
    score: dict[str, Any] = {"n": len(samples), "official": metrics}
    if name not in BENCHMARKS:
        return score
    benchmark = BENCHMARKS.get(name)
    credits = [float(sample["credit"]) for sample in samples if sample["credit"] is not None]
    if credits:
        score["mean_credit"] = sum(credits) / len(credits)
    numbers = raw.get("n-samples", {}).get(name, {})
    limited = numbers.get("effective") != numbers.get("original")
    if limited and not set(benchmark.metrics) <= set(metrics):
        return score  # the first questions of MME are all of one kind: no sum of both
    headline = _headline(benchmark, metrics, credits, list(_first_of_each(raw["samples"][name]).values()))
    if name in LOCAL_TASKS:
        score |= {"metric": benchmark.metrics[0], "score": headline["share"], "interval": headline["interval"]}
    return score | {"headline": headline}


def _headline(
    benchmark: Benchmark, metrics: dict[str, float], credits: Sequence[float], logged: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    value = score_of(benchmark, metrics)
    interval: list[float] | None = None
    if benchmark.is_mean:
        share = sum(credits) / len(credits)
        _must_agree(benchmark, share, value / benchmark.scale, credits)
        interval = list(stats.wilson_interval(sum(credits), len(credits)))
        value = share * benchmark.scale  # not rounded
    elif benchmark.estimate is not None:
        estimated, bounds = benchmark.estimate(logged)
        _must_agree(benchmark, estimated / benchmark.scale, value / benchmark.scale, credits)
        interval = None if bounds is None else [bound / benchmark.scale for bound in bounds]
    share = value / benchmark.scale
    named = "+".join(benchmark.metrics)
    return {"metric": named, "value": value, "of": benchmark.scale, "share": share, "interval": interval}


def _must_agree(benchmark: Benchmark, ours: float, official: float, credits: Sequence[float]) -> None:
    if abs(ours - official) > (1e-6 if benchmark.name in LOCAL_TASKS else ROUNDING):
        found = " + ".join(benchmark.metrics)
        raise EvaluationError(
            f"task {benchmark.name!r}: {sum(credits):g} of {len(credits)} answers were judged correct, which makes "
            f"{ours:.6g}, but the official {found} is {official:.6g} of 1; the installed lmms-eval scores in another "
            "way than expected"
        )


def family_scores(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracies by the family of the records; balanced ones where every answer is yes or no."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(sample["family"], []).append(sample)
    scores: dict[str, dict[str, Any]] = {}
    for family, members in groups.items():
        correct = [bool(member["correct"]) for member in members]
        targets = [str(member["target"]) for member in members]
        scores[family] = {
            "n": len(members),
            "accuracy": stats.accuracy(correct),
            "interval": list(stats.wilson_interval(sum(correct), len(correct))),
        }
        if set(targets) <= YES_NO:
            scores[family]["balanced_accuracy"] = stats.balanced_accuracy(correct, targets)
            scores[family]["balanced_interval"] = list(stats.balanced_accuracy_interval(correct, targets))
    return scores
