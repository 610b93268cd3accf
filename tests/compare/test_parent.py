"""Methods against the one checkpoint that they started from: statistics, sentences and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_moe.compare import bootstrap, report_tables
from llava_moe.compare.answers import Answers
from llava_moe.compare.conclusions import conclude
from llava_moe.compare.report import HTML, MARKDOWN, MethodFacts, ReportInputs, write_report
from llava_moe.compare.stats import Analysis, analyse
from llava_moe.compare.student import t_quantile
from llava_moe.evaluation import EvaluationError
from tests.compare import simulate


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "NUM_RESAMPLES", bootstrap._CHUNK)


def drawn(
    rng: np.random.Generator,
    scores: Sequence[float],
    parent: float,
    seeds: int,
    questions: int,
    seed_sd: float = 0.05,
    task: str = "task",
) -> tuple[Answers, dict[str, float]]:
    """Answers of the methods, and of a checkpoint with the true score `parent`, to the same questions."""
    spread = [*[seed_sd] * len(scores), 0.0]
    made = simulate.answers(rng, [*scores, parent], seeds, questions, spread, task=task)
    methods = Answers(task, made.methods[:-1], made.seeds, made.questions, made.scores_MSQ[:-1])
    return methods, dict(zip(made.questions, made.scores_MSQ[-1, 0].tolist(), strict=True))


def analysed(rng: np.random.Generator, scores: Sequence[float], parent: float, *sizes: int, **options: Any) -> Analysis:
    answers, start = drawn(rng, scores, parent, *sizes, **options)
    return analyse([answers], "dense", "random", {answers.task: start})


def texts(analysis: Analysis, kind: str) -> list[str]:
    return [sentence.text for sentence in conclude(analysis) if sentence.kind == kind]


def test_one_seed_is_the_paired_t_test_over_questions() -> None:
    rng = np.random.default_rng(0)
    answers, start = drawn(rng, [0.7], 0.5, 1, 50)
    one = analyse([answers], "dense", None, {"task": start}).overall.to_parent[0]
    difference_Q = answers.scores_MSQ[0, 0] - np.array(list(start.values()))
    half = t_quantile(0.975, 49) * difference_Q.std(ddof=1) / math.sqrt(50)
    assert (one.a, one.b, one.num_seeds) == ("dense", "the parent", 1)
    assert one.interval == pytest.approx((difference_Q.mean() - half, difference_Q.mean() + half))
    assert not one.shown


def test_where_questions_do_not_vary_it_is_the_t_test_of_the_seeds_against_a_number() -> None:
    by_seed = np.array([0.62, 0.58, 0.66])
    table = np.repeat(by_seed[None, :, None], 4000, axis=2)
    answers = Answers("task", ("dense",), (1, 2, 3), tuple(f"q{i}" for i in range(4000)), table)
    one = analyse([answers], "dense", None, {"task": dict.fromkeys(answers.questions, 0.5)}).overall.to_parent[0]
    half = t_quantile(0.975, 2) * by_seed.std(ddof=1) / math.sqrt(3)
    assert one.value == pytest.approx(0.12)
    assert one.interval[1] - one.value == pytest.approx(half, rel=1e-3)  # and hardly anything of the questions' floor
    assert one.seeds_won == 3


def rates(repeats: int, seeds: int, questions: int, seed_sd: float, tasks: int = 1) -> tuple[float, float]:
    """Shares of the intervals that hold the truth, and of the experiments that claim a gain or loss where none is."""
    rng = np.random.default_rng(3)
    holds, false = [], []
    for _ in range(repeats):
        parts = [drawn(rng, [0.7] * 6, 0.7, seeds, questions, seed_sd, f"t{k}") for k in range(tasks)]
        start = {answers.task: parent for answers, parent in parts}
        found = analyse([answers for answers, _ in parts], "dense", "random", start).overall.to_parent
        holds += [one.interval[0] <= 0 <= one.interval[1] for one in found]
        false.append(any(one.shown for one in found))
    return float(np.mean(holds)), float(np.mean(false))


def test_coverage_and_false_claims_in_brief() -> None:
    holds, false = rates(40, 3, 120, 0.15)
    assert holds >= 0.92
    assert false <= 0.075


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "questions", "seed_sd", "tasks"),
    [(3, 300, 0.05, 1), (3, 300, 0.2, 1), (3, 200, 0.1, 2), (5, 100, 0.1, 1)],
)
def test_coverage_and_false_claims(seeds: int, questions: int, seed_sd: float, tasks: int) -> None:
    holds, false = rates(150, seeds, questions, seed_sd, tasks)
    assert holds >= 0.93
    assert false <= 0.06


@pytest.mark.parametrize(("parent", "verdict"), [(0.9, "worse"), (0.5, "better")])
def test_a_planted_change_is_a_sentence(parent: float, verdict: str) -> None:
    found = texts(analysed(np.random.default_rng(1), [0.7] * 4, parent, 3, 600), "training")
    assert found[0].split(" than ")[0].endswith(f" are {verdict}")
    for name in ("dense", "random", "m2", "m3"):
        assert name in found[0]
    assert ("-" in found[0].split(": ")[1]) == (verdict == "worse")
    assert any("No method is shown to gain" in text for text in found) == (verdict == "worse")


def test_what_the_correction_takes_back_is_said() -> None:
    rng = np.random.default_rng(6)
    table = (rng.random((8, 3, 200)) < 0.6).astype(float)
    answers = Answers("task", ("dense", *"abcdefg"), (1, 2, 3), tuple(f"q{i}" for i in range(200)), table)
    parent = (rng.random(200) < 0.7).astype(float)
    analysis = analyse([answers], "dense", None, {"task": dict(zip(answers.questions, parent.tolist(), strict=True))})
    alone = [one.a for one in analysis.overall.to_parent if not one.shown and one.interval[1] < 0]
    assert alone
    said = next(text for text in texts(analysis, "training") if "not a finding" in text)
    assert all(name in said for name in alone)
    assert "on its own, but p = ." in said


def test_with_one_seed_nothing_is_claimed_about_the_training() -> None:
    found = texts(analysed(np.random.default_rng(7), [0.9] * 3, 0.3, 1, 300), "training")
    assert found[0].startswith("One seed: no claim about ")
    assert not any("Neither gain" in text or "not a finding" in text for text in found)


def test_without_a_change_or_a_parent_there_is_no_claim() -> None:
    rng = np.random.default_rng(2)
    found = texts(analysed(rng, [0.7] * 4, 0.7, 3, 300), "training")
    assert found[0].startswith("Neither gain nor loss against the parent is shown on task for ")
    assert "could not have been seen reliably" in found[0]
    answers, _ = drawn(rng, [0.7] * 4, 0.7, 3, 300)
    bare = analyse([answers], "dense", "random")
    assert texts(bare, "training") == []
    assert (bare.overall.parent, bare.overall.to_parent) == (None, ())


def test_the_parent_stands_in_the_tables_and_pages(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    parts = [drawn(rng, [0.7] * 3, 0.9, 3, 200, task=task) for task in ("a", "b")]
    start = {answers.task: parent for answers, parent in parts}
    analysis = analyse([answers for answers, _ in parts], "dense", "random", start)
    inputs = ReportInputs("parent", analysis, {name: MethodFacts() for name in parts[0][0].methods})
    tables = report_tables.all_tables(inputs)
    values = [sum(parent.values()) / len(parent) for parent in start.values()]
    assert analysis.overall.parent == pytest.approx(sum(values) / 2)
    row = next(row for row in tables["tasks"].rows if row[0].text == "parent")
    assert [cell.text for cell in row[1:]] == [f"{100 * value:.1f}" for value in values]
    column = list(tables["main"].head).index("above parent")
    assert all(row[column].bold and row[column].text.startswith("-") for row in tables["main"].rows)
    write_report(tmp_path, inputs)
    for name in (HTML, MARKDOWN):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "No method is shown to gain on its parent" in text
        assert "above parent" in text


def test_a_parent_with_other_questions_is_refused() -> None:
    answers, start = drawn(np.random.default_rng(5), [0.7] * 2, 0.7, 3, 20)
    with pytest.raises(EvaluationError, match=r"the parent and the methods answered different questions \(1 in one"):
        analyse([answers], "dense", "random", {"task": {k: v for k, v in start.items() if k != "q3"}})
    with pytest.raises(EvaluationError, match="20 in one only"):
        analyse([answers], "dense", "random", {})
