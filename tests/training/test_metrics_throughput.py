"""The clock: laps, pauses, and the wait for data, which must be the right number and go away where workers hide it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llava_moe.training import throughput
from llava_moe.training.metrics import read_metrics
from llava_moe.training.throughput import Stopwatch, WaitWarning, largest
from tests.tiny import write_llava_json
from tests.training.runs import make_config, make_trainer

ITEM, STEP = 0.03, 0.12


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lap_leaves_out_pauses_and_counts_the_wait() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    watch.start(10)

    def batches() -> Any:
        for _ in range(4):
            clock.now += 0.5
            yield "batch"

    iterator = batches()
    for _ in range(2):  # two steps of two batches, as the Trainer asks for them
        timed = watch.timed(iterator)
        assert [next(timed), next(timed)] == ["batch", "batch"]
        clock.now += 3.0
        watch.mark()
    clock.now += 20.0  # a checkpoint is written
    watch.paused()
    clock.now += 1.0
    lap = watch.lap(12)
    assert (lap.steps, lap.seconds, lap.pause, lap.wait) == (2, pytest.approx(9.0), 20.0, pytest.approx(2.0))
    clock.now += 2.0
    lap = watch.lap(13)
    assert (lap.steps, lap.seconds, lap.pause, lap.wait) == (1, pytest.approx(2.0), 0.0, 0.0)


def test_timed_batches_end_and_fail_as_the_loader_does() -> None:
    watch = Stopwatch()
    assert list(watch.timed(iter([1, 2]))) == [1, 2]

    def broken() -> Any:
        raise OSError("a picture")
        yield

    with pytest.raises(OSError, match="a picture"):
        next(watch.timed(broken()))


def test_the_largest_of_one_rank() -> None:
    assert largest([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]


def test_the_warning_comes_once_and_names_what_helps() -> None:
    warning = WaitWarning(num_workers=2, may_cache=True)
    assert warning.add(49, 49.0, 20.0) is None
    told = warning.add(1, 1.0, 0.0)
    assert told is not None
    assert "wait 40% of their time for data (0.4 of 1 s over the last 50 steps)" in told
    assert "train.dataloader_num_workers (now 2)" in told
    assert "data.feature_cache" in told
    assert warning.add(50, 50.0, 40.0) is None
    assert WaitWarning(0, False).add(50, 50.0, 4.9) is None
    told = WaitWarning(0, False).add(50, 50.0, 5.1)
    assert told is not None
    assert "feature_cache" not in told


def test_early_waits_do_not_warn_for_ever() -> None:
    """A slow start is forgotten after the window in which it was."""
    warning = WaitWarning(0, False)
    assert warning.add(50, 50.0, 4.0) is None
    assert warning.add(50, 50.0, 4.0) is None
    assert warning.add(50, 50.0, 9.0) is not None


class _Slow(torch.utils.data.Dataset[dict[str, Any]]):
    """A sample takes so many seconds."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self.inner, self.lengths, self.seconds = inner, inner.lengths, seconds

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        item: dict[str, Any] = self.inner[index]
        return item


class _SlowSteps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)


def slow_run(folder: Path, checkpoint: Path, item: float, step: float, **train: Any) -> list[dict[str, Any]]:
    data = write_llava_json(folder / "data", 16)
    made = make_trainer(make_config(folder, checkpoint, data, train={"max_steps": 8, "logging_steps": 4, **train}))
    made.train_dataset = _Slow(made.train_dataset, item)
    made.add_callback(_SlowSteps(step))
    made.train()
    return read_metrics(folder / "out")


@pytest.mark.slow
def test_the_wait_of_a_slow_data_set(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two samples in a batch: each step waits for both, whatever else it does."""
    monkeypatch.setattr(throughput, "WAIT_STEPS", 8)
    rows = slow_run(tmp_path, dense_checkpoint, ITEM, STEP)
    for row in rows:
        assert 2 * ITEM * 0.7 < row["data_wait"] < 2 * ITEM + 0.1  # accelerate reads one batch ahead
        assert row["seconds_per_step"] > row["data_wait"] + STEP
    assert sum(row["data_wait"] for row in rows) / 2 == pytest.approx(2 * ITEM, rel=0.5)
    assert capsys.readouterr().out.count("of their time for data") == 1


@pytest.mark.slow
def test_workers_hide_the_wait(dense_checkpoint: Path, tmp_path: Path) -> None:
    item, step = 0.1, 0.5
    rows = slow_run(tmp_path, dense_checkpoint, item, step, dataloader_num_workers=1)
    # without a worker it would be two items; the first line has the start of the process in it
    assert rows[1]["data_wait"] < item
    assert rows[1]["seconds_per_step"] > step
