"""Going on with another number of ranks under ZeRO-1 and ZeRO-2, whose optimiser state is divided among them.

DeepSpeed's universal checkpoint holds that state whole, parameter by parameter. It is made beside the checkpoint's own
files, once, and read in their place. The run then has the same weights, moments and schedule, but sums are rounded
otherwise, and each rank's random numbers begin anew from the seed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import TrainingArguments

from llava_moe.config import RecipeError, RunConfig
from llava_moe.training import distributed
from llava_moe.training.checkpoints import Layout, disk_is_full, recorded_layout, zero_stage
from llava_moe.training.rank_zero import on_first_rank

_LATEST = "latest_universal"  # DeepSpeed writes it last
_OF_A_RANK = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
}
_PROGRAM = "deepspeed.checkpoint.ds_to_universal"


def reshard(checkpoint: Path, config: RunConfig, arguments: TrainingArguments, now: Layout) -> None:
    """Makes a checkpoint of another number of ranks readable for this run; does nothing where it is.

    Every rank calls it.

    Raises:
        RecipeError: it cannot be converted.
    """
    then = recorded_layout(checkpoint)
    if then is None or not then.sharded or then.world_size == now.world_size:
        return
    way_back = f"go on with NPROC={then.world_size}, or delete {checkpoint.parent} to start anew"
    reason = ""
    if config.expert_parallel is not None:
        reason = "with expert_parallel it cannot be converted"
    elif zero_stage(config) == 3:
        # DeepSpeed 0.19.8 gives all groups the rates of the first one, and all parameters one count of steps
        reason = "DeepSpeed would restore neither the rates of the parts nor AdamW's count of steps under ZeRO-3"
    if reason:
        raise RecipeError(
            f"{checkpoint} was written by {then.world_size} ranks and this run has {now.world_size}; {reason}: "
            f"{way_back}"
        )
    on_first_rank(lambda: _convert(checkpoint, way_back))
    # The engine reads this dictionary when it is made.
    arguments.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    if distributed.rank() == 0:
        print(
            f"train: {checkpoint} of {then.world_size} ranks was converted for {now.world_size}; losses agree with "
            "those of an undisturbed run but for rounding",
            flush=True,
        )


def _convert(checkpoint: Path, way_back: str) -> None:
    if (checkpoint / _LATEST).is_file():
        return  # of an earlier start
    made = (checkpoint / "latest").read_text().strip()
    target = checkpoint / f"{made}_universal"
    shutil.rmtree(target, ignore_errors=True)  # of a kill
    command = [sys.executable, "-m", _PROGRAM, "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / made), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    # Without what says that it is a rank of this run, or it would wait for the others.
    env = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (checkpoint / _LATEST).is_file():
        shutil.rmtree(target, ignore_errors=True)
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        full = ", the disk is full" if disk_is_full(OSError(said[-1])) else ""
        raise RecipeError(f"{checkpoint}: {_PROGRAM} failed{full} ({said[-1].strip()}); {way_back}")
