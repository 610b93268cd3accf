"""What every command does with its standard output; what the commands do stands in the tests of their folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from llava_moe.cli import exit_on_user_error

ROOT = Path(__file__).parents[2]


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """The writing end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        yield file


def test_a_reader_that_leaves_ends_a_command_in_silence(unread: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        print("a line that waits in the buffer")
    assert caught.value.code == 141
    unread.flush()  # what the interpreter does at its end; the descriptor leads nowhere now


def test_another_broken_pipe_stays_an_error() -> None:
    with pytest.raises(BrokenPipeError, match="a worker"), exit_on_user_error():
        raise BrokenPipeError("a worker")


@pytest.mark.parametrize(
    "command",
    [
        ["data_prep", "llava_mix665k", "--dry-run"],
        ["data_prep.benchmarks", "core", "--mirror", "mirror", "--dry-run"],
        ["llava_moe.cli", "eval", "--list"],
    ],
    ids=["data", "benchmarks", "eval"],
)
@pytest.mark.slow
def test_commands_can_be_read_with_head(command: list[str], tmp_path: Path, unread: TextIO) -> None:
    """Their own processes, as a shell starts them."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DATA": str(tmp_path / "data")},
        stdout=unread,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
