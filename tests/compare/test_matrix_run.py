"""Whole comparisons of a tiny model: what is done is not done again, after a kill neither, and what the report says."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llava_moe import cell as program
from llava_moe.compare import cells, costs, reference
from llava_moe.compare import run as compare
from llava_moe.compare.matrix import DENSE, RANDOM, Cell, Matrix
from llava_moe.compare.parent import make_parent
from llava_moe.compare.report import Failure
from llava_moe.config import RecipeError
from llava_moe.data.dataset import ConversationDataset
from llava_moe.training.metrics import read_metrics
from llava_moe.training.stopping import STOPPED
from tests.compare.matrices import METHODS, STEPS, write_matrix, write_parts

REPO = Path(__file__).parents[2]
Orders = dict[tuple[str, int], list[int]]


class HereSchedule:
    """Runs cells one after the other in this process: what a start of Python costs would be most of the test."""

    def __init__(self, todo: list[Cell], jobs: int, devices: Any, finished: int, ranks: int) -> None:
        self.todo = todo

    def run(self) -> list[Failure]:
        failures = []
        for cell in self.todo:
            try:
                program.run(cell.folder)
            except Exception as error:  # as a process would end
                failures.append(Failure(cell.method, cell.seed, cells.state_of(cell), str(error)))
        return failures


def score_here(command: Sequence[str], number: int, environment: Mapping[str, str]) -> int:
    """The scoring of the parent, in this process as well."""
    assert command[1:-1] == ["-m", "llava_moe.cell", "parent"]
    program.score_parent(Path(command[-1]))
    return 0


def compare_here(matrix: Path, *overrides: str) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "run_ranks", score_here)
        compare.main(parser.parse_args([str(matrix), *overrides]))


@contextmanager
def watched_samples(orders: Orders) -> Iterator[None]:
    """Within it the samples that each cell reads are noted, in their order."""
    read, whole = ConversationDataset.__getitem__, program.run
    now: list[tuple[str, int]] = []

    def item(self: ConversationDataset, index: int) -> dict[str, Any]:
        orders.setdefault(now[-1], []).append(index)
        return read(self, index)

    def run(folder: Path) -> None:
        now.append((folder.parent.name, int(folder.name.removeprefix("seed_"))))
        whole(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationDataset, "__getitem__", item)
        patch.setattr(program, "run", run)
        patch.setattr(compare, "Schedule", HereSchedule)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Matrix, Orders]:
    """Two methods, the two controls and two seeds, compared in this process; and the samples of each cell."""
    folder, orders = tmp_path_factory.mktemp("matrix"), Orders()
    write_parts(folder)
    path = write_matrix(folder, stability={"every": 2, "limit": 4}, brittleness={"limit": 6})
    with watched_samples(orders):
        compare_here(path)
    return Matrix(path), orders


@pytest.fixture
def finished(compared: tuple[Matrix, Orders]) -> Matrix:
    return compared[0]


@pytest.mark.slow
def test_every_cell_has_trained_and_answered(finished: Matrix) -> None:
    for cell in finished.cells:
        assert [row["step"] for row in read_metrics(cell.run)] == list(range(1, STEPS + 1))
        assert sorted(cells.answers_of(cell)["local_gqa"]) == [f"g{i}" for i in range(10)]
        assert not (cell.run / "upcycled").exists()
        assert 0.05 < json.loads((cell.folder / cells.MEMORY).read_text())["peak_memory_gib"] < 16
        assert (cell.run / compare.CHECKED).read_text() == (finished.out / compare.CHECKED).read_text()
        without = cell.folder / cells.WITHOUT_TOP
        assert without.is_dir() == (cell.method != DENSE)
        if without.is_dir():
            assert sorted(cells.answers_of(cell, cells.WITHOUT_TOP)["local_gqa"]) == [
                "g0",
                "g1",
                "g3",
                "g5",
                "g6",
                "g8",
            ]


@pytest.mark.slow
def test_the_cells_of_a_seed_see_the_same_samples_in_the_same_order(compared: tuple[Matrix, Orders]) -> None:
    matrix, orders = compared
    for seed in matrix.seeds:
        assert len(orders[DENSE, seed]) >= 2 * STEPS  # two samples a step
        assert all(orders[method, seed] == orders[DENSE, seed] for method in matrix.methods)
    assert orders[DENSE, 1] != orders[DENSE, 2]


@pytest.mark.slow
def test_cells_of_a_seed_start_from_the_same_parent(finished: Matrix) -> None:
    """Upcycled by copy, with weights that sum to 1: at step 1 every method has the loss of the dense control."""
    for seed in finished.seeds:
        first = {name: read_metrics(finished.cell(name, seed).run)[0]["cross_entropy"] for name in finished.methods}
        assert first["top_k"] == pytest.approx(first[DENSE], abs=1e-5)
        assert first[RANDOM] == pytest.approx(first[DENSE], abs=1e-5)
    one, other = (read_metrics(finished.cell("top_k", seed).run)[0]["cross_entropy"] for seed in finished.seeds)
    assert one != other  # another order


@pytest.mark.slow
def test_the_report_holds_costs_curves_and_brittleness(finished: Matrix) -> None:
    written = json.loads((finished.out / compare.REPORT / "comparison.json").read_text())
    facts = written["methods"]
    assert list(facts) == [DENSE, RANDOM, "top_k", "sigmoid"]
    assert facts["sigmoid"]["about"] == "DeepSeek-V3's router"
    assert facts[DENSE]["max_violation"] is None
    assert facts[DENSE]["without_top"] == {}
    for name in (RANDOM, "top_k", "sigmoid"):
        assert facts[name]["seconds_per_step"] > 0
        assert facts[name]["active_parameters"] < facts[name]["parameters"]
        assert 0 <= facts[name]["max_violation"] <= 1  # 4 experts, k = 2
        assert facts[name]["without_top"].keys() == {"1", "2"}
        assert [step for step, _ in facts[name]["checkpoints"]["1"]] == [2, 4]
    for name in (RANDOM, "top_k"):
        for seed, (intact, _) in facts[name]["without_top"].items():
            answers = cells.answers_of(finished.cell(name, int(seed)))["local_gqa"]
            asked = [answers[f"g{i}"] for i in (0, 1, 3, 5, 6, 8)]
            assert intact == pytest.approx(sum(asked) / len(asked))
    assert any("dense control's active parameters" in notice for notice in written["notices"])
    assert any("6 questions of each of local_gqa" in notice for notice in written["notices"])
    assert (finished.out / compare.REPORT / "report.html").is_file()


@pytest.mark.slow
def test_the_parent_answers_the_same_questions_and_is_compared_with(finished: Matrix) -> None:
    answers = reference.answers_of(finished, compare.shared_of(finished))
    assert answers is not None
    assert answers["local_gqa"].keys() == cells.answers_of(finished.cell("top_k", 1))["local_gqa"].keys()
    overall = json.loads((finished.out / compare.REPORT / "comparison.json").read_text())["analysis"]["overall"]
    assert overall["parent"] == pytest.approx(costs.mean_of(answers))
    assert {one["a"] for one in overall["to_parent"]} == set(finished.methods)
    other = Matrix(finished.path, ["scoring.limit=8"])
    assert reference.answers_of(other, compare.shared_of(other)) is None  # those are not the questions of this one


@pytest.mark.slow
def test_a_parent_that_cannot_be_scored_ends_the_matrix_before_any_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(tmp_path)
    matrix = Matrix(write_matrix(tmp_path, brittleness=None))
    monkeypatch.setattr(reference, "run_ranks", lambda *args: 3)
    with pytest.raises(RecipeError, match=r"parent could not be scored \(exit code 3\)"):
        compare.run_cells(matrix)
    assert not list(matrix.out.rglob(cells.STATE))  # none has begun a step
    assert not list(matrix.out.glob(f"cells/*/*/{cells.PLAN}"))
    monkeypatch.setattr(reference, "run_ranks", lambda *args: STOPPED)
    with pytest.raises(SystemExit) as error:
        compare.run_cells(matrix)
    assert error.value.code == STOPPED


@pytest.mark.slow
def test_a_finished_matrix_computes_nothing_and_other_questions_repeat_no_training(
    finished: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Counting(HereSchedule):
        def run(self) -> list[Failure]:
            asked.append(len(self.todo))
            return super().run()

    monkeypatch.setattr(compare, "Schedule", Counting)
    before = _times(finished)
    compare_here(finished.path)
    assert asked == [0]
    assert _times(finished) == before
    weights = {file: when for file, when in before.items() if "run" in file.parts}
    compare_here(finished.path, "scoring.limit=8")
    assert asked == [0, 8]
    assert {file: _times(finished)[file] for file in weights} == weights
    assert len(cells.answers_of(finished.cell("top_k", 1))["local_gqa"]) == 8


@pytest.mark.slow
def test_a_failed_cell_is_left_out_and_named_and_models_are_kept_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(tmp_path)
    path = write_matrix(tmp_path, seeds=[1], brittleness=None, methods={"top_k": {}}, keep_models=False)
    whole = program.run

    def broken(folder: Path) -> None:
        if "top_k" in str(folder):
            raise ValueError("the disk is full")
        whole(folder)

    monkeypatch.setattr(compare, "Schedule", HereSchedule)
    monkeypatch.setattr(program, "run", broken)
    with pytest.raises(SystemExit) as error:
        compare_here(path)
    assert error.value.code == 1
    written = json.loads((tmp_path / "out" / compare.REPORT / "comparison.json").read_text())
    assert [(one["method"], one["log"]) for one in written["failures"]] == [("top_k", "the disk is full")]
    assert written["analysis"]["overall"]["left_out"] == ["top_k"]
    with pytest.raises(SystemExit):  # a look at what there is says the same
        compare_here(path, "--report-only")
    monkeypatch.setattr(program, "run", whole)
    dense = tmp_path / "out/cells/dense/seed_1"
    done = (dense / cells.DONE).stat().st_mtime_ns
    compare_here(path)  # only the missing cell is run
    assert (dense / cells.DONE).stat().st_mtime_ns == done
    assert costs.mean_of(cells.answers_of(Matrix(path).cell("top_k", 1))) >= 0
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
def test_answers_without_top_experts_go_on_after_a_kill(finished: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the last answer and dropped.json: that experts were dropped is still known."""
    folder = finished.cell("top_k", 2).folder
    plan = json.loads((folder / cells.PLAN).read_text())
    marker = folder / cells.WITHOUT_TOP / cells.DROPPED
    assert json.loads(marker.read_text()) == {"key": plan["key"], "dropped": True}
    marker.unlink()
    monkeypatch.setattr(program, "_evaluate", lambda *args: None)  # every answer is there
    program.run(folder)
    assert json.loads(marker.read_text()) == {"key": plan["key"], "dropped": True}


