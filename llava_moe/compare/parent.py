"""The dense checkpoint that all cells start from: made by its recipes where it is not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llava_moe.compare.devices import cores, visible
from llava_moe.compare.matrix import Matrix
from llava_moe.compare.ranks import run_ranks
from llava_moe.config import RecipeError, load_recipe
from llava_moe.training.stopping import STOPPED


def is_there(matrix: Matrix) -> bool:
    """Whether the parent is a whole checkpoint; a stage gives its model this name when it is written."""
    return (Path(matrix.config.parent.checkpoint) / "config.json").is_file()


def check_parent(matrix: Matrix) -> None:
    """Whether the parent is there or can be made.

    Raises:
        RecipeError: there is nothing to make it by, or the last recipe writes another checkpoint.
    """
    parent = Path(matrix.config.parent.checkpoint)
    if is_there(matrix):
        return
    if not matrix.parent_recipes:
        raise RecipeError(f"{matrix.path}: parent.checkpoint={parent} is not there, and parent.recipes names no maker")
    made = [Path(load_recipe(recipe).output_dir) / "model" for recipe in matrix.parent_recipes][-1]
    if made.resolve() != parent.resolve():
        raise RecipeError(f"{matrix.path}: the last of parent.recipes writes {made}, but parent.checkpoint={parent}")


def make_parent(matrix: Matrix) -> None:
    """Trains the shared parent where it is not there, on all devices of the matrix; its recipes go on where they stood.

    Raises:
        RecipeError: see `check_parent`, or a recipe failed.
        SystemExit: it was asked to stop, and has saved.
    """
    check_parent(matrix)
    if is_there(matrix):
        return
    for recipe in matrix.parent_recipes:
        number, environment = processes(matrix)
        print(f"compare: making the parent: {recipe}, {number} process(es)", flush=True)
        code = run_ranks([sys.executable, "-m", "llava_moe.cell", "train", str(recipe)], number, environment)
        if code == STOPPED:
            sys.exit(STOPPED)
        if code:
            raise RecipeError(f"{recipe}: the parent's training failed with exit code {code}; see above")


def processes(matrix: Matrix) -> tuple[int, dict[str, str]]:
    """How many processes work on the parent, one for each GPU of the matrix, and what they need beside the variables of
    ranks: on a CPU all threads, as nothing runs beside them."""
    environment = {"PYTHONUNBUFFERED": "1"}
    devices = matrix.config.devices or visible()
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    else:
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(cores()))
    return max(1, len(devices)), environment
