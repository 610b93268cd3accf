"""Ranks that are started together: their environment, whose exit code counts, and that a signal reaches them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from llava_moe.compare import ranks
from llava_moe.compare.ranks import run_ranks

pytestmark = pytest.mark.slow


def shell(script: str, number: int, **environment: str) -> int:
    return run_ranks(["sh", "-c", script], number, environment)


def test_each_rank_knows_its_place(tmp_path: Path) -> None:
    place = "$LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $OWN"
    script = f'echo "{place}" > "$WHERE/$RANK"; echo $MASTER_PORT >> "$WHERE/$RANK"'
    assert shell(script, 2, WHERE=str(tmp_path), OWN="x") == 0
    first, second = ((tmp_path / name).read_text().splitlines() for name in "01")
    assert (first[0], second[0]) == ("0 2 2 127.0.0.1 x", "1 2 2 127.0.0.1 x")
    assert first[1] == second[1]
    assert int(first[1]) > 0


def test_the_first_failure_counts_and_ends_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE", 0.5)
    start = time.monotonic()
    assert shell('[ "$RANK" = 1 ] && exit 7; exec sleep 60', 2) == 7
    assert time.monotonic() - start < 20


def test_a_signal_reaches_all_and_they_may_save(tmp_path: Path) -> None:
    script = """trap 'touch "$WHERE/saved$RANK"; exit 75' TERM; touch "$WHERE/up$RANK"; while :; do sleep 0.1; done"""

    def stop() -> None:
        while not all((tmp_path / f"up{rank}").is_file() for rank in range(2)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.getsignal(signal.SIGINT)
    assert shell(script, 2, WHERE=str(tmp_path)) == 75
    assert all((tmp_path / f"saved{rank}").is_file() for rank in range(2))
    assert signal.getsignal(signal.SIGINT) == before
