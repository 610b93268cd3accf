"""What a DeepSpeed or multi-process run needs before and after training."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed

from llava_moe.config import RecipeError


def prepare(uses_deepspeed: bool, timeout_minutes: float = 30) -> None:
    """Starts DeepSpeed's communication on a CPU; does nothing otherwise.

    Args:
        uses_deepspeed: the recipe names a DeepSpeed file.
        timeout_minutes: after which a rank gives up waiting for another; elsewhere transformers passes on the
            recipe's `train.ddp_timeout` itself.

    Raises:
        RecipeError: DeepSpeed is asked for without a launcher.
    """
    if not uses_deepspeed:
        return
    if not launched():
        raise RecipeError(
            "a recipe with `deepspeed` must be started by its launcher: use scripts/train/*.sh, or set deepspeed=null "
            "to train in this one process"
        )
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


def local_rank() -> int:
    """Among the ranks of this machine; 0 in a single process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """1 in a single process."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gather(value: Any) -> list[Any]:
    """What each rank has passed, in the order of the ranks; every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def first(value: Any) -> Any:
    """What rank 0 has passed; every rank must call it."""
    return gather(value)[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def finish() -> None:
    """All ranks leave together, so that none takes a connection from another that still uses it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def launched() -> bool:
    """Whether a launcher (DeepSpeed's, torchrun) started this process as one of its ranks."""
    return "RANK" in os.environ


def leave(code: int) -> NoReturn:
    """Ends a rank's process as the interpreter does, without taking the interpreter apart.

    Threads are joined, what is registered with `atexit` runs, output is flushed. A worker thread of gloo may still hold
    a tensor although its group is destroyed; it asks for the interpreter's lock while that is torn down, and C++ ends
    the process with "terminate called without an active exception" (pytorch/pytorch#179291): a run that has finished
    and saved would be reported as failed. Seen once, in CI, in a run of two ranks under ZeRO-3.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """Within it the parameters are whole on every rank also under ZeRO-3; every rank must enter and leave it."""
    parameters = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Within it transformers builds whole models also under ZeRO-3, so that one rank may build one alone."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference
