"""What DeepSpeed's offloading asks of the machine, looked at before data or weights are touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from llava_moe.config import RecipeError

_FORCE = "zero_force_ds_cpu_optimizer"


def check_offload(deepspeed: str | None) -> None:
    """An offloaded optimiser is DeepSpeed's own Adam on the CPU, compiled at its first use.

    accelerate puts it in the place of torch's AdamW with the same groups, rates and decays. Without a compiler
    DeepSpeed would say so only when the model is loaded and split.

    Raises:
        RecipeError: the optimiser is offloaded, and there is neither a compiler nor a compiled one.
    """
    if deepspeed is None:
        return
    raw = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    device = raw.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if device == "none" or not raw.get(_FORCE, True) or _is_built():
        return
    compiler = os.environ.get("CXX", "c++")
    absent = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if absent:
        raise RecipeError(
            f"deepspeed: {deepspeed} keeps the optimiser on the CPU, and DeepSpeed compiles that one: {absent[0]} is "
            f'missing (apt install g++; pip install ninja); or add "{_FORCE}": false for the slower one of torch'
        )


def _is_built() -> bool:
    """Whether DeepSpeed was installed with the operator."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("cpu_adam"))
