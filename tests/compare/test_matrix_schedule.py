"""Cells in processes: how many at a time, that a failure stays in its cell, and how a matrix is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_moe.compare import cells
from llava_moe.compare.devices import cores
from llava_moe.compare.matrix import Cell
from llava_moe.compare.schedule import Schedule
from llava_moe.config import RecipeError

BEGUN = 'mkdir -p "$0/run"; touch "$0/run/start.json"; '


def make_cells(folder: Path, number: int) -> list[Cell]:
    made = [Cell(f"m{i}", 1, folder / f"m{i}") for i in range(number)]
    for cell in made:
        cell.folder.mkdir()
    return made


def schedule(made: list[Cell], script: str, jobs: int = 1, devices: list[str] | None = None) -> Schedule:
    """Cells that run a line of shell, whose $0 is their folder."""
    return Schedule(made, jobs, devices, command=lambda cell: ["sh", "-c", script, str(cell.folder)])


@pytest.mark.slow
def test_a_failed_cell_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_cells(tmp_path, 3)
    breaks = r"""case "$0" in *m1) echo '{"step": "train"}' > "$0/state.json"; echo it broke; exit 3;; esac; """
    script = breaks + 'touch "$0/ok"'
    failures = schedule(made, script).run()
    assert [(one.method, one.seed, one.stage) for one in failures] == [("m1", 1, "train")]
    assert "it broke" in failures[0].log
    assert [(cell.folder / "ok").is_file() for cell in made] == [True, False, True]
    told = capsys.readouterr().out
    assert "m1, seed 1: FAILED at train" in told
    assert "exit code 3" in told
    assert "it broke" in told
    assert "2/3, 1 failed" in told


@pytest.mark.slow
def test_no_more_than_jobs_run_at_a_time_and_they_do_run_together(tmp_path: Path) -> None:
    made = make_cells(tmp_path, 5)
    script = BEGUN + 'date +%s.%N > "$0/from"; sleep 0.6; date +%s.%N > "$0/to"'
    assert schedule(made, script, jobs=2).run() == []
    spans = [tuple(float((cell.folder / name).read_text()) for name in ("from", "to")) for cell in made]
    together = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(together) == 2


@pytest.mark.slow
def test_the_first_cell_is_alone_until_its_training_begins(tmp_path: Path) -> None:
    made = make_cells(tmp_path, 3)
    script = 'date +%s.%N > "$0/from"; sleep 0.8; ' + BEGUN + 'date +%s.%N > "$0/begun"; sleep 0.3'
    assert schedule(made, script, jobs=3).run() == []
    begun = float((made[0].folder / "begun").read_text())
    assert all(float((cell.folder / "from").read_text()) > begun for cell in made[1:])


@pytest.mark.slow
def test_where_the_first_cell_fails_the_next_takes_its_place(tmp_path: Path) -> None:
    made = make_cells(tmp_path, 3)
    script = (
        'case "$0" in *m0) exit 1;; esac; date +%s.%N > "$0/from"; sleep 0.5; ' + BEGUN + 'date +%s.%N > "$0/begun"'
    )
    assert [one.method for one in schedule(made, script, jobs=2).run()] == ["m0"]
    begun = float((made[1].folder / "begun").read_text())
    assert float((made[2].folder / "from").read_text()) > begun


def test_threads_are_divided_and_devices_given_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    made = make_cells(tmp_path, 1)
    assert schedule(made, "", jobs=2).environment(1)["OMP_NUM_THREADS"] == str(max(1, cores() // 2))
    found = schedule(made, "", jobs=2, devices=["3", "5"]).environment(1)
    assert found["CUDA_VISIBLE_DEVICES"] == "5"
    assert "DRY_RUN" not in found
    wide = Schedule(made, 2, ["0", "1", "2", "3"], ranks=2)
    assert [wide.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["0,1", "2,3"]
    assert Schedule(made, 1, None, ranks=cores()).environment(0)["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_a_stopped_matrix_lets_its_cells_save(tmp_path: Path) -> None:
    made = make_cells(tmp_path, 2)
    saves = 'trap \'touch "$0/saved"; exit 75\' TERM; touch "$0/up"; while :; do sleep 0.1; done'

    def stop() -> None:
        while not (made[0].folder / "up").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        schedule(made, saves).run()
    assert error.value.code == 75
    assert (made[0].folder / "saved").is_file()
    assert not (made[1].folder / "up").is_file()
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_processes_never_work_in_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_LOCK_WAIT", 0.3)
    with cells.only_here(tmp_path), pytest.raises(RecipeError, match="another process"), cells.only_here(tmp_path):
        pass
    with cells.only_here(tmp_path):  # and the lock is free again
        assert (tmp_path / cells.LOCK).is_file()


@pytest.mark.slow
def test_a_cell_whose_parent_has_gone_meanwhile_ends_at_once() -> None:
    child = "import time; from llava_moe.compare.cells import end_with_parent; end_with_parent(); time.sleep(60)"
    gone = {**os.environ, "LLAVA_MOE_PARENT": "1000000000"}
    assert subprocess.run([sys.executable, "-c", child], env=gone, timeout=50).returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_cell_ends_with_the_matrix_that_started_it(tmp_path: Path) -> None:
    """A parent starts a child that watches it, and is killed."""
    child = "import os, time; from llava_moe.compare.cells import end_with_parent; end_with_parent(); "
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    until = time.monotonic() + 30
    while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
