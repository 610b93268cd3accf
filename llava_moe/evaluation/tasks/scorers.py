"""Scorers of our tasks in `benchmarks/`: LLaVA's reading of POPE, HallusionBench and Chinese MMBench without a judge.

Each takes what lmms-eval hands it: the document and the list of answers, or the list of what it returned for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
Row = dict[str, Any]

POPE_METRICS = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_answer_yes_ratio")
HALLUSION_METRICS = ("aAcc", "qAcc", "fAcc")
_NEGATIONS = {"no", "not", "No"}
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def first_sentence_answer(text: str) -> str:
    """LLaVA's rule for POPE: "no" if the first sentence holds the word no or not, otherwise "yes"."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if _NEGATIONS & set(words) else "yes"


def pope_process_results(doc: Document, results: Sequence[str]) -> dict[str, Row]:
    """The reading of one answer, for every metric.

    Raises:
        ValueError: the reference is neither yes nor no.
    """
    truth = doc["answer"].lower().strip()
    if truth not in ("yes", "no"):
        raise ValueError(f"question {doc['question_id']!r} has the reference {doc['answer']!r}; it must be yes or no")
    answer = first_sentence_answer(results[0].strip())
    row = {
        "question_id": doc["question_id"],
        "score": float(answer == truth),
        "prediction": answer,
        "ground_truth": truth,
    }
    return dict.fromkeys(POPE_METRICS, row)


def answer_yes_ratio(rows: Sequence[Row]) -> float:
    """Share of the answers that are yes."""
    return sum(row["prediction"] == "yes" for row in rows) / len(rows)


def hallusion_answer(text: str) -> str | None:
    """The first yes or no in the answer as a word; None if there is neither, which is wrong."""
    found = _YES_OR_NO.search(text)
    return None if found is None else found[1].lower()


def hallusion_process_results(doc: Document, results: Sequence[str]) -> dict[str, Row]:
    """One answer, read; `gt_answer` is "1" for yes.

    Raises:
        ValueError: the reference is neither "0" nor "1".
    """
    truth = {"0": "no", "1": "yes"}.get(str(doc["gt_answer"]))
    if truth is None:
        raise ValueError(f"question {doc['question']!r} has the reference {doc['gt_answer']!r}; it must be 0 or 1")
    place = (str(doc["category"]), str(doc["subcategory"]), str(doc["set_id"]))
    answer = hallusion_answer(results[0])
    row = {
        "score": float(answer == truth),
        "prediction": answer,
        "ground_truth": truth,
        "question": [*place, str(doc["question_id"])],
        "figure": [*place, str(doc["figure_id"])],
    }
    return dict.fromkeys(HALLUSION_METRICS, row)


def hallusion_all(rows: Sequence[Row]) -> float:
    """Percent of the answers that are right."""
    return 100 * sum(row["score"] for row in rows) / len(rows)


def hallusion_by_question(rows: Sequence[Row]) -> float:
    """Percent of the questions whose answers to all figures are right."""
    return _all_right(rows, "question")


def hallusion_by_figure(rows: Sequence[Row]) -> float:
    """Percent of the figures whose questions are all answered right."""
    return _all_right(rows, "figure")


def _all_right(rows: Sequence[Row], key: str) -> float:
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key])].append(row["score"])
    return 100 * sum(min(scores) for scores in groups.values()) / len(groups)


def mmbench_cn_process_results(doc: Document, results: Sequence[str]) -> dict[str, Row]:
    """lmms-eval's own, without the rows of its submission file."""
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_process_results

    return {"gpt_eval_score": mmbench_process_results(doc, results)["gpt_eval_score"]}


def mmbench_cn_static(rows: Sequence[Row]) -> float:
    """Percent of the questions whose rotations are all answered right, by rules."""
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    return 100 * float(mmbench_evaluator.eval_result(list(rows), eval_method="static")[0])
