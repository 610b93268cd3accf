"""The parent asked what every cell is asked, before any cell runs: whether the training gains on it is then known, and
a scoring that cannot work fails before anything is trained."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from llava_moe.compare import cells
from llava_moe.compare.matrix import Matrix
from llava_moe.compare.parent import processes
from llava_moe.compare.questions import of_scoring
from llava_moe.compare.ranks import run_ranks
from llava_moe.config import RecipeError
from llava_moe.evaluation import records
from llava_moe.training.stopping import STOPPED


def folder_of(matrix: Matrix) -> Path:
    """Where the parent's answers are."""
    return matrix.out / "parent"


def score_parent(matrix: Matrix, shared: cells.Shared) -> None:
    """Scores the parent on all devices of the matrix, unless that was done; goes on with the answers that are there.

    Raises:
        RecipeError: the scoring failed.
        SystemExit: it was asked to stop.
    """
    folder, key = folder_of(matrix), _key(matrix, shared)
    if cells.key_in(folder / cells.DONE) == key:
        return
    number, environment = processes(matrix)
    print(f"compare: scoring the parent, {number} process(es)", flush=True)
    checkpoint = matrix.config.parent.checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    records.write_json(folder / cells.PLAN, {"checkpoint": checkpoint, "scoring": of_scoring(matrix).as_json()})
    code = run_ranks([sys.executable, "-m", "llava_moe.cell", "parent", str(folder)], number, environment)
    if code in (STOPPED, -signal.SIGTERM):  # scoring has nothing to save, and ends at once
        print("compare: stopped; start it again to go on", flush=True)
        sys.exit(STOPPED)
    if code:
        raise RecipeError(f"{checkpoint}: the parent could not be scored (exit code {code}); see above")
    records.write_json(folder / cells.DONE, {"key": key})


def answers_of(matrix: Matrix, shared: cells.Shared) -> dict[str, dict[str, float]] | None:
    """By task, the credit in [0, 1] for each question; None where the parent was not asked these questions."""
    folder = folder_of(matrix)
    if cells.key_in(folder / cells.DONE) != _key(matrix, shared):
        return None
    return cells.answers_in(folder / cells.SCORES)


def _key(matrix: Matrix, shared: cells.Shared) -> str:
    return cells.digest([shared.parent, of_scoring(matrix).decides(), dict(shared.questions)])
