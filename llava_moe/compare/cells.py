"""The folder of one cell of a matrix: what it is asked to do, how far it came, and what it found.

    plan.json         what it is asked to do; `key` changes whenever its answers could
    recipe.yaml       what it trains
    begun.json        what its training depends on, written before that begins
    state.json        the step that it is at, or failed in
    run/              of `llava-moe upcycle` and `llava-moe train`
    memory.json       the largest memory of its training, where that was on a CPU
    scores/           answers of the trained model; without_top/: without the top expert of each token
    done.json         written last, with the key that it was done for
    log.txt           everything that its processes printed

A cell is done when done.json holds the key of the plan. Until then its process is started anew and each step looks for
itself whether it is done, so that a kill costs what lies behind the last checkpoint of the step it hit.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_moe.compare.matrix import DENSE, Cell, Matrix
from llava_moe.compare.questions import of_brittleness, of_scoring
from llava_moe.config import RecipeError, RunConfig, dump_resolved
from llava_moe.evaluation import EvaluationError, records
from llava_moe.model.assemble import mark_file

PLAN, RECIPE, BEGUN, STATE, DONE = "plan.json", "recipe.yaml", "begun.json", "state.json", "done.json"
LOG, LOCK, MEMORY = "log.txt", "lock", "memory.json"
SCORES, WITHOUT_TOP, DROPPED = "scores", "without_top", "dropped.json"
_LOCK_WAIT = 30.0  # seconds until the process of a killed matrix must be gone
_PARENT = "LLAVA_MOE_PARENT"
_WATCH = 0.5  # seconds between looks at the parent process


@dataclass(frozen=True)
class Shared:
    """What all cells depend on besides their recipes, by content.

    Attributes:
        parent: fingerprint of the shared parent.
        training: mark of the training data, see `mark_of`.
        questions: hash of each task's records.
    """

    parent: str
    training: str
    questions: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What a cell is asked to do.

    Attributes:
        key: changes whenever its answers could; `trained`: whenever its weights could.
        content: of plan.json.
        config: what it trains.
    """

    key: str
    trained: str
    content: Mapping[str, Any]
    config: RunConfig


def plan_of(matrix: Matrix, cell: Cell, shared: Shared) -> Plan:
    """The plan of a cell.

    Raises:
        RecipeError: its folder holds a training of another recipe, from another parent or on other data.
    """
    config = matrix.cell_config(cell)
    check_recipe(cell, config)
    ranks, asked = matrix.config.devices_per_job, of_scoring(matrix)
    trained = digest(["training", _trained(asdict(config)), shared.parent, shared.training, ranks])
    begun = _json(cell.folder / BEGUN)
    if begun is not None and begun["trained"] != trained:
        raise RecipeError(
            f"{cell.folder}: its training began from another parent, on other data or with another number of devices; "
            "delete it to train the cell again, or choose another output_dir for the matrix"
        )
    dropped = None if cell.method == DENSE else of_brittleness(matrix)
    key = digest([trained, asked.decides(), None if dropped is None else dropped.decides(), dict(shared.questions)])
    content: dict[str, Any] = {
        "method": cell.method,
        "seed": cell.seed,
        "scoring": asked.as_json(),
        "without_top": None if dropped is None else dropped.as_json(),
        "ranks": ranks,
        "keep_model": matrix.config.keep_models,
        "trained": trained,
        "key": key,
    }
    return Plan(key, trained, content, config)


