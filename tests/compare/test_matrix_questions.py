"""The questions of a matrix: a limit takes them evenly, subsets lie within the whole, and stale ones are made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from llava_moe.compare import questions
from llava_moe.evaluation import EvaluationError, records
from llava_moe.evaluation.tasks import LOCAL_TASKS
from tests.compare.matrices import make_matrix
from tests.evaluation.fakes import write_records


def ids(folder: Path, task: str = "local_gqa") -> list[str]:
    read = LOCAL_TASKS.get(task)
    return [row["id"] for row in records.read_rows(records.data_file(folder, read), read)]


def matrix_of(folder: Path, limit: int | None = None, **changes: Any) -> Any:
    scoring = {"data": str(folder / "records"), "tasks": ["local_gqa", "local_pope"], "limit": limit}
    return make_matrix(folder, scoring=scoring, **changes)


def test_without_limits_nothing_is_written(tmp_path: Path) -> None:
    write_records(tmp_path / "records")
    matrix = matrix_of(tmp_path, stability={"every": 2})
    questions.write(matrix)
    assert not (matrix.out / "questions").exists()
    assert questions.of_scoring(matrix).data == str(tmp_path / "records")
    assert questions.of_brittleness(matrix) == questions.of_scoring(matrix)


def test_a_limit_takes_questions_evenly_and_subsets_of_what_is_scored(tmp_path: Path) -> None:
    write_records(tmp_path / "records")
    matrix = matrix_of(
        tmp_path, 7, stability={"every": 2, "limit": 3}, brittleness={"limit": 2, "tasks": ["local_gqa"]}
    )
    questions.write(matrix)
    whole, dropped = Path(questions.of_scoring(matrix).data), questions.of_brittleness(matrix)
    assert dropped is not None
    assert ids(whole) == ["g0", "g1", "g2", "g4", "g5", "g7", "g8"]
    assert ids(matrix.questions(3)) == ["g0", "g2", "g5"]
    assert ids(Path(dropped.data)) == ["g0", "g4"]
    assert dropped.tasks == ("local_gqa",)
    assert ids(whole, "local_pope") == [f"p{i}" for i in (0, 1, 2, 4, 5, 7, 8)]
    scored = matrix.cell_config(matrix.cells[0]).scoring
    assert Path(scored.data) == matrix.questions(3)
    features = parquet.read_schema(tmp_path / "records/gqa.parquet").metadata
    assert parquet.read_schema(whole / "gqa.parquet").metadata == features  # pictures stay pictures


def test_questions_are_written_once_and_anew_when_their_source_changes(tmp_path: Path) -> None:
    write_records(tmp_path / "records")
    matrix = matrix_of(tmp_path, 4)
    questions.write(matrix)
    file = Path(questions.of_scoring(matrix).data) / "gqa.parquet"
    first = file.stat().st_mtime_ns
    questions.write(matrix)
    assert file.stat().st_mtime_ns == first
    table, hashed = parquet.read_table(tmp_path / "records/gqa.parquet"), questions.hashes(matrix)
    parquet.write_table(table.slice(1), tmp_path / "records/gqa.parquet")
    questions.write(matrix)
    assert ids(file.parent) == ["g1", "g3", "g5", "g7"]
    assert questions.hashes(matrix)["local_gqa"] != hashed["local_gqa"]
    assert questions.hashes(matrix)["local_pope"] == hashed["local_pope"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"gqa\.parquet"):
        questions.hashes(matrix_of(tmp_path))
