"""Samples that break while a run trains: refused with one line, or left out and counted to the end.

What broke comes with the batch (`data/broken.py`), so it is known here for whatever worker and rank has read it. The
counts are in every checkpoint, so that a run that was interrupted tells of all its parts.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava_moe.data.broken import KEY
from llava_moe.data.schema import DataError
from llava_moe.training import distributed

FILE = "skipped.json"
REPORTED = "skipped_in_training"
_SHOWN = 10


class Skips(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Counts the broken samples of a run, by what is wrong with them.

    Attributes:
        policy: "refuse" ends the run at the first one, "skip" counts.
    """

    def __init__(self, policy: str = "refuse") -> None:
        self.policy = policy
        self._own: Counter[str] = Counter()  # of this rank, since the process began
        self._earlier: Counter[str] = Counter()  # of all ranks, up to the checkpoint that the run goes on from
        self._total: Counter[str] = Counter()

    def take(self, batch: dict[str, Any]) -> None:
        """Takes what broke out of a batch.

        Raises:
            DataError: something did, and the policy is "refuse".
        """
        messages = batch.pop(KEY, [])
        if messages and self.policy == "refuse":
            raise DataError(
                f"{messages[0]}; mend it and start the run again, which goes on from its last checkpoint "
                "(data.on_problem: skip trains without such samples and counts them)"
            )
        for message in messages:
            if len(self._own) < _SHOWN and message not in self._own:
                print(f"train: left out: {message}", flush=True)
            self._own[message] += 1

    def report(self) -> dict[str, int]:
        """For the data's report: how often a sample was left out; empty if none was. Known when training has ended."""
        return {REPORTED: self._total.total()} if self._total else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # while a checkpoint is written only rank 0 asks for the counts
            self._gather()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._gather()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gather()
        if state.is_world_process_zero:
            self.save(Path(args.output_dir))

    def _gather(self) -> None:
        """Adds up all ranks; every rank must call it."""
        self._total = sum(distributed.gather(self._own), self._earlier.copy())

    def load(self, folder: Path) -> None:
        """Takes over the counts of a checkpoint that the run goes on from."""
        path = folder / FILE
        self._earlier = Counter(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else Counter()

    def save(self, folder: Path) -> None:
        """Writes the counts of all ranks, as they last were gathered, into a folder; nothing where nothing broke."""
        if not self._total:
            return
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps(self._total, indent=2), encoding="utf-8")
        partial.rename(folder / FILE)
