"""The local tasks: records on disk in the schemas of GQA, POPE and MMBench, scored by lmms-eval's official functions.

Beside each YAML stands one `LocalTask`: which file holds the records, which columns they must have, and how one logged
sample is judged. The wrapper checks that these judgements add up to the official score of the whole task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_moe.registry import Registry

TASKS_FOLDER = Path(__file__).parent
SPLIT = "test"
COMMON_COLUMNS = ("id", "family", "image", "question", "answer")


@dataclass(frozen=True)
class LocalTask:
    """How one local task is stored and judged.

    Attributes:
        name: task name, as in the YAML.
        file: the parquet file's name inside the data folder.
        columns: columns that a record must have beside `COMMON_COLUMNS`.
        allowed_answers: the answers that the official score admits, or None for open questions.
        metric: the official metric that is the task's score.
        scale: what a perfect score is in the official metric (1 or 100).
        is_correct: tells from a logged sample of lmms-eval whether the answer counts as correct.
    """

    name: str
    file: str
    columns: tuple[str, ...]
    allowed_answers: frozenset[str] | None
    metric: str
    scale: float
    is_correct: Callable[[dict[str, Any]], bool]

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Every column that a record of this task must have."""
        return COMMON_COLUMNS + self.columns


def _gqa_is_correct(sample: dict[str, Any]) -> bool:
    return bool(sample["exact_match"])


def _pope_is_correct(sample: dict[str, Any]) -> bool:
    return bool(sample["pope_accuracy"]["score"])


def _mmbench_is_correct(sample: dict[str, Any]) -> bool:
    import pandas
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    row = sample["gpt_eval_score"]
    frame = pandas.DataFrame([row])
    return bool(mmbench_evaluator.eval_sub_data(frame, {row["index"]: row["answer"]}, static_only=True))


LOCAL_TASKS: Registry[LocalTask] = Registry("local task")
LOCAL_TASKS.register("local_gqa", LocalTask("local_gqa", "gqa.parquet", (), None, "exact_match", 1.0, _gqa_is_correct))
LOCAL_TASKS.register(
    "local_pope",
    LocalTask(
        "local_pope",
        "pope.parquet",
        ("question_id",),
        frozenset({"yes", "no"}),
        "pope_accuracy",
        1.0,
        _pope_is_correct,
    ),
)
LOCAL_TASKS.register(
    "local_mmbench",
    LocalTask(
        "local_mmbench",
        "mmbench.parquet",
        ("index", "hint", "source", "split", "category", "L2-category", "A", "B", "C", "D"),
        frozenset("ABCD"),
        "gpt_eval_score",
        100.0,
        _mmbench_is_correct,
    ),
)
