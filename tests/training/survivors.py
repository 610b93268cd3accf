"""Runs that are killed on purpose. As a program: `python -m tests.training.survivors kills|poisoned ...`.

`kills PLAN.json` runs each recipe of the plan once undisturbed and once through a chain of kills. Every run is a
process of its own that ends by a real SIGKILL; the processes are forked from this one, which has imported all and
computed nothing, so that a start costs little. A moment is a place in the source: the n-th line that Python executes
within a training step, while a checkpoint is written, or while the end of the run is.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip

from llava_moe.config import load_recipe
from llava_moe.data.dataset import ConversationDataset
from llava_moe.training import runner
from llava_moe.training.survival import SurvivingTrainer

Moment = tuple[str, float]
"""A region, such as "step 3", "save 4" or "end", and how far in it: 0 is its first line, 1 its last."""


class _Lines:
    """Counts the lines of Python that run within regions, and ends the process at one of them."""

    def __init__(self, region: str | None = None, line: int = 0) -> None:
        self.counts: dict[str, int] = {}
        self._target = (region, line)
        self._current: str | None = None

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and self._current is not None:
            self.counts[self._current] = self.counts.get(self._current, 0) + 1
            if (self._current, self.counts[self._current]) == self._target:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._trace

    def within(self, region: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*args: Any, **kwargs: Any) -> Any:
            self._current = region(*args)
            sys.settrace(self._trace)
            try:
                return function(*args, **kwargs)
            finally:
                sys.settrace(None)
                self._current = None

        return traced


def _watch(lines: _Lines) -> None:
    """For the rest of this process."""
    cls: Any = SurvivingTrainer
    cls._save_checkpoint = lines.within(lambda trainer, *_: f"save {trainer.state.global_step}", cls._save_checkpoint)
    cls.training_step = lines.within(lambda trainer, *_: f"step {trainer.state.global_step + 1}", cls.training_step)
    for name in ("_save", "_finish"):
        setattr(runner, name, lines.within(lambda *_: "end", getattr(runner, name)))


def in_child(work: Callable[..., Any], *args: Any) -> int:
    """Runs it in a forked process; its exit code, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*args)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _whole(recipe: str, counts: Path) -> None:
    lines = _Lines()
    _watch(lines)
    runner.train(load_recipe(recipe))
    counts.write_text(json.dumps(lines.counts))


def _until(recipe: str, region: str, line: int) -> None:
    _watch(_Lines(region, line))
    runner.train(load_recipe(recipe))


def moments(seed: int, num_steps: int, save_steps: int) -> list[Moment]:
    """In the order of a run: some steps, some saves (one in its first tenth, one in its last), and the end."""
    generator = random.Random(seed)
    chosen: list[Moment] = []
    for number, end in enumerate(range(save_steps, num_steps, save_steps)):
        kind = ("save", "step")[number % 2]
        step = end if kind == "save" else generator.randrange(end - save_steps + 1, end + 1)
        chosen.append((f"{kind} {step}", generator.random()))
    return [*chosen, (f"save {num_steps}", 1 - generator.random() / 10), ("end", generator.random())]


def run_plan(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What happened: the code of the undisturbed run, and each moment with the code of the run that met it."""
    told = []
    for case in plan:
        counts = Path(case["whole"]).with_name("lines.json")
        row: dict[str, Any] = {"whole": in_child(_whole, case["whole"], counts), "kills": []}
        lines = json.loads(counts.read_text())
        for region, fraction in case["moments"]:
            line = 1 + int(fraction * (lines[region] - 1))
            code = in_child(_until, case["killed"], region, line)
            left = sorted(path.name for path in Path(case["killed"]).with_name("out").iterdir())
            row["kills"].append({"moment": f"{region}, line {line} of {lines[region]}", "code": code, "left": left})
        row["last"] = in_child(_whole, case["killed"], counts)
        told.append(row)
    return told


@contextmanager
def poisoned(sample_id: str) -> Iterator[None]:
    """Within it the picture of one sample is not a number."""
    original = ConversationDataset.__getitem__

    def spoilt(self: ConversationDataset, index: int) -> dict[str, Any]:
        item = original(self, index)
        if item["sample_id"] == sample_id:
            item = {**item, "pixel_values": torch.full_like(item["pixel_values"], torch.nan)}
        return item

    ConversationDataset.__getitem__ = spoilt  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConversationDataset.__getitem__ = original  # type: ignore[method-assign]


if __name__ == "__main__":
    from llava_moe.train import main

    torch.set_num_threads(1)
    if sys.argv[1] == "kills":
        found = run_plan(json.loads(Path(sys.argv[2]).read_text()))
        Path(sys.argv[2]).with_name("told.json").write_text(json.dumps(found))
    else:  # poisoned SAMPLE RECIPE: as llava_moe.train
        with poisoned(sys.argv[2]):
            main(sys.argv[3])
