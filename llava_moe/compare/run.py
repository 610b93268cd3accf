"""Compares methods: trains and scores every method with every seed, then says what the differences show.

MATRIX.yaml names the methods; llava_moe/compare/matrix.py says how. A comparison that was interrupted goes on where it
stood; a failed cell is left out of the report and named in it, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_moe.compare import cells, costs, questions, reference
from llava_moe.compare.answers import Answers
from llava_moe.compare.costs import Planned
from llava_moe.compare.devices import machine, visible
from llava_moe.compare.matrix import DENSE, RANDOM, Cell, Matrix
from llava_moe.compare.outline import describe, plan
from llava_moe.compare.parent import is_there, make_parent
from llava_moe.compare.report import HTML, MARKDOWN, Failure, ReportInputs, write_report
from llava_moe.compare.schedule import Schedule
from llava_moe.compare.stats import analyse
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.run import versions
from llava_moe.training.data import check_plain, plain_sources
from llava_moe.training.preflight import check_image_folders

REPORT = "report"
CHECKED = "data_checked.json"  # that `check_plain` has looked at every picture, in the folder of a run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-moe compare`."""
    parser.add_argument("matrix", type=Path, help="a YAML file, e.g. under scripts/recipes/compare/")
    parser.add_argument(
        "overrides", nargs="*", help="dotted overrides of the matrix, e.g. seeds=[1] output_dir=runs/try"
    )
    parser.add_argument("--jobs", type=int, help="cells at the same time, in the place of the matrix's")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, the parameters and the time; do nothing"
    )
    parser.add_argument("--report-only", action="store_true", help="report on the cells that are done; train nothing")


def main(args: argparse.Namespace) -> None:
    """`llava-moe compare`."""
    overrides = [*args.overrides, *([] if args.jobs is None else [f"jobs={args.jobs}"])]
    matrix = Matrix(args.matrix, overrides)
    plans = plan(matrix)
    print(describe(matrix, plans, done_cells(matrix)), flush=True)
    if args.dry_run:
        return
    if args.report_only:
        failures = [
            Failure(cell.method, cell.seed, cells.state_of(cell), "not done yet") for cell in open_cells(matrix)
        ]
    else:
        with cells.only_here(matrix.out, wait=1.0):
            questions.hashes(matrix)  # files that are missing are told before the parent is made
            plain_sources(matrix.checked)
            make_parent(matrix)
            plans = plans or plan(matrix)  # now the parent is there to be counted
            failures = run_cells(matrix)
    _report(matrix, plans, failures)
    if failures:
        names = ", ".join(f"{failure.method} (seed {failure.seed})" for failure in failures)
        print(f"compare: {len(failures)} of {len(matrix.cells)} cells are missing: {names}", file=sys.stderr)
        sys.exit(1)


def _report(matrix: Matrix, plans: Mapping[str, Planned], failures: Sequence[Failure]) -> None:
    try:
        folder = report(matrix, plans, failures)
    except EvaluationError as error:
        if not failures:
            raise
        print(f"compare: no report: {error}", file=sys.stderr)  # what is missing is told, and is the cause
    else:
        print(f"compare: {folder / HTML} and {folder / MARKDOWN}", flush=True)


def open_cells(matrix: Matrix) -> list[Cell]:
    """The cells that are not done."""
    shared = shared_of(matrix)
    return [cell for cell in matrix.cells if not cells.is_done(cell, cells.plan_of(matrix, cell, shared).key)]


def done_cells(matrix: Matrix) -> list[Cell]:
    """The cells that need not run again; none while the parent or the questions are not here."""
    if not any((cell.folder / cells.DONE).is_file() for cell in matrix.cells) or not is_there(matrix):
        return []
    todo = set(open_cells(matrix))
    return [cell for cell in matrix.cells if cell not in todo]


def shared_of(matrix: Matrix) -> cells.Shared:
    """What all cells depend on, by content.

    Raises:
        CheckpointError, EvaluationError: the parent or a file of questions is missing.
    """
    from llava_moe.model.assemble import check_checkpoint, fingerprint

    parent = fingerprint(check_checkpoint(matrix.config.parent.checkpoint))
    return cells.Shared(parent, cells.mark_of(matrix.checked), questions.hashes(matrix))


