"""The summary on hand-made answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.summarize import (
    BLANK_IMAGE,
    COMMONEST_TRAINING_ANSWER,
    collect,
    markdown,
    summarize,
    verdict,
)

PRIORS = {"What shape?": "Circle.", "Is it red?": "yes", "Is it big?": "yes", "What kind?": "animal"}


def answers(spec: list[tuple[str, str, str, str]]) -> list[dict[str, Any]]:
    """(family, question, target, "1" where correct) with an id by position."""
    return [
        {"task": "t", "id": str(i), "family": f, "question": q, "target": t, "answer": "", "correct": c == "1"}
        for i, (f, q, t, c) in enumerate(spec)
    ]


def run_of(right: dict[str, str]) -> list[dict[str, Any]]:
    """Ten questions each of four families; `right` says for each which are answered correctly."""
    spec = []
    for family, question, targets in (
        ("emoji_kind", "What kind?", ["animal"] * 3 + ["food"] * 4 + ["flag"] * 3),
        ("shapes_yesno", "Is it red?", ["yes"] * 5 + ["no"] * 5),
        ("presence", "Is it big?", ["yes"] * 8 + ["no"] * 2),
        ("shapes_open", "What shape?", ["circle"] * 6 + ["triangle"] * 4),
    ):
        spec += [(family, question, target, right[family][i]) for i, target in enumerate(targets)]
    return answers(spec)


MOE = run_of(
    {"shapes_open": "1111111111", "emoji_kind": "1010101010", "shapes_yesno": "1" * 10, "presence": "1" * 8 + "00"}
)
DENSE = run_of(
    {"shapes_open": "1111000000", "emoji_kind": "0101010101", "shapes_yesno": "1" * 10, "presence": "1" * 10}
)
BLANK = run_of(
    {"shapes_open": "1000000000", "emoji_kind": "0001111000", "shapes_yesno": "0" * 10, "presence": "1" * 8 + "00"}
)


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    for name, samples in (("moe", MOE), ("dense", DENSE), ("blank", BLANK)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('{"tasks": {"t": {}}}')
        (tmp_path / name / "samples_t.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (tmp_path / "priors.json").write_text(json.dumps(PRIORS))
    return summarize(
        tmp_path / "moe",
        tmp_path / "dense",
        tmp_path / "blank",
        tmp_path / "priors.json",
        tmp_path / "out",
        seconds={"pretrain": 12.3, "sft": 45.6},
        upcycle={"max_abs_logit_error": 1e-6},
        versions={"torch": "2.13.0"},
    )


def test_shape_and_values(results: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert list(results) == ["tasks", "seconds", "upcycle", "versions"]
    tasks = results["tasks"]
    assert list(tasks) == ["shapes_open", "emoji_kind", "shapes_yesno", "presence", "all_yesno"]
    required = {"n", "metric", "moe", "dense", "blind", "majority", "moe_ci", "dense_ci", "difference_ci"}
    assert all(required <= set(row) for row in tasks.values())

    headline = tasks["shapes_open"]
    assert (headline["n"], headline["metric"]) == (10, "accuracy")
    assert (headline["moe"], headline["dense"], headline["majority"]) == (1.0, 0.4, 0.6)
    assert (headline["blind"], headline["blind_source"]) == (0.6, COMMONEST_TRAINING_ANSWER)  # "Circle." counts
    assert (tasks["emoji_kind"]["blind"], tasks["emoji_kind"]["blind_source"]) == (0.4, BLANK_IMAGE)
    assert tasks["emoji_kind"]["majority"] == 0.4


def test_yes_no_families_are_balanced(results: dict[str, Any]) -> None:
    presence, together = results["tasks"]["presence"], results["tasks"]["all_yesno"]
    assert presence["metric"] == together["metric"] == "balanced_accuracy"
    assert (presence["moe"], presence["dense"], presence["blind"], presence["majority"]) == (0.5, 1.0, 0.5, 0.5)
    assert together["n"] == 20
    assert together["moe"] == pytest.approx((13 / 13 + 5 / 7) / 2)


def test_verdict_needs_an_interval_without_zero(results: dict[str, Any]) -> None:
    tasks = results["tasks"]
    assert verdict(tasks["shapes_open"]) == "better"
    assert verdict(tasks["emoji_kind"]) == "no difference shown"
    assert verdict(tasks["shapes_yesno"]) == "no difference shown"
    assert verdict(tasks["presence"]) == "worse"


def test_markdown(results: dict[str, Any], tmp_path: Path) -> None:
    text = (tmp_path / "out" / "results.md").read_text()
    assert text == markdown(results)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[2].startswith("| **shapes_open** | 10 | accuracy | 100.0 [72.2, 100.0] | 40.0 [16.8, 68.7] | +60.0 [+")
    assert table[2].endswith("| better |")
    assert "| emoji_kind |" in table[3]
    assert table[3].endswith("| no difference shown |")
    assert "| pretrain | 12 |" in text
    assert "max abs logit error: 1e-06" in text
    assert "torch 2.13.0" in text


def test_runs_on_other_questions_are_refused() -> None:
    with pytest.raises(EvaluationError, match="40 questions and the dense run 39"):
        collect(MOE, DENSE[:-1], BLANK, PRIORS)
    other = [{**sample, "target": "other"} for sample in BLANK]
    with pytest.raises(EvaluationError, match="the blank-picture run 40, and they are not the same"):
        collect(MOE, DENSE, other, PRIORS)


def test_missing_prior_and_unjudged_answers_are_named() -> None:
    priors = {question: answer for question, answer in PRIORS.items() if question != "What kind?"}
    with pytest.raises(EvaluationError, match=r"priors\.json has no answer for the question 'What kind\?' of '0'"):
        collect(MOE, DENSE, BLANK, priors, "priors.json")
    unjudged = [{**sample, "correct": None} for sample in MOE]
    with pytest.raises(EvaluationError, match="no judged answers"):
        collect(unjudged, unjudged, unjudged, PRIORS)
