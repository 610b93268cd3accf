"""What the methods of a matrix cost: planned before anything is computed, and measured by the runs afterwards."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_moe.compare.cells import DONE, DROPPED, MEMORY, PLAN, WITHOUT_TOP, answers_of
from llava_moe.compare.matrix import DENSE, RANDOM, Cell, Matrix
from llava_moe.compare.report import MethodFacts
from llava_moe.config import RecipeError, RunConfig
from llava_moe.evaluation import records
from llava_moe.moe import LayerPlan, MlpSpec, build_layer
from llava_moe.training.dry_run import outlook
from llava_moe.training.metrics import read_metrics

# A block of usual kind and size, for what can be checked before the parent is known.
_USUAL = MlpSpec(
    1024, 4096, "silu", gated=True, bias=False, gate_name="gate_proj", up_name="up_proj", down_name="down_proj"
)
# Of the active parameters, what methods may differ in: a large vocabulary or tower would hide any difference.
_COMMON = ("embeddings", "vision_tower")
_BALANCE_ROWS = 0.25  # the last quarter of the rows is "the end" of a training: one row alone is noise


@dataclass(frozen=True)
class Planned:
    """What a method needs, by its config alone.

    Attributes:
        total, active: parameters in all, and those that one token meets.
        compared: active ones without embeddings and tower.
        flops: of a token in the decoder, attention included.
        steps, samples: optimiser steps (None where epochs decide), and samples of one.
    """

    total: int
    active: int
    compared: int
    flops: float
    steps: int | None
    samples: int


def planned(matrix: Matrix, method: str) -> Planned | None:
    """Counts a method; None while a config of the parent's parts is not on this machine.

    Raises:
        RecipeError, ValueError: the recipe of the method would be refused.
    """
    config = matrix.cell_config(matrix.cell(method, matrix.seeds[0]))
    try:
        found = outlook(str(matrix.recipe), config)
    except ValueError as error:
        raise RecipeError(f"{matrix.path}: methods.{method}: {error}") from error
    if found.counts is None or found.work is None:
        _check_layers(matrix, method, config)
        return None
    common = sum(part.active for name, part in found.counts.parts.items() if name.split(".")[0] in _COMMON)
    steps = config.train.get("max_steps")
    return Planned(
        total=found.counts.total,
        active=found.counts.active,
        compared=found.counts.active - common,
        flops=found.work.decoder + found.work.attention,
        steps=int(steps) if steps and int(steps) > 0 else None,
        samples=found.samples // found.setup.devices,  # a cell has one device, whatever the recipe is meant for
    )


def _check_layers(matrix: Matrix, method: str, config: RunConfig) -> None:
    """Builds one layer of the decoder for a block of usual kind and size: what is wrong whatever the parent will be.

    Raises:
        RecipeError: a name or an option is refused.
    """
    part = None if config.upcycle is None else config.upcycle.decoder
    if part is None:
        return
    number = part.num_experts if isinstance(part.num_experts, int) else max(part.num_experts)
    layer = LayerPlan(
        number, part.router.name, part.router.args, part.experts.name, part.experts.args, part.shared, part.capacity
    )
    try:
        with torch.device("meta"):
            build_layer(layer, _USUAL)
    except ValueError as error:
        raise RecipeError(f"{matrix.path}: methods.{method}: upcycle.decoder: {error}") from error


def excess(plans: Mapping[str, Planned], method: str) -> float:
    """By how many percent a method's active parameters differ from those of the random router."""
    control = plans[RANDOM].compared
    return 100.0 * (plans[method].compared - control) / control


