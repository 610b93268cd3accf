"""What a matrix would do, before it does it: checks, parameters and time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_moe.compare import cells, costs, questions
from llava_moe.compare.costs import Planned
from llava_moe.compare.devices import visible
from llava_moe.compare.matrix import DENSE, Cell, Matrix
from llava_moe.compare.parent import check_parent, is_there
from llava_moe.config import RecipeError, load_recipe
from llava_moe.training.metrics import read_metrics

_SECONDS_PER_FLOP = 1 / 2.0e10  # of two busy CPU cores, for a first guess of the time only


def plan(matrix: Matrix) -> dict[str, Planned]:
    """Checks the matrix as far as that is possible without computing; the counts of the methods, empty where the
    configs of the parent's parts are not here yet.

    Raises:
        RecipeError, EvaluationError: something would be refused later, or active parameters do not match.
    """
    questions.check(matrix)
    check_parent(matrix)
    _check_brittleness(matrix)
    for cell in matrix.cells:
        cells.check_recipe(cell, matrix.cell_config(cell))
    config, needed = matrix.config, matrix.config.jobs * matrix.config.devices_per_job
    if config.devices is None and needed > 1 and 0 < len(visible()) < needed:
        raise RecipeError(
            f"{matrix.path}: jobs={config.jobs} with devices_per_job={config.devices_per_job} need {needed} GPUs, but "
            f"{len(visible())} are visible"
        )
    found = {name: costs.planned(matrix, name) for name in matrix.methods}
    plans = {name: one for name, one in found.items() if one is not None}
    if len(plans) < len(found):
        return {}
    costs.unmatched(matrix, plans)
    return plans


def _check_brittleness(matrix: Matrix) -> None:
    """Raises RecipeError where the top expert of a token would have nobody to take over."""
    if matrix.config.brittleness is None:
        return
    for name in matrix.methods:
        upcycling = matrix.cell_config(matrix.cell(name, matrix.seeds[0])).upcycle
        for part, section in ({} if upcycling is None else upcycling.parts()).items():
            numbers = [section.num_experts] if isinstance(section.num_experts, int) else section.num_experts
            if min(numbers) < 2:
                raise RecipeError(
                    f"{matrix.path}: methods.{name}: upcycle.{part} has a layer with a single expert, without which "
                    "nobody could answer; give it two, or set brittleness: null"
                )


def describe(matrix: Matrix, plans: Mapping[str, Planned], finished: Sequence[Cell] = ()) -> str:
    """The plan in lines.

    Args:
        matrix: what is planned.
        plans: of `plan`.
        finished: cells that need not run again.
    """
    config = matrix.config
    count, done = len(matrix.cells), len(finished)
    asked = [f"tasks {', '.join(config.scoring.tasks)} from {config.scoring.data}"]
    asked += [f"{config.scoring.limit} questions of each"] if config.scoring.limit is not None else []
    made = "" if is_there(matrix) else f", made first by {', '.join(map(str, matrix.parent_recipes))}"
    lines = [
        f"compare: {config.title} ({matrix.path})",
        f"  {len(matrix.methods)} methods x {len(matrix.seeds)} seeds = {count} cells in {matrix.out}, {done} done; "
        f"{config.jobs} at a time",
        f"  parent {config.parent.checkpoint}{made}",
        f"  {', '.join(asked)}",
    ]
    if not plans:
        return "\n".join([*lines, "  parameters and time: unknown until the parent's parts are here"])
    lines.append(f"  {'method':<24}{'total':>14}{'active':>14}{'to random':>11}{'GFLOPs/token':>14}")
    far = costs.unmatched(matrix, plans)
    for name, one in plans.items():
        mark = "  UNMATCHED" if name in far else ""
        share = f"{costs.excess(plans, name):+.1f} %"
        lines.append(f"  {name:<24}{one.total:>14,}{one.active:>14,}{share:>11}{one.flops / 1e9:>14.4f}{mark}")
    lines.append("  to random: active parameters without embeddings and tower, against those of the random router")
    return "\n".join([*lines, f"  {estimate(matrix, plans, finished)}"])


def estimate(matrix: Matrix, plans: Mapping[str, Planned], finished: Sequence[Cell] = ()) -> str:
    """The time that is left: by cells that have ended, by the steps of the parent's training, or by arithmetic."""
    took = [seconds for cell in finished if (seconds := costs.seconds_of(cell)) is not None]
    left = len(matrix.cells) - len(finished)
    if not left:
        return "time left: none, but for the report"
    if took:
        seconds = left * sum(took) / len(took) / matrix.config.jobs
        return f"time left: about {seconds / 60:.0f} min, by {len(took)} cells that are done"
    if any(one.steps is None for one in plans.values()):
        return "time: told once a cell has ended, as epochs and not train.max_steps say how long one trains"
    seeds, measured = len(matrix.seeds), _parent_step(matrix)
    if measured is not None:
        step, samples = measured
        dense = plans[DENSE].flops
        seconds = sum(step * (one.steps or 0) * one.samples / samples * one.flops / dense for one in plans.values())
        text = f"time: about {seconds * seeds / 60:.0f} min of training, by the parent's step of {step:.2f} s and FLOPs"
        return f"{text}; upcycling and scoring come on top"
    length = matrix.cell_config(matrix.cells[0]).data.max_length
    work = sum(3 * one.flops * (one.steps or 0) * one.samples * length for one in plans.values()) * seeds
    if visible():
        return f"training: at most {work:.3g} FLOPs; the time is told once a cell has ended"
    minutes = work * _SECONDS_PER_FLOP / 60
    return f"time: at most {minutes:.0f} min of training at 20 GFLOP/s with rows of full length, and the scoring"


def _parent_step(matrix: Matrix) -> tuple[float, int] | None:
    """Median seconds of a step of the parent's training, and its samples; None where it was not trained here."""
    run = Path(matrix.config.parent.checkpoint).parent
    if not (run / cells.RECIPE).is_file() or not (run / "metrics.jsonl").is_file():
        return None
    rows, train = read_metrics(run), load_recipe(run / cells.RECIPE).train
    if not rows:
        return None
    samples = int(train.get("per_device_train_batch_size", 8)) * int(train.get("gradient_accumulation_steps", 1))
    return statistics.median(row["seconds_per_step"] for row in rows), samples
