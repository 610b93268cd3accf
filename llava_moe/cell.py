"""The processes of `llava-moe compare`.

    python -m llava_moe.cell cell FOLDER        one cell: upcycle, train, score, and score without the top experts
    python -m llava_moe.cell step FOLDER NAME   a step of it as one of several ranks
    python -m llava_moe.cell train RECIPE       one rank of a training of the shared parent
    python -m llava_moe.cell parent FOLDER      one rank of its scoring

They are started by llava_moe/compare and end with it; FOLDER holds plan.json and recipe.yaml.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_moe.compare import cells
from llava_moe.compare.ranks import run_ranks
from llava_moe.config import RunConfig, load_recipe
from llava_moe.evaluation import records

Plan = dict[str, Any]
UPCYCLE, TRAIN, SCORE, WITHOUT_TOP = "upcycle", "train", "score", "score without the top expert"


def run(folder: Path) -> None:
    """Does what is not done yet of the plan in the folder; done.json comes last.

    Raises:
        SystemExit: a step that ran in several ranks has failed, or was asked to stop.
    """
    plan, config = _plan(folder), load_recipe(folder / cells.RECIPE)
    is_new = not (folder / cells.BEGUN).is_file()
    names = [SCORE, *([WITHOUT_TOP] if plan["without_top"] is not None else [])]
    if not _is_trained(folder, plan, config):
        records.write_json(folder / cells.BEGUN, {"trained": plan["trained"]})
        names = [*([UPCYCLE] if config.upcycle is not None else []), TRAIN, *names]
    spent: dict[str, float] = {}
    computed: dict[str, float] = {}
    for name in names:
        if name == WITHOUT_TOP and not _begin_without_top(folder, plan):
            continue
        if name == SCORE and config.upcycle is not None:
            # as large as the model, and made again alike should it ever be asked for
            shutil.rmtree(str(config.model.checkpoint), ignore_errors=True)
        records.write_json(folder / cells.STATE, {"step": name})
        start, begun = time.perf_counter(), _cpu_seconds()
        if plan["ranks"] > 1 and name != UPCYCLE:
            code = run_ranks([sys.executable, "-m", "llava_moe.cell", "step", str(folder), name], plan["ranks"])
            if code:
                sys.exit(code)
        else:
            step(folder, name)
        spent[name], computed[name] = round(time.perf_counter() - start, 2), round(_cpu_seconds() - begun, 2)
    found = {"key": plan["key"], "whole": is_new, "seconds": spent, "cpu_seconds": computed}
    records.write_json(folder / cells.DONE, found)
    if not plan["keep_model"]:
        shutil.rmtree(_model(config))


def step(folder: Path, name: str) -> None:
    """One step of a cell, in this process or as one of its ranks."""
    steps: dict[str, Callable[[Path, Plan, RunConfig], None]] = {
        UPCYCLE: _upcycle,
        TRAIN: _train,
        SCORE: _score,
        WITHOUT_TOP: _without_top,
    }
    steps[name](folder, _plan(folder), load_recipe(folder / cells.RECIPE))


def score_parent(folder: Path) -> None:
    """The parent's answers to what plan.json asks, into the folder."""
    plan = _plan(folder)
    _evaluate(Path(plan["checkpoint"]), plan["scoring"], folder / cells.SCORES)


def _plan(folder: Path) -> Plan:
    found: Plan = json.loads((folder / cells.PLAN).read_text(encoding="utf-8"))
    return found


def _model(config: RunConfig) -> Path:
    return Path(config.output_dir) / "model"


def _is_trained(folder: Path, plan: Plan, config: RunConfig) -> bool:
    """Whether the weights that the plan asks for are there."""
    begun = folder / cells.BEGUN
    if not begun.is_file() or json.loads(begun.read_text(encoding="utf-8"))["trained"] != plan["trained"]:
        return False
    return (_model(config).parent / "done.json").is_file() and (_model(config) / "config.json").is_file()


def _upcycle(folder: Path, plan: Plan, config: RunConfig) -> None:
    from llava_moe.upcycle import run as upcycle

    upcycle(str(folder / cells.RECIPE))


def _train(folder: Path, plan: Plan, config: RunConfig) -> None:
    import torch

    from llava_moe.train import run as train
    from llava_moe.training.distributed import rank

    is_measured = not torch.cuda.is_available() and _forget_peak()
    train(str(folder / cells.RECIPE))
    if rank() != 0:
        return
    if is_measured:
        records.write_json(folder / cells.MEMORY, {"peak_memory_gib": round(_peak_gib(), 4)})
    gc.collect()  # the optimiser's state goes before another copy of the model is loaded to answer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _score(folder: Path, plan: Plan, config: RunConfig) -> None:
    _evaluate(_model(config), plan["scoring"], folder / cells.SCORES)


def _begin_without_top(folder: Path, plan: Plan) -> bool:
    """False where it is done already; else answers of another plan are gone, which must not be taken for ours."""
    out = folder / cells.WITHOUT_TOP
    if cells.key_in(out / cells.DROPPED) == plan["key"]:
        return False
    if cells.key_in(out / cells.BEGUN) != plan["key"]:
        shutil.rmtree(out, ignore_errors=True)
    return True


def _without_top(folder: Path, plan: Plan, config: RunConfig) -> None:
    """dropped.json says that the answers beside it are whole, of which plan, and whether any expert was dropped.

    begun.json is written when a layer loses its top experts for the first time: a start that finds all answers of an
    earlier one calls no layer.
    """
    from llava_moe.compare.brittleness import top_expert_dropped
    from llava_moe.training.distributed import rank

    out = folder / cells.WITHOUT_TOP
    key = {"key": plan["key"]}
    with top_expert_dropped(lambda: records.write_json(out / cells.BEGUN, key) if rank() == 0 else None):
        _evaluate(_model(config), plan["without_top"], out, "top expert dropped")
    if rank() == 0:
        records.write_json(out / cells.DROPPED, key | {"dropped": (out / cells.BEGUN).is_file()})


def _evaluate(model: Path, asked: Plan, out: Path, variant: str = "") -> None:
    from llava_moe.evaluation.run import evaluate

    evaluate(
        model,
        _path(asked["data"]),
        asked["tasks"],
        out,
        batch_size=asked["batch_size"],
        limit=asked["limit"],
        dtype=asked["dtype"],
        mirror=_path(asked["mirror"]),
        variant=variant,
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _cpu_seconds() -> float:
    """Of all cores, of this process and the ranks that have ended: what a step costs on a busy machine too."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def _forget_peak() -> bool:
    """Makes Linux forget the largest memory of this process so far: upcycling's is not training's. False elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_gib() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def _main(arguments: list[str]) -> None:
    cells.end_with_parent()
    if arguments[0] == "train":
        from llava_moe.train import run as train

        train(arguments[1])
    elif arguments[0] == "parent":
        score_parent(Path(arguments[1]))
    elif arguments[0] == "step":
        step(Path(arguments[1]), arguments[2])
    else:
        with cells.only_here(Path(arguments[1])):
            run(Path(arguments[1]))


if __name__ == "__main__":
    from llava_moe.cli import exit_on_user_error
    from llava_moe.training import distributed

    with exit_on_user_error():
        _main(sys.argv[1:])
    if distributed.launched():
        distributed.leave(0)