def unmatched(matrix: Matrix, plans: Mapping[str, Planned]) -> list[str]:
    """The methods with experts whose active parameters differ by more than the matrix allows.

    The dense control is no such method: that a token meets more than one expert is what upcycling brings, and the
    report says by how much.

    Raises:
        RecipeError: there are some, and the matrix does not let them pass.
    """
    limit = matrix.config.active_tolerance
    found = [name for name in plans if name != DENSE and abs(excess(plans, name)) > limit]
    if found and not matrix.config.allow_unequal_active:
        named = ", ".join(f"{name} by {excess(plans, name):+.1f} %" for name in found)
        raise RecipeError(
            f"{matrix.path}: active parameters (without embeddings and tower) differ from the random router's by more "
            f"than active_tolerance={limit:g} %: {named}; match them by num_experts, k, shared or the experts' width, "
            "or set allow_unequal_active: true, which marks them in the report"
        )
    return found


def facts_of(
    matrix: Matrix, method: str, plan: Planned | None, is_unmatched: bool, cells: Sequence[Cell]
) -> MethodFacts:
    """What the finished cells of a method have cost and how their training went."""
    rows = {cell.seed: read_metrics(cell.run) for cell in cells}
    every = [row for of_seed in rows.values() for row in of_seed]
    return MethodFacts(
        about=matrix.methods[method].about,
        parameters=None if plan is None else plan.total,
        active_parameters=None if plan is None else plan.active,
        unmatched=is_unmatched,
        flops_per_token=None if plan is None else plan.flops,
        seconds_per_step=statistics.median(row["seconds_per_step"] for row in every) if every else None,
        peak_memory_gib=max(
            (peak for cell in cells if (peak := _peak(cell, rows[cell.seed])) is not None), default=None
        ),
        max_violation=_at_the_end(rows, "max_violation"),
        entropy=_at_the_end(rows, "entropy_share"),
        losses={seed: [(row["step"], row["cross_entropy"]) for row in of_seed] for seed, of_seed in rows.items()},
        checkpoints={
            seed: [(row["step"], statistics.fmean(row["scores"].values())) for row in of_seed if row.get("scores")]
            for seed, of_seed in rows.items()
            if any(row.get("scores") for row in of_seed)
        },
        without_top={cell.seed: pair for cell in cells if (pair := without_top_of(cell)) is not None},
    )


def _peak(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest memory of a training. On a CPU its rows tell that of the process, upcycling included; memory.json is
    of the training alone, where the system can tell."""
    if (cell.folder / MEMORY).is_file():
        return float(records.read_json(cell.folder / MEMORY)["peak_memory_gib"])
    return max((row["peak_memory_gib"] for row in rows), default=None)


def _at_the_end(rows: Mapping[int, Sequence[Mapping[str, Any]]], key: str) -> float | None:
    """Mean over the seeds, the layers and the last rows of each; None where no layer has the number."""
    values = []
    for of_seed in rows.values():
        last = of_seed[-max(1, round(len(of_seed) * _BALANCE_ROWS)) :]
        found = [layer[key] for row in last for layer in row.get("layers", {}).values() if layer.get(key) is not None]
        if found:
            values.append(statistics.fmean(found))
    return statistics.fmean(values) if values else None


def without_top_of(cell: Cell) -> tuple[float, float] | None:
    """Score of a cell and its score without each token's top expert on the same questions, means over tasks; None where
    that means nothing: not asked for, answers of an earlier plan, a dense model, or layers that assign no tokens."""
    plan, marker = records.read_json(cell.folder / PLAN), cell.folder / WITHOUT_TOP / DROPPED
    if plan["without_top"] is None or not marker.is_file():
        return None
    found = records.read_json(marker)
    if found["key"] != plan["key"] or not found["dropped"]:
        return None
    without = answers_of(cell, WITHOUT_TOP)
    intact = {
        task: {question: found[question] for question in without[task]}
        for task, found in answers_of(cell).items()
        if task in without
    }
    return mean_of(intact), mean_of(without)


def mean_of(answers: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over tasks of the mean credit for a question."""
    return statistics.fmean(statistics.fmean(task.values()) for task in answers.values())


def seconds_of(cell: Cell) -> float | None:
    """What a finished cell took, all its steps together; None where its last process found it trained, or trained it
    to the end only."""
    path: Path = cell.folder / DONE
    found = records.read_json(path) if path.is_file() else None
    return sum(found["seconds"].values()) if found is not None and found["whole"] else None
