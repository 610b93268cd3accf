"""The questions of a matrix: which every cell answers, which it answers while it trains, and which without top experts.

A limit takes questions of a local task evenly over its file, whose records often stand family by family, and the first
of any other task. Those that are asked while training and without top experts are taken out of those of `scoring`, so
that an intact answer to each of them is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from llava_moe.compare.matrix import Matrix
from llava_moe.config import RecipeError
from llava_moe.evaluation import EvaluationError, mirror, records
from llava_moe.evaluation.live import check_local
from llava_moe.evaluation.run import check_tasks
from llava_moe.evaluation.suites import BENCHMARKS, check_limit, expand
from llava_moe.evaluation.tasks import LOCAL_TASKS

_FACTS = "facts.json"


@dataclass(frozen=True)
class Asked:
    """What one scoring of a checkpoint asks: arguments of `llava_moe.evaluation.run.evaluate`.

    Attributes:
        tasks: names.
        data: folder of the local tasks; `mirror`: of the others.
        limit: of each task; None asks all.
        batch_size, dtype: how they are answered.
    """

    tasks: tuple[str, ...]
    data: str | None
    mirror: str | None
    limit: int | None
    batch_size: int
    dtype: str

    def as_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self) | {"tasks": list(self.tasks)}

    def decides(self) -> list[Any]:
        """What decides which answers there are; the data are hashed by content elsewhere."""
        return [list(self.tasks), self.limit, self.dtype]


def of_scoring(matrix: Matrix) -> Asked:
    """What every trained model is asked."""
    asked = matrix.config.scoring
    return _asked(matrix, asked.tasks, asked.limit)


def of_brittleness(matrix: Matrix) -> Asked | None:
    """What models with experts are asked once more without each token's top expert; None where nothing is."""
    found, asked = matrix.config.brittleness, matrix.config.scoring
    return None if found is None else _asked(matrix, found.tasks or asked.tasks, found.limit or asked.limit)


def _asked(matrix: Matrix, tasks: Sequence[str], limit: int | None) -> Asked:
    asked = matrix.config.scoring
    folder = None if asked.data is None else str(matrix.questions(limit))
    return Asked(tuple(expand(tasks)), folder, asked.mirror, limit, asked.batch_size, asked.dtype)


def check(matrix: Matrix) -> None:
    """What can be said of the tasks without their data.

    Raises:
        RecipeError: a task is unknown or cannot be compared, a limit cannot be, or a local task has no folder.
    """
    config, where = matrix.config, matrix.path
    tasks = expand(config.scoring.tasks)
    for name in tasks:
        if name not in BENCHMARKS or BENCHMARKS.get(name).credit is None or BENCHMARKS.get(name).judge != "none":
            fit = [n for n in BENCHMARKS.names() if BENCHMARKS.get(n).credit and BENCHMARKS.get(n).judge == "none"]
            raise RecipeError(
                f"{where}: scoring.tasks: {name!r} is not scored question by question without a judge, which the tests "
                f"need; use {', '.join(fit)}"
            )
    local = [name for name in tasks if name in LOCAL_TASKS]
    if local and config.scoring.data is None:
        raise RecipeError(f"{where}: scoring.data must name the folder with the records of {local[0]}")
    dropped = config.brittleness
    if foreign := [name for name in expand(dropped.tasks) if name not in tasks] if dropped and dropped.tasks else []:
        raise RecipeError(
            f"{where}: brittleness.tasks: {foreign[0]!r} is not among scoring.tasks, and the intact model answers those"
        )
    try:
        check_limit(tasks, config.scoring.limit)
        check_limit(tasks, None if dropped is None else dropped.limit)
        if config.stability is not None:
            check_local(config.stability.tasks)
            if not config.stability.tasks and not local:
                raise RecipeError(f"{where}: stability.tasks: name local tasks, as scoring.tasks has none")
    except EvaluationError as error:
        raise RecipeError(f"{where}: {error}") from error


def hashes(matrix: Matrix) -> dict[str, str]:
    """By task what tells its records apart: the hash of a local file, of others revision and rows in the mirror.

    Raises:
        EvaluationError: a file is missing.
    """
    asked, tasks = matrix.config.scoring, expand(matrix.config.scoring.tasks)
    sources = check_tasks(tasks, None if asked.data is None else Path(asked.data))
    found = {name: records.sha256_of([path]) for name, path in sources.items()}
    others = [name for name in tasks if name not in sources]
    if others and asked.mirror is not None:
        for one in mirror.check(Path(asked.mirror), others):
            found[one.task] = f"{found.get(one.task, '')} {one.source} {one.rows} {one.revision}"
    return found


def write(matrix: Matrix) -> None:
    """Writes the folders of questions that are not there yet.

    Raises:
        EvaluationError: a file is missing or cannot be read.
    """
    config = matrix.config
    if config.scoring.data is None:
        return
    limits = [config.scoring.limit]
    limits += [section.limit for section in (config.stability, config.brittleness) if section is not None]
    for number, limit in enumerate(limits):
        folder = matrix.questions(limit)
        source = Path(config.scoring.data) if number == 0 else matrix.questions(None)
        if limit is not None and folder != source:
            _write_folder(folder, source, limit, _local_tasks(matrix))


def _local_tasks(matrix: Matrix) -> list[str]:
    named = [*expand(matrix.config.scoring.tasks), *(matrix.config.stability.tasks if matrix.config.stability else [])]
    return [name for name in dict.fromkeys(named) if name in LOCAL_TASKS]


def _write_folder(folder: Path, source: Path, limit: int, tasks: Sequence[str]) -> None:
    files = [records.data_file(source, LOCAL_TASKS.get(name)) for name in tasks]
    facts = {"limit": limit, "files": {file.name: records.sha256_of([file]) for file in files}}
    known = folder / _FACTS
    if known.is_file() and json.loads(known.read_text(encoding="utf-8")) == facts:
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in files:
        table = parquet.read_table(file)
        number = min(limit, table.num_rows)
        parquet.write_table(table.take([i * table.num_rows // number for i in range(number)]), partial / file.name)
    records.write_json(partial / _FACTS, facts)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
