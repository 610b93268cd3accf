"""How many processes prepare the data of a rank where the recipe does not say."""

from __future__ import annotations

import os

import torch

from llava_moe.config import RunConfig
from llava_moe.data.parallel import usable_cores

MOST = 8


def default_workers(config: RunConfig, use_cpu: bool) -> int:
    """`train.dataloader_num_workers` of a recipe without one.

    On a GPU a share of the cores, at most 8 for a rank: decoding a picture takes milliseconds, which a GPU would wait
    for. None on a CPU, where they would take the cores that train, and none with a feature cache: nothing is decoded.
    The losses do not depend on the number.
    """
    if use_cpu or config.data.feature_cache is not None:
        return 0
    return max(1, min(MOST, usable_cores() // ranks_here()))


def ranks_here() -> int:
    """Ranks on this machine, as torchrun or DeepSpeed's launcher say, or one for each GPU that is seen."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return max(1, int(os.environ[name]))
    return max(1, torch.cuda.device_count())