def test_a_parent_that_nobody_makes_is_refused(tmp_path: Path) -> None:
    matrix = Matrix(write_matrix(tmp_path))
    with pytest.raises(RecipeError, match=r"parent\.recipes names no maker"):
        make_parent(matrix)
    other = Matrix(write_matrix(tmp_path, parent={"checkpoint": str(tmp_path / "parent"), "recipes": ["control.yaml"]}))
    with pytest.raises(RecipeError, match=r"the last of parent\.recipes writes"):
        make_parent(other)


@pytest.mark.slow
def test_a_killed_matrix_goes_on_without_repeating_cells(tmp_path: Path) -> None:
    """And the parent is made first: by a recipe with DeepSpeed, in a process that the matrix starts as a rank."""
    write_parts(tmp_path)
    parent = {"checkpoint": str(tmp_path / "made/model"), "recipes": ["parent.yaml"]}
    path = write_matrix(tmp_path, seeds=[1], methods={"top_k": METHODS["top_k"]}, brittleness=None, parent=parent)
    made = {"output_dir": str(tmp_path / "made"), "deepspeed": str(REPO / "scripts/deepspeed/zero1.json")}
    (tmp_path / "parent.yaml").write_text(json.dumps({"base": "control.yaml", **made}))
    command = [sys.executable, "-m", "llava_moe.cli", "compare", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    first, second = Matrix(path).cells[:2]
    process = subprocess.Popen(command, cwd=REPO, env=environment)
    until = time.monotonic() + 120
    while not (second.run / "start.json").is_file() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (first.folder / cells.DONE).is_file()
    assert not (second.folder / cells.DONE).is_file()
    before = {file: file.stat().st_mtime_ns for file in first.folder.rglob("*") if _is_product(file)}
    before |= {file: file.stat().st_mtime_ns for file in (tmp_path / "made").rglob("*") if file.is_file()}
    told = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=150)
    assert told.returncode == 0, told.stderr
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "dense, seed 1" not in told.stdout
    assert "3/3" in told.stdout
    assert all((cell.folder / cells.DONE).is_file() for cell in Matrix(path).cells)


