"""Stops that were asked for, and ranks that are gone; one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava_moe import stop
from llava_moe.config import RecipeError, RunConfig
from llava_moe.training import checkpoints, runner, stopping
from llava_moe.training.checkpoints import last_whole_checkpoint
from llava_moe.training.stopping import Interrupted, Peer, StopRequest
from tests.training.runs import losses
from tests.training.undisturbed import at_end_of, rows, run_of


@pytest.mark.parametrize("way", ["SIGTERM", "file"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_equal(
    way: str, dense_checkpoint: Path, data: tuple[Path, Path], whole: RunConfig, tmp_path: Path
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data, save_steps=100)
    out = Path(config.output_dir)

    def ask() -> None:
        if way == "file":
            stop.run(str(tmp_path / "recipe.yaml"))
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with at_end_of(2, ask), pytest.raises(Interrupted, match="75") as stopped:
        runner.train(config)
    assert stopped.value.code == stopping.STOPPED == 75
    assert "stopped at step 2; the last whole checkpoint is" in stopped.value.message
    assert signal.getsignal(signal.SIGTERM) == before
    assert last_whole_checkpoint(out) == out / "checkpoint-2"
    assert not (out / "done.json").exists()
    assert not (out / stopping.FILE).exists()
    if way == "file":
        stop.run(str(tmp_path / "recipe.yaml"))  # nobody is there: the next run must not take it for its own
    runner.train(config)
    assert rows(config) == rows(whole)


def test_every_way_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "named"
    monkeypatch.setenv(stopping.STOP_FILE_VARIABLE, str(named))
    for way in (signal.SIGTERM, signal.SIGUSR1, named, tmp_path / stopping.FILE):
        with StopRequest(tmp_path).listening() as request:
            request.training = True
            assert not request.is_asked
            if isinstance(way, Path):
                way.touch()
                monkeypatch.setenv("RANK", "1")
                assert not request.is_asked  # one rank looks at files, and the others hear of it
                monkeypatch.setenv("RANK", "0")
            else:
                os.kill(os.getpid(), way)
            assert request.is_asked
            request.forget()
            assert not any(file.exists() for file in request.files)


def test_the_two_names_of_the_stop_file_are_one() -> None:
    assert stop.FILE == stopping.FILE


def test_a_request_while_a_checkpoint_is_written_costs_no_further_step(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data)
    commit = checkpoints.commit

    def asked_meanwhile(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        commit(*args)

    monkeypatch.setattr(checkpoints, "commit", asked_meanwhile)
    with pytest.raises(Interrupted):
        runner.train(config)
    assert list(losses(config.output_dir)) == [1, 2]
    assert [path.name for path in Path(config.output_dir).glob("checkpoint*")] == ["checkpoint-2"]


def test_a_request_in_the_last_step_lets_the_run_finish(
    dense_checkpoint: Path, data: tuple[Path, Path], whole: RunConfig, tmp_path: Path
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data)
    with at_end_of(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert (runner.train(config) / "config.json").is_file()
    assert rows(config) == rows(whole)


@pytest.mark.parametrize("way", ["SIGTERM", "file", "variable"])
def test_a_request_before_the_first_step_ends_the_run_at_once(
    way: str, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a file, which nobody looks at while the main thread reads data or weights; one of this very start too."""
    config = run_of(tmp_path, dense_checkpoint, data)
    named = tmp_path / "named"
    monkeypatch.setenv(stopping.STOP_FILE_VARIABLE, str(named))
    monkeypatch.setattr(stopping, "_LOOK_EVERY", 0.05)
    if way == "variable":
        named.touch()

    def busy(*args: Any) -> None:
        if way == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif way == "file":
            Path(config.output_dir).mkdir(exist_ok=True)
            stop.run(str(tmp_path / "recipe.yaml"))
        time.sleep(20)
        pytest.fail("nobody was told")

    monkeypatch.setattr(runner, "check_image_folders", busy)
    with pytest.raises(Interrupted) as stopped:
        runner.train(config)
    assert "before the first step" in stopped.value.message


def test_asking_a_run_that_is_not_there_is_one_line(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    run_of(tmp_path, dense_checkpoint, data)
    with pytest.raises(RecipeError, match=r"output_dir: .*/out does not exist"):
        stop.run(str(tmp_path / "recipe.yaml"))


def test_workers_outlive_a_signal_to_the_whole_job(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """A cluster may signal every process of a job; the batches of the step must still come."""
    config = run_of(tmp_path, dense_checkpoint, data, dataloader_num_workers=1, dataloader_prefetch_factor=1)

    def everybody() -> None:
        workers = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert workers
        for pid in (*map(int, workers), os.getpid()):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)

    with at_end_of(1, everybody), pytest.raises(Interrupted):
        runner.train(config)
    assert last_whole_checkpoint(Path(config.output_dir)) == Path(config.output_dir) / "checkpoint-1"


def test_peers_that_have_ended_are_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peer = Peer(3, process.pid)
    request = StopRequest("nowhere")
    request._peers = [peer]
    assert request.peer_gone() is None
    process.kill()
    assert request.peer_gone(seconds=10) == peer  # a zombie: nobody has waited for it
    process.wait()
    assert peer.is_gone()


def test_an_error_of_the_transport_names_the_rank_that_is_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    monkeypatch.setattr(stopping, "_LAUNCHER_LOOKS", 0)
    request = StopRequest("nowhere")
    request._peers = [Peer(1, process.pid)]
    with pytest.raises(SystemExit) as ended, request.naming_who_is_gone():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234")
    assert ended.value.code == stopping.PEER_GONE
    assert f"error: rank 1 (process {process.pid}) is gone, and rank 0 cannot go on" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="of our own"), request.naming_who_is_gone():
        raise RuntimeError("a mistake of our own")


@pytest.mark.slow
def test_a_process_that_waits_for_a_dead_rank_is_ended(tmp_path: Path) -> None:
    """The main thread hangs where no signal handler of Python runs: in a system call that is tried again."""
    code = (
        "import os, subprocess, sys, threading\n"
        "from llava_moe.training import stopping\n"
        "stopping._LOOK_EVERY, stopping._PATIENCE = 0.1, 0.1\n"
        "child = subprocess.Popen([sys.executable, '-c', ''])\n"
        "request = stopping.StopRequest('nowhere')\n"
        "request._peers = [stopping.Peer(5, child.pid)]\n"
        "with request.listening():\n"
        "    os.read(os.pipe()[0], 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == stopping.PEER_GONE, done.stderr
    assert "error: rank 5 (process " in done.stderr
