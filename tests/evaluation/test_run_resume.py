"""Scoring that was interrupted goes on: nothing is asked twice, a failed task takes no other along, files are whole."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.evaluation import EvaluationError, lmms, resume, run
from llava_moe.evaluation.checkpoint_run import FINISHED
from tests.evaluation import fakes

REPO = Path(__file__).parents[2]
TASKS = ["local_gqa", "local_pope", "local_mmbench"]


class Breaking(fakes.FakeModel):
    """Fails at the first batch after so many prompts."""

    after = 10**9

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.fail = len(self.prompts) >= self.after
        return super().generate(input_ids, attention_mask, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return fakes.write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Breaking:
    fake = Breaking()
    monkeypatch.setattr(lmms, "load_checkpoint", lambda pretrained, dtype: (fake, fakes.FakeProcessor()))
    return fake


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """Without what a second run may have otherwise."""
    kept = {key: value for key, value in results.items() if key not in ("seconds", "answers")}
    kept["about"] = {name: {**about, "seconds": 0} for name, about in results["about"].items()}
    return kept


def test_what_was_answered_before_a_failure_is_not_asked_again(
    data: Path, checkpoint: Path, model: Breaking, tmp_path: Path
) -> None:
    whole = run.evaluate(checkpoint, data, TASKS, tmp_path / "whole", batch_size=4)
    assert (whole["answers"]["asked"], whole["answers"]["from_journal"]) == (30, 0)
    model.prompts.clear()
    model.after = 16  # ten of the first task, six of the second
    with pytest.raises(EvaluationError, match=r"2 of 3 tasks failed; the other 1 are in .*; local_pope: RuntimeError"):
        run.evaluate(checkpoint, data, TASKS, tmp_path / "out", batch_size=4)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(kept["tasks"]) == ["local_gqa"]
    assert list(kept["failed"]) == ["local_pope", "local_mmbench"]
    assert "asked to fail" in (tmp_path / "out" / "lmms_eval" / "local_pope.txt").read_text()
    answered = len(model.prompts)

    model.after = 10**9
    again = run.evaluate(checkpoint, data, TASKS, tmp_path / "out", batch_size=4)
    assert len(model.prompts) == 30
    assert (again["answers"]["asked"], again["answers"]["from_journal"]) == (30 - answered, answered - 10)
    assert comparable(again) == comparable(whole)
    for task in TASKS:
        name = f"samples_{task}.jsonl"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_of_other_weights_are_not_taken(data: Path, checkpoint: Path, model: Breaking, tmp_path: Path) -> None:
    run.evaluate(checkpoint, data, TASKS[:1], tmp_path / "out")
    first = len(model.prompts)
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    run.evaluate(checkpoint, data, TASKS[:1], tmp_path / "out")
    assert len(model.prompts) == 2 * first
    run.evaluate(checkpoint, data, TASKS[:1], tmp_path / "out", variant="something was dropped")
    assert len(model.prompts) == 3 * first


def test_finished_tasks_are_not_scored_again(
    data: Path, checkpoint: Path, model: Breaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval import evaluator

    seen: list[str] = []
    score = evaluator.simple_evaluate

    def watched(**arguments: Any) -> Any:
        seen.extend(task.config.task for task in arguments["tasks"])
        return score(**arguments)

    monkeypatch.setattr(evaluator, "simple_evaluate", watched)
    out = tmp_path / "out"
    run.evaluate(checkpoint, data, TASKS[:2], out)
    results = run.evaluate(checkpoint, data, TASKS, out)
    assert seen == TASKS
    assert list(results["tasks"]) == TASKS
    results = run.evaluate(checkpoint, data, TASKS[2:], out)  # fewer: results.json holds what was asked for last
    assert list(results["tasks"]) == TASKS[2:]
    assert list(results["families"]) == ["choice"]
    results = run.evaluate(checkpoint, data, TASKS, out)
    assert list(results["tasks"]) == TASKS
    assert seen == TASKS
    kept = json.loads((out / FINISHED).read_text())
    kept["tasks"]["local_pope"]["about"]["sha256"] = "of other records"
    (out / FINISHED).write_text(json.dumps(kept))
    run.evaluate(checkpoint, data, TASKS, out)
    assert seen == [*TASKS, "local_pope"]


def test_fresh_asks_everything_again(data: Path, checkpoint: Path, model: Breaking, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    command = [str(checkpoint), "--data", str(data), "--tasks", "local_gqa", "--out", str(tmp_path / "out")]
    run.main(parser.parse_args(command))
    run.main(parser.parse_args(command))
    assert len(model.prompts) == 10
    run.main(parser.parse_args([*command, "--fresh"]))
    assert len(model.prompts) == 20
    assert len((tmp_path / "out" / resume.FOLDER / "rank0.jsonl").read_text().splitlines()) == 10


_CHILD = """
import sys, time
from pathlib import Path
import llava_moe
from llava_moe.evaluation import lmms, run
from tests.evaluation import fakes
class Slow(fakes.FakeModel):
    def generate(self, *args, **options):
        time.sleep(0.2)
        found = super().generate(*args, **options)
        with open(sys.argv[1] + "/prompts", "a") as file:
            file.write("".join(f"{hash(prompt)}\\n" for prompt in self.prompts))
        self.prompts.clear()
        return found
lmms.load_checkpoint = lambda pretrained, dtype: (Slow(), fakes.FakeProcessor())
folder = Path(sys.argv[1])
run.evaluate(folder / "checkpoint", folder / "data", ["local_gqa", "local_pope"], folder / "out", batch_size=2)
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_repeats_at_most_one_batch(tmp_path: Path) -> None:
    fakes.write_records(tmp_path / "data")
    fakes.write_checkpoint(tmp_path / "checkpoint")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", _CHILD, str(tmp_path)], cwd=REPO, start_new_session=True)

    journal, prompts = tmp_path / "out" / resume.FOLDER / "rank0.jsonl", tmp_path / "prompts"
    child = start()
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    recorded, asked = journal.read_bytes().count(b"\n"), len(prompts.read_text().split())
    assert 4 <= recorded <= asked <= recorded + 2
    assert asked < 20
    assert not (tmp_path / "out" / "results.json").exists()
    assert start().wait(timeout=120) == 0
    assert len(prompts.read_text().split()) == asked + 20 - recorded
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [task["score"] for task in results["tasks"].values()] == [0.9, 1.0]


def test_a_checkpoint_that_cannot_be_loaded_takes_no_results_away(
    data: Path, checkpoint: Path, model: Breaking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = run.evaluate(checkpoint, data, TASKS[:1], out)

    def broken(pretrained: str, dtype: Any) -> Any:
        raise OSError("no such device")

    monkeypatch.setattr(lmms, "load_checkpoint", broken)
    with pytest.raises(OSError, match="no such device"):
        run.evaluate(checkpoint, data, TASKS, out)
    assert json.loads((out / "results.json").read_text()) == before
