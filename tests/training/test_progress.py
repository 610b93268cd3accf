"""The live line in a terminal, plain lines in a log, and silence where it is asked for."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers.utils import logging as transformers_logging

from llava_moe.training.progress import (
    LINE_SECONDS,
    SILENT_SECONDS,
    ProgressCallback,
    RemainingTime,
    as_time,
    fitting,
    is_live,
    parts_of,
    short,
    spare_logs,
)
from tests.tiny import write_llava_json
from tests.training.runs import make_config, make_trainer

ROW: dict[str, Any] = {
    "loss": 1.23456,
    "tokens_per_second": 12345.0,
    "seconds_per_step": 0.5,
    "mfu": 0.414,
    "useful_tokens": 0.9312,
    "samples": 640,
    "data_wait_share": 0.021,
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Metrics:
    def __init__(self) -> None:
        self.row: dict[str, Any] = {}


class State:
    is_world_process_zero = True

    def __init__(self, max_steps: int, global_step: int = 0) -> None:
        self.max_steps, self.global_step = max_steps, global_step


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(file: io.StringIO, seconds: float, steps: int, logging_steps: int, first: int = 0, width: int = 100) -> None:
    """A run of steps that take so many seconds each."""
    clock, metrics, state = Clock(), Metrics(), State(steps, first)
    console = Console(file=file, force_terminal=file.isatty(), width=width, legacy_windows=False, _environ={})
    shown = ProgressCallback(metrics, console, clock)
    shown.on_train_begin(None, state, None)
    for step in range(first + 1, steps + 1):
        state.global_step = step
        clock.now += seconds
        shown.on_step_end(None, state, None)
        if step % logging_steps == 0:
            metrics.row = ROW
            shown.on_log(None, state, None, logs={"loss": 1.0})
    shown.on_log(None, state, None, logs={"train_runtime": 1.0})
    shown.on_train_end(None, state, None)


def test_lines_of_a_log_have_everything_and_no_control_characters() -> None:
    file = io.StringIO()
    run(file, seconds=12.0, steps=4, logging_steps=2)
    assert file.getvalue() == (
        "step 2/4, loss 1.235, ETA 0:24, 12.3k tok/s, 0.5 s/step, MFU 41%, useful 93%, 640 samples, data wait 2%\n"
        "step 4/4, loss 1.235, 12.3k tok/s, 0.5 s/step, MFU 41%, useful 93%, 640 samples, data wait 2%\n"
    )


def test_quick_steps_do_not_flood_a_log() -> None:
    """A log step each second: the first, one in `LINE_SECONDS`, the last."""
    file = io.StringIO()
    run(file, seconds=1.0, steps=25, logging_steps=1)
    said = [int(line.split("/")[0].removeprefix("step ")) for line in file.getvalue().splitlines()]
    assert said == [1, 1 + LINE_SECONDS, 1 + 2 * LINE_SECONDS, 25]


def test_a_log_is_never_silent_for_long() -> None:
    """No log step in sight: a line a minute, before the first row with the pace alone."""
    file = io.StringIO()
    run(file, seconds=20.0, steps=10, logging_steps=1000)
    assert file.getvalue().splitlines() == [f"step {s}/10, ETA {as_time(20.0 * (10 - s))}" for s in (3, 6, 9)]
    assert SILENT_SECONDS == 60.0


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_live_line_fits_its_terminal(width: int) -> None:
    file = Terminal()
    run(file, seconds=0.5, steps=4, logging_steps=1, width=width)
    assert "\x1b" in file.getvalue()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", file.getvalue())]
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    last = [line for line in lines if line.strip()][-1]
    assert "4/4" in last
    assert "loss 1.235" in last
    assert ("640 samples" in last) == (width == 160)
    assert file.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in file.getvalue()  # the cursor is back


def test_the_live_line_of_a_resumed_run_begins_where_it_stands() -> None:
    file = Terminal()
    run(file, seconds=0.5, steps=8, logging_steps=1, first=5)
    assert "5/8" in file.getvalue()
    assert "0/8" not in file.getvalue()


def test_what_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_live(Console(file=Terminal(), _environ={"TERM": "xterm"}))
    assert not is_live(Console(file=Terminal(), force_terminal=True, _environ={"TERM": "dumb"}))
    assert not is_live(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}))  # as in CI


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_transformers_stay_out_of_logs(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    try:
        transformers_logging.enable_progress_bar()
        spare_logs()
        assert transformers_logging.is_progress_bar_enabled() == terminal
        run(Terminal(), seconds=0.5, steps=2, logging_steps=1)
        assert transformers_logging.is_progress_bar_enabled() == terminal
    finally:
        transformers_logging.enable_progress_bar()


def test_other_ranks_say_nothing() -> None:
    file, state = io.StringIO(), State(1)
    state.is_world_process_zero = False
    shown = ProgressCallback(Metrics(), Console(file=file))
    shown.on_train_begin(None, state, None)
    state.global_step = 1
    shown.on_step_end(None, state, None)
    shown.on_log(None, state, None, logs={"loss": 1.0})
    shown.on_train_end(None, state, None)
    assert file.getvalue() == ""


def test_the_remaining_time_follows_the_pace() -> None:
    clock = Clock()
    remaining = RemainingTime(clock)
    remaining.mark(0)
    assert remaining.seconds(1000) is None
    for step in range(1, 101):
        clock.now += 10.0 if step <= 40 else 1.0
        remaining.mark(step)
    assert remaining.seconds(200) == pytest.approx(100.0)  # the slow ones are behind


def test_how_numbers_are_written() -> None:
    assert [as_time(s) for s in (0, 59.6, 3700, 90061)] == ["0:00", "1:00", "1:01:40", "1d 1:01:01"]
    assert [short(n) for n in (7, 950, 12345, 5.1e6, 2e9)] == ["7", "950", "12.3k", "5.1M", "2G"]
    assert fitting(["one", "two", "three"], 9) == "one · two"
    assert fitting(["longer than that"], 3) == "longer than that"
    assert parts_of({**ROW, "mfu": None, "data_wait_share": 0.001}, None) == [
        "loss 1.235",
        "12.3k tok/s",
        "0.5 s/step",
        "useful 93%",
        "640 samples",
    ]


@pytest.mark.parametrize("silent", [False, True])
def test_a_real_run_says_its_line_once_or_nothing(
    silent: bool, dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    made = make_trainer(make_config(tmp_path, dense_checkpoint, data, train={"disable_tqdm": silent}))
    made.train()
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if "loss" in line]
    assert [line.split(",")[0] for line in lines] == ([] if silent else ["step 1/2", "step 2/2"])
    assert "{'" not in shown.out  # transformers' own printing of the logs
    assert "/2 [" not in shown.err  # and its bar