@pytest.mark.slow
def test_a_cell_on_two_devices_trains_and_answers_as_two_ranks(tmp_path: Path) -> None:
    write_parts(tmp_path)
    path = write_matrix(tmp_path, seeds=[1], methods={"top_k": METHODS["top_k"]}, devices_per_job=2)
    matrix = Matrix(path)
    cell = matrix.cell("top_k", 1)
    cells.write_plan(cell, cells.plan_of(matrix, cell, compare.shared_of(matrix)))
    command = [sys.executable, "-m", "llava_moe.cell", "cell", str(cell.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    told = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=150)
    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads((cell.run / "done.json").read_text())["world_size"] == 2
    assert sorted(cells.answers_of(cell)["local_gqa"]) == [f"g{i}" for i in range(10)]
    assert len(cells.answers_of(cell, cells.WITHOUT_TOP)["local_gqa"]) == 10
    assert json.loads((cell.folder / cells.WITHOUT_TOP / cells.DROPPED).read_text())["dropped"] is True


def _is_product(file: Path) -> bool:
    return file.is_file() and file.name not in (cells.PLAN, cells.RECIPE, cells.LOCK)  # those are written anew


def _times(matrix: Matrix) -> dict[Path, int]:
    return {
        file: file.stat().st_mtime_ns for cell in matrix.cells for file in cell.folder.rglob("*") if _is_product(file)
    }
