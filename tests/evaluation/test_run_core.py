"""The suite `core` through `llava-moe eval` on imitations of the public data: headlines, intervals, resuming."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.evaluation import EvaluationError, lmms, prepared, run
from llava_moe.evaluation.suites import BENCHMARKS, SUITES
from tests.evaluation import fakes
from tests.evaluation.imitations import write_all
from tests.evaluation.imitations_scores import FULL_MARKS, WITH_MISTAKES
from tests.evaluation.oracle import Oracle, index_of_core

pytestmark = pytest.mark.slow

CORE = list(SUITES.get("core").tasks)
Ask = Callable[..., tuple[dict[str, Any], Oracle]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("core")
    write_all(folder / "mirror")
    fakes.write_checkpoint(folder / "right")
    (fakes.write_checkpoint(folder / "mistaken") / "model.safetensors").write_bytes(b"others")
    return folder


@pytest.fixture(scope="module")
def ask(folder: Path) -> Iterator[Ask]:
    """Runs the command with the oracle of that name in the place of the checkpoint."""
    tasks = index_of_core()

    def command(name: str, *more: Any) -> tuple[dict[str, Any], Oracle]:
        oracle = Oracle(mistaken=name == "mistaken")
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        given = [folder / name, "--mirror", folder / "mirror", "--out", folder / f"out_{name}", *more]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(prepared, "index", lambda include_defaults: tasks)
            patched.setattr(lmms, "LlavaMoe", lambda **options: oracle)
            patched.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "arrow"))
            patched.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            assert run.main(parser.parse_args(list(map(str, given)))) == 0
        return json.loads((folder / f"out_{name}" / "results.json").read_text()), oracle

    return command


def expected(task: str, table: dict[str, dict[str, float]]) -> float:
    return sum(table[task][metric] for metric in BENCHMARKS.get(task).metrics)


@pytest.mark.parametrize(("name", "table"), [("right", FULL_MARKS), ("mistaken", WITH_MISTAKES)])
def test_headlines_and_intervals_of_every_task(
    folder: Path, ask: Ask, name: str, table: dict[str, dict[str, float]]
) -> None:
    results, _ = ask(name, "--tasks", "core")
    assert list(results["tasks"]) == CORE
    for task in CORE:
        headline = results["tasks"][task]["headline"]
        assert headline["value"] == pytest.approx(expected(task, table), abs=1e-5), task
        if task in ("pope", "pope_first_sentence", "mme", "mmstar"):
            assert headline["interval"] is None  # too few questions for a bootstrap
        else:
            low, high = headline["interval"]
            assert 0 <= low <= headline["share"] <= high <= 1
            assert low < high
        assert len(results["about"][task]["sha256"]) == len(results["data_sha256"][task]) == 64
    assert len({results["about"][task]["sha256"] for task in CORE}) == len(CORE)
    assert results["data_sha256"]["pope"] == results["data_sha256"]["pope_first_sentence"]
    prompts = {task: results["about"][task]["prompt"] for task in ("textvqa_val", "textvqa_val_ocr")}
    assert [prompts[task]["ocr"] for task in prompts] == [False, True]
    out = folder / f"out_{name}"
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [row["task"] for row in rows if row["headline"] == "True"] == CORE
    assert "mme_perception_score + mme_cognition_score (of 2800)" in (out / "scores.md").read_text()
    page = (out / "samples.html").read_text()
    assert all(f"<h2>{task}</h2>" in page for task in CORE)


def test_asked_again_nothing_is_answered_and_a_broken_scorer_stands_alone(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = ask("right", "--tasks", "core")
    results, oracle = ask("right", "--tasks", "core,gqa")
    assert results == before
    assert oracle.prompts == []
    for name in ("finished.json", "results.json"):
        (folder / "out_right" / name).unlink()
    results, oracle = ask("right", "--tasks", "core")
    assert oracle.prompts == []  # from the journal
    assert results["answers"]["asked"] == 0
    assert results["answers"]["from_journal"] == sum(task["n"] for task in results["tasks"].values())
    assert {name: task["official"] for name, task in results["tasks"].items()} == {
        name: task["official"] for name, task in before["tasks"].items()
    }

    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    monkeypatch.setattr(MMBench_Evaluator, "eval_result", lambda self, *_, **__: 1 / 0)
    with pytest.raises(EvaluationError, match=r"1 of 11 tasks failed; .* mmbench_en_dev_static: ZeroDivisionError"):
        ask("right", "--tasks", "core", "--fresh")
    kept = json.loads((folder / "out_right" / "results.json").read_text())
    assert list(kept["failed"]) == ["mmbench_en_dev_static"]
    assert set(kept["tasks"]) == set(CORE) - {"mmbench_en_dev_static"}


def test_a_limit_is_recorded_and_mme_may_lack_a_headline(folder: Path, ask: Ask) -> None:
    results, _ = ask("mistaken", "--tasks", "mme,gqa", "--limit", "2")
    assert [task["n"] for task in results["tasks"].values()] == [2, 2]
    assert results["arguments"]["limit"] == 2
    assert "headline" not in results["tasks"]["mme"]  # one category only
    assert "headline" in results["tasks"]["gqa"]
    assert "the first 2 questions of each task" in (folder / "out_mistaken" / "scores.md").read_text()
