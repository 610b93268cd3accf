"""What a DeepSpeed or multi-process run needs before and after training."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist


def prepare(uses_deepspeed: bool, timeout_minutes: int = 30) -> None:
    """Starts DeepSpeed's communication on a CPU; does nothing otherwise.

    Raises:
        RuntimeError: DeepSpeed is asked for without a launcher.
    """
    if not uses_deepspeed:
        return
    if "RANK" not in os.environ:
        raise RuntimeError("a recipe with `deepspeed` must be started by its launcher: use scripts/train/*.sh")
    if torch.cuda.is_available():
        return
    import deepspeed
    import deepspeed.ops

    # Its shared-memory operator is compiled for minutes at the first use, and only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO-3 partitions at construction and would see a world of one rank if this came later.
    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))


def rank() -> int:
    """0 in a single process."""
    return int(os.environ.get("RANK", "0"))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def finish() -> None:
    """All ranks leave together; without it gloo's threads can abort a finished run at interpreter exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