def write_plan(cell: Cell, plan: Plan) -> None:
    """Writes what a cell is asked to do into its folder."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    dump_resolved(plan.config, cell.folder / RECIPE)
    records.write_json(cell.folder / PLAN, dict(plan.content))


def check_recipe(cell: Cell, config: RunConfig) -> None:
    """Raises RecipeError where the folder of a cell holds a training of another recipe."""
    path = cell.run / RECIPE  # what was begun; the recipe beside the plan was only asked for
    if not path.is_file():
        return
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    differing = list(_differing(_trained(found), _trained(asdict(config)), ""))
    if differing:
        raise RecipeError(
            f"{cell.run}: holds a run of another recipe (different: {', '.join(differing[:4])}); choose another "
            f"output_dir for the matrix, or delete {cell.folder} to train the cell again"
        )


def mark_of(config: RunConfig) -> str:
    """Tells one state of the training data from another, without reading all of it: names, sizes and ends of files."""
    paths = [Path(source.path) for source in config.data.sources]
    paths += [Path(path) for path in (config.data.mixture, config.data.index) if path is not None]
    digest = hashlib.sha256()
    for path in paths:
        found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else _matching(path)
        for file in (file for file in found if file.is_file()):
            mark_file(digest, file)
    return digest.hexdigest()


def _matching(pattern: Path) -> list[Path]:
    return sorted(pattern.parent.glob(pattern.name)) if pattern.parent.is_dir() else []


def is_done(cell: Cell, key: str) -> bool:
    """Whether the cell has done what a plan with this key asks for."""
    return key_in(cell.folder / DONE) == key


def key_in(path: Path) -> str | None:
    """The key of the plan that a file was written for; None where it is not there."""
    found = _json(path)
    return None if found is None else str(found["key"])


def state_of(cell: Cell) -> str:
    """The step that a cell is at; `start` where it has not begun one."""
    found = _json(cell.folder / STATE)
    return "start" if found is None else str(found["step"])


def last_lines(cell: Cell, number: int = 12) -> str:
    """The end of what a cell's process printed."""
    path = cell.folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines[-number - 1 :] if line.strip())


def answers_of(cell: Cell, folder: str = SCORES) -> dict[str, dict[str, float]]:
    """By task, the credit in [0, 1] for each question of a finished cell.

    Raises:
        EvaluationError: a task does not judge single answers.
    """
    return answers_in(cell.folder / folder)


def answers_in(folder: Path) -> dict[str, dict[str, float]]:
    """The same of any folder that was scored into."""
    found: dict[str, dict[str, float]] = {}
    for sample in records.read_samples(folder):
        credits = found.setdefault(sample["task"], {})
        if sample["credit"] is not None:  # else the question counts elsewhere: MMBench's rotations
            credits[str(sample["id"])] = float(sample["credit"])
    if empty := [task for task, credits in found.items() if not credits]:
        raise EvaluationError(f"task {empty[0]!r} judges no single answers; leave it out of scoring.tasks")
    return found


@contextmanager
def only_here(folder: Path, wait: float | None = None) -> Iterator[None]:
    """Within it no other process works in a folder; the lock goes with the process, however that ends.

    Args:
        wait: seconds until another process must be gone; None gives one that is just being ended half a minute.

    Raises:
        RecipeError: another works there and does not end, or this system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise RecipeError("llava-moe compare needs Linux or macOS, whose file locks it works with") from error
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as handle:
        until = time.monotonic() + (_LOCK_WAIT if wait is None else wait)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise RecipeError(f"{folder}: another process works in it; wait for it or end it") from error
                time.sleep(0.2)
        yield


def with_parent(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to end with this one."""
    return {**environment, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone: nobody would read what it finds, and the matrix that is
    started next wants its folder. The parent is known from the environment: while this process was importing, it may
    already have got another."""
    parent = int(os.environ.get(_PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _json(path: Path) -> dict[str, Any] | None:
    """A file's content, None where it is not there."""
    if not path.is_file():
        return None
    found: dict[str, Any] = records.read_json(path)
    return found


def digest(content: Any) -> str:
    """Tells contents apart that can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _trained(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights: neither how fast, where images are checked, nor what is watched meanwhile."""
    kept = {key: value for key, value in config.items() if key not in ("telemetry", "scoring", "speed")}
    kept["data"] = {key: value for key, value in (config.get("data") or {}).items() if key != "check_images"}
    return kept


def _differing(one: Any, other: Any, prefix: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from _differing(one.get(key), other.get(key), f"{prefix}{key}.")
    elif not _same(one, other):
        yield prefix.rstrip(".")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    return list(one) == list(other) if isinstance(one, Sequence) and isinstance(other, Sequence) else bool(one == other)