def run_cells(matrix: Matrix) -> list[Failure]:
    """Runs what is not done; the cells that have failed.

    Raises:
        RecipeError, DataError, EvaluationError: the training data or the questions are missing or wrong, or the folder
            of a cell holds another one. Nothing was computed yet.
    """
    shared = shared_of(matrix)
    plans = {cell: cells.plan_of(matrix, cell, shared) for cell in matrix.cells}
    todo = [cell for cell, found in plans.items() if not cells.is_done(cell, found.key)]
    questions.write(matrix)
    if todo:
        _check_data(matrix, todo)
    reference.score_parent(matrix, shared)
    for cell in todo:
        cells.write_plan(cell, plans[cell])
    config = matrix.config
    devices = config.devices or visible() or None
    return Schedule(todo, config.jobs, devices, len(matrix.cells) - len(todo), config.devices_per_job).run()


def _check_data(matrix: Matrix, todo: Sequence[Cell]) -> None:
    """Decodes every picture of plain training data once for all cells. Other data are checked where a cell makes its
    index, as mixtures are drawn by the seed; with data.index that is done before."""
    config = matrix.checked
    plain = plain_sources(config)
    check_image_folders(config)
    if plain is None or not config.data.check_images:
        return
    check_plain(config, plain)
    for cell in todo:
        known = cell.run / CHECKED
        if not known.is_file() or known.read_bytes() != (matrix.out / CHECKED).read_bytes():
            cell.run.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(matrix.out / CHECKED, known)


def report(matrix: Matrix, plans: Mapping[str, Planned], failures: Sequence[Failure]) -> Path:
    """Writes the report on the cells that are done, and returns its folder.

    Raises:
        EvaluationError: a control has no finished cell, so that there is nothing to compare with.
    """
    missing = {(failure.method, failure.seed) for failure in failures}
    done = [cell for cell in matrix.cells if (cell.method, cell.seed) not in missing]
    answers = {(cell.method, cell.seed): cells.answers_of(cell) for cell in done}
    names = list(dict.fromkeys(task for found in answers.values() for task in found))
    tables = [
        Answers.from_cells(
            task, {name: found[task] for name, found in answers.items()}, list(matrix.methods), matrix.seeds
        )
        for task in names
    ]
    analysis = analyse(tables, DENSE, RANDOM, reference.answers_of(matrix, shared_of(matrix)))
    far = costs.unmatched(matrix, plans) if plans else []
    facts = {
        name: costs.facts_of(matrix, name, plans.get(name), name in far, [c for c in done if c.method == name])
        for name in matrix.methods
    }
    inputs = ReportInputs(
        title=matrix.config.title,
        analysis=analysis,
        methods=facts,
        facts=_facts(matrix),
        failures=failures,
        notices=_notices(matrix, plans),
    )
    folder = matrix.out / REPORT
    write_report(folder, inputs)
    return folder


def _facts(matrix: Matrix) -> dict[str, str]:
    config = matrix.cell_config(matrix.cells[0])
    train = config.train
    batch = f"{train.get('per_device_train_batch_size', 8)} x {train.get('gradient_accumulation_steps', 1)}"
    limit = int(train.get("max_steps", -1))
    steps = str(limit) if limit > 0 else f"{train.get('num_train_epochs', 3)} epochs"
    return {
        "matrix": str(matrix.path),
        "parent": matrix.config.parent.checkpoint,
        "training data": ", ".join(source.path for source in config.data.sources)
        or str(config.data.mixture or config.data.index),
        "steps": f"{steps}, {batch} x {matrix.config.devices_per_job} samples each (device x accumulation x devices)",
        "seeds": ", ".join(map(str, matrix.seeds)),
        "machine": f"{machine()}, {matrix.config.jobs} cells at a time",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _notices(matrix: Matrix, plans: Mapping[str, Planned]) -> list[str]:
    found, config = [], matrix.config
    if config.scoring.limit is not None:
        found.append(f"Only {config.scoring.limit} questions of each task were asked.")
    if config.brittleness is not None and (config.brittleness.tasks or config.brittleness.limit is not None):
        tasks = ", ".join(config.brittleness.tasks or config.scoring.tasks)
        limit = "" if config.brittleness.limit is None else f"{config.brittleness.limit} questions of each of "
        found.append(f"The scores without the top expert are of {limit}{tasks}, intact and without alike.")
    if plans and abs(costs.excess(plans, DENSE)) > config.active_tolerance:
        found.append(
            f"The dense control's active parameters differ from the random router's by "
            f"{costs.excess(plans, DENSE):+.1f} % (embeddings and tower left out): methods with experts have more to "
            "compute with than the dense control, and a difference to it is not one of routing alone."
        )
    if config.jobs > 1:
        found.append(f"{config.jobs} cells ran at the same time: step times hold for that load.")
    return found
