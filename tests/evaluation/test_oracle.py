"""Models whose answers are known, through lmms-eval's own task files and scorers, on imitations of the public data.

The expected figures stand in imitations_scores.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llava_moe.evaluation import machinery, mirror
from llava_moe.evaluation.suites import BENCHMARKS, SUITES, score_of
from tests.evaluation.imitations import write_all
from tests.evaluation.imitations_scores import CREDITS, FULL_MARKS, WITH_MISTAKES
from tests.evaluation.oracle import Oracle, index_of_core

pytestmark = pytest.mark.slow

CORE = list(SUITES.get("core").tasks)
Run = Callable[..., tuple[dict[str, Any], Oracle]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Scores an oracle on tasks, each combination once."""
    tasks = index_of_core()
    folder = tmp_path_factory.mktemp("oracle")
    write_all(folder / "mirror")
    done: dict[Any, tuple[dict[str, Any], Oracle]] = {}

    def score(names: list[str], **options: bool) -> tuple[dict[str, Any], Oracle]:
        key = (tuple(names), tuple(options.items()))
        if key not in done:
            out = folder / f"run{len(done)}"
            out.mkdir()
            oracle = Oracle(**options)
            mirror.check(folder / "mirror", names)
            arguments = {"tasks": names, "batch_size": 3, "limit": None}
            with mirror.offline(folder / "mirror", cache=folder / "arrow"):
                raw = machinery.run_lmms_eval(oracle, {}, out, arguments)
            assert raw is not None
            done[key] = raw, oracle
        return done[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(machinery, "task_manager", lambda include_defaults: tasks)
        patched.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield score


def official(raw: dict[str, Any], task: str) -> dict[str, float]:
    return {
        name.partition(",")[0]: value
        for name, value in raw["results"][task].items()
        if isinstance(value, (int, float)) and "_stderr" not in name
    }


def test_the_imitations_cover_the_suite() -> None:
    assert set(FULL_MARKS) == set(WITH_MISTAKES) == set(CREDITS) == set(CORE)


@pytest.mark.parametrize("task", CORE)
def test_right_answers_have_full_marks(run: Run, task: str) -> None:
    raw, oracle = run(CORE)
    assert oracle.tasks.count(task) == len(raw["samples"][task]) > 0
    assert official(raw, task).items() >= FULL_MARKS[task].items()


@pytest.mark.parametrize("task", CORE)
def test_planned_mistakes_have_the_score_that_a_hand_works_out(run: Run, task: str) -> None:
    raw, _ = run(CORE, mistaken=True)
    found = official(raw, task)
    for metric, expected in WITH_MISTAKES[task].items():
        assert found[metric] == pytest.approx(expected, abs=1e-5), metric  # lmms-eval rounds MMMU to five places


@pytest.mark.parametrize("task", CORE)
def test_the_catalogue_agrees_with_the_scorers(run: Run, task: str) -> None:
    benchmark = BENCHMARKS.get(task)
    assert benchmark.credit is not None
    for number, mistaken in enumerate((False, True)):
        raw, _ = run(CORE, mistaken=True) if mistaken else run(CORE)
        given = [benchmark.credit(sample) for sample in raw["samples"][task]]
        assert given.count(None) == (task == "mmbench_en_dev_static")  # a rotation counts where its question does
        credits = [credit for credit in given if credit is not None]
        assert sum(credits) == pytest.approx(CREDITS[task][number])
        if benchmark.is_mean:
            score = score_of(benchmark, official(raw, task)) / benchmark.scale
            assert sum(credits) / len(credits) == pytest.approx(score, abs=1e-5)


def test_only_the_task_with_ocr_tokens_shows_them(run: Run) -> None:
    raw, oracle = run(CORE)
    shown = dict.fromkeys(CORE, 0)
    for task, prompt in zip(oracle.tasks, oracle.prompts, strict=True):
        shown[task] += "Reference OCR token: " in prompt
    assert {task for task, number in shown.items() if number} == {"textvqa_val_ocr"}
    assert shown["textvqa_val_ocr"] == 3
    assert any("Reference OCR token: STOP, T1\nAnswer the question" in prompt for prompt in oracle.prompts)
    assert len(raw["samples"]["textvqa_val_ocr"]) == 3


def test_a_question_with_the_picture_of_another_is_not_answered(run: Run) -> None:
    """What lmms-eval's own batching does to several tasks at once; only questions that share a picture stay right."""
    raw, _ = run(["gqa", "mme", "pope"], shifted=True)
    assert official(raw, "gqa")["exact_match"] == pytest.approx(2 / 6)
    assert official(raw, "mme").items() >= {"mme_perception_score": 100.0, "mme_cognition_score": 50.0}.items()
    assert official(raw, "pope")["pope_accuracy"] == 0


def test_two_pictures_of_a_question_arrive_in_their_order(run: Run) -> None:
    raw, oracle = run(CORE)
    (sample,) = [s for s in raw["samples"]["mmmu_val"] if s["doc"]["id"] == "validation_Music_1"]
    assert sample["mmmu_acc"]["parsed_pred"] == ["B"]
    assert any("Compare <image 1> with <image 2>." in prompt for prompt in oracle.prompts)
