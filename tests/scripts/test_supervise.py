"""What stands between signals and a launcher: scripts/supervise.sh, with stubs for launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# Ends with 75 when it is asked to stop, as a run does; a launcher that heard of SIGTERM itself would end with 143.
RUN = 'touch "$READY"; for i in $(seq 400); do [ -e "$LLAVA_MOE_STOP_FILE" ] && exit 75; sleep 0.05; done; exit 9'


class Supervised:
    """`supervise bash -c CODE` in a process group of its own."""

    def __init__(self, folder: Path, code: str, **env: str) -> None:
        script = folder / "script.sh"
        script.write_text(
            f'set -euo pipefail\nRUN=(recipe.yaml x.y=1)\nsource {REPO}/scripts/supervise.sh\nsupervise bash -c "$1"\n'
        )
        self.ready = folder / "ready"
        self.process = subprocess.Popen(
            ["bash", str(script), code],
            env={**os.environ, "TMPDIR": str(folder), "READY": str(self.ready), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=folder,
        )

    def signalled(self, number: int, whole_group: bool = False) -> Supervised:
        until = time.monotonic() + 20
        while not self.ready.exists() and time.monotonic() < until:
            time.sleep(0.02)
        (os.killpg if whole_group else os.kill)(self.process.pid, number)
        return self

    def ended(self) -> tuple[int, str]:
        """Exit code and what went to stderr."""
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.mark.parametrize("code", [0, 1, 2, 70, 75])
def test_exit_codes_are_passed_on(code: int, tmp_path: Path) -> None:
    assert Supervised(tmp_path, f"exit {code}").ended() == (code, "")


def test_a_rank_that_was_killed_is_told(tmp_path: Path) -> None:
    """DeepSpeed's launcher exits with the negative number of the signal, which the system makes 256 - 9."""
    assert Supervised(tmp_path, "exit 247").ended() == (247, "error: a rank was ended by signal 9 (KILL)\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_request_reaches_the_run_and_not_the_launcher(number: int, whole_group: bool, tmp_path: Path) -> None:
    code, said = Supervised(tmp_path, RUN).signalled(number, whole_group).ended()
    assert (code, said) == (75, "+ asked to stop: the run saves after its step\n")
    assert not list(tmp_path.glob("llava-moe-stop*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ctrl_c_and_a_lost_terminal_end_the_launcher_at_once(number: int, code: int, tmp_path: Path) -> None:
    signalled = Supervised(tmp_path, RUN).signalled(number)
    began = time.monotonic()  # from the signal on: how long a busy machine takes to start it is not the question
    assert signalled.ended()[0] == code
    assert time.monotonic() - began < 15


def test_several_nodes_are_asked_through_the_folder_of_the_run(tmp_path: Path) -> None:
    """The other nodes do not see this one's temporary files."""
    log = tmp_path / "log"
    stub = tmp_path / "bin/python"
    stub.parent.mkdir()
    stub.write_text(f'#!/usr/bin/env bash\necho "$*" > {log}; : > "$LLAVA_MOE_STOP_FILE"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    code, _ = Supervised(tmp_path, RUN, HOSTFILE="hosts", PATH=path).signalled(signal.SIGTERM).ended()
    assert code == 75
    assert log.read_text() == "-m llava_moe.stop recipe.yaml x.y=1\n"
