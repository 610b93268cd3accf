"""Work that one rank does for all, however long it takes.

A barrier gives up after the timeout of its process group, half an hour or less; to decode the pictures of a large
mixture takes longer. So the first rank says every few seconds that it is still busy, and the others listen.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from llava_moe.training import distributed

_BUSY, _DONE, _FAILED = range(3)
_BEAT = 5.0
_LAST_WORDS = 60.0
"""Seconds that the other ranks leave the first one to say what failed, before they end as well."""


def on_first_rank(work: Callable[[], None], beat: float = _BEAT) -> None:
    """Runs `work` on rank 0 while the other ranks wait; to be called by all of them.

    An error there is raised on rank 0, and ends the other ranks without a word of their own.

    Args:
        work: what to do.
        beat: seconds between two signs of life.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if distributed.rank() == 0:
            work()
    elif dist.get_rank() == 0:
        _lead(work, beat)
    else:
        _follow()


def _lead(work: Callable[[], None], beat: float) -> None:
    finished, outcome = threading.Event(), _FAILED

    def tell() -> None:
        while not finished.wait(beat):
            dist.broadcast_object_list([_BUSY], src=0)
        dist.broadcast_object_list([outcome], src=0)

    # The work stays in the main thread, where it can be interrupted; the thread speaks while it goes on.
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        work()
        outcome = _DONE
    finally:
        finished.set()
        teller.join()


def _follow() -> None:
    said = [_BUSY]
    while said[0] == _BUSY:
        dist.broadcast_object_list(said, src=0)
    if said[0] == _FAILED:
        time.sleep(_LAST_WORDS)  # the launcher ends this rank when the first one has ended
        sys.exit(2)
