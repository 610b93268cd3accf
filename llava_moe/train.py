"""Main of `llava-moe train RECIPE [key=value ...]`; started by scripts/train/*.sh through DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from llava_moe.config import RecipeError, load_recipe
from llava_moe.training import distributed
from llava_moe.training.health import NotFiniteError
from llava_moe.training.stopping import SIGNALS, Interrupted


def run(recipe: str, overrides: Sequence[str] = ()) -> None:
    """Runs one stage, resuming where an interrupted run stood; a finished one is left as it is.

    Exit codes of the process: 0 finished, 2 something does not fit, cannot be written or is not finite, 70 another rank
    has ended, 75 stopped because it was asked to and saved, 130 Ctrl-C.
    """
    config = load_recipe(recipe, overrides)
    if os.environ.get("DRY_RUN") == "1":
        from llava_moe.training.dry_run import describe

        print(describe(recipe, config))
        return
    from llava_moe.training.runner import train

    timeout = config.train.get("ddp_timeout", 1800)
    distributed.prepare(config.deepspeed is not None, timeout_minutes=timeout / 60)
    try:
        train(config)
    except Interrupted as stopped:
        for number in SIGNALS:  # whoever asked may ask again while the process ends
            signal.signal(number, signal.SIG_IGN)
        if distributed.rank() == 0:
            print(f"train: {stopped.message}", flush=True)
        if stopped.agreed:
            distributed.finish()
        raise
    except NotFiniteError:
        if distributed.rank() == 0:
            raise
        time.sleep(2)  # all ranks have met it; one says so, and no launcher may end it before
        sys.exit(2)
    else:
        distributed.finish()


def main(recipe: str, overrides: Sequence[str] = ()) -> None:
    """`run` as a process of its own: errors about input in one line, and a way out on which no rank aborts."""
    from llava_moe.cli import exit_on_user_error

    code: str | int | None = 0
    try:
        with exit_on_user_error():
            run(recipe, overrides)
    except SystemExit as stop:
        code = stop.code
        if not distributed.launched() or isinstance(code, str):
            raise
    if distributed.launched():
        distributed.leave(int(code or 0))


if __name__ == "__main__":
    from llava_moe.cli import exit_on_user_error

    with exit_on_user_error():
        if len(sys.argv) < 2:
            raise RecipeError("name a recipe: python -m llava_moe.train RECIPE [key=value ...]")
    main(sys.argv[1], sys.argv[2:])
