"""Two ranks under torchrun give the answers and routing records of one, in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe import cli
from llava_moe.evaluation import EvaluationError, records, routing_records
from llava_moe.evaluation.machinery import accelerator
from tests.evaluation import fakes
from tests.evaluation.trained import write_trained
from tests.training.runs import start_ranks, torchrun

TASKS = ("local_gqa", "local_pope")


@pytest.mark.slow
def test_two_ranks_answer_as_one_and_in_order(tmp_path: Path) -> None:
    """Nine questions: the second rank is given one again, so that both have five."""
    checkpoint = write_trained(tmp_path / "model", "llava", "moe", steps=20)
    data = fakes.write_records(tmp_path / "data")
    arguments = ["eval", str(checkpoint), "--data", str(data), "--tasks", ",".join(TASKS)]
    arguments += ["--batch-size", "4", "--limit", "9", "--routing", "--out"]
    done = start_ranks(torchrun(2), ["llava_moe.cli", *arguments, str(tmp_path / "two")], timeout=120)
    assert done.returncode == 0, done.stdout
    cli.main([*arguments, str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / records.RESULTS_FILE).read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert {name: task["score"] for name, task in one["tasks"].items()} == {
        name: task["score"] for name, task in two["tasks"].items()
    }
    for name in TASKS:
        found, wanted = (records.samples_path(tmp_path / who, name).read_text() for who in ("two", "one"))
        assert found == wanted
        rows = [json.loads(line) for line in found.splitlines()]
        assert [row["doc_id"] for row in rows] == list(range(9))
        assert len({row["answer"] for row in rows}) > 1
    assert loads(tmp_path / "one") == loads(tmp_path / "two")
    assert len(loads(tmp_path / "one")) == 18


def loads(folder: Path) -> list[Any]:
    """Tokens and loads of every line; the means may differ by the rounding of another batch."""
    kinds = routing_records.KINDS
    return [
        [line["task"], line["doc_id"], line["tokens"]]
        + [[layer.get(kind) for kind in kinds] for layer in line["layers"].values()]
        for line in routing_records.read(folder)
    ]


def test_ranks_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would answer every question, and they would write to the same files."""
    accelerator()  # accelerate has seen one process by now
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match="WORLD_SIZE is 2, but accelerate sees 1 processes; start with torchrun"):
        accelerator()
