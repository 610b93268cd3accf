"""Scores a model that is in memory, in the process that trains it; `training/scoring.py` says when.

The questions, the prompts and the scorers are those of `llava-moe eval`, so a score of a run is the score of the
checkpoint that would be written at that moment.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError, records
from llava_moe.evaluation.machinery import offline, run_lmms_eval
from llava_moe.evaluation.run import check_tasks, score_answers
from llava_moe.evaluation.tasks import LOCAL_TASKS
from llava_moe.registry import near_misses


def check_local(tasks: Sequence[str]) -> None:
    """Admits local tasks only: the others fetch their data, and may ask a judge.

    Raises:
        EvaluationError: a task is not local.
    """
    for name in tasks:
        if name not in LOCAL_TASKS:
            raise EvaluationError(f"{name!r} is no local task; {near_misses(name, LOCAL_TASKS.names())}")


class LiveScorer:
    """Local tasks, checked and read once, for a model that changes.

    Args:
        data: folder with the tasks' parquet files.
        tasks: local tasks.
        batch_size: prompts answered together.
        limit: only the first so many records of each task.

    Raises:
        EvaluationError: a task is unknown, its file is missing, or a record in it is wrong.
    """

    def __init__(self, data: Path, tasks: Sequence[str], batch_size: int, limit: int | None) -> None:
        check_local(tasks)
        self.sources = check_tasks(tasks, data)
        self.rows = {name: records.read_rows(path, LOCAL_TASKS.get(name)) for name, path in self.sources.items()}
        self.arguments: dict[str, Any] = {"tasks": list(tasks), "batch_size": batch_size, "limit": limit}

    def score(self, model: Any, processor: Any, out: Path) -> dict[str, Any]:
        """Answers and scores; every rank must call it, and answers its share.

        The model is left in eval mode, and lmms-eval seeds the random generators: what must not change is the caller's
        to restore.

        Args:
            model: not wrapped for several ranks, in the dtype that it answers in.
            out: gets results.json, samples_TASK.jsonl and lmms_eval/.

        Returns:
            `tasks`, `families` and `seconds` as in results.json; empty on ranks other than 0.
        """
        from llava_moe.evaluation.lmms import LlavaMoe

        start = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        (out / records.RESULTS_FILE).unlink(missing_ok=True)  # of the same step before a crash
        with offline(active=True):
            adapter = LlavaMoe(model=model, processor=processor, batch_size=self.arguments["batch_size"])
            raw = run_lmms_eval(adapter, self.sources, out, self.arguments, silent=True)
        if raw is None:
            return {}
        results = {"arguments": self.arguments, **score_answers(raw, self.rows, out)}
        results["seconds"] = round(time.perf_counter() - start, 3)
        records.write_json(out / records.RESULTS_FILE, results)
        return results
