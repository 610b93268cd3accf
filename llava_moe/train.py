"""Main of `llava-moe train RECIPE [key=value ...]`; started by scripts/train/*.sh through DeepSpeed's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from llava_moe.config import RecipeError, load_recipe
from llava_moe.training import distributed


def run(recipe: str, overrides: Sequence[str] = ()) -> None:
    """Runs one stage, resuming where an interrupted run stood; a finished one is left as it is."""
    config = load_recipe(recipe, overrides)
    if os.environ.get("DRY_RUN") == "1":
        from llava_moe.training.dry_run import describe

        print(describe(recipe, config))
        return
    from llava_moe.training.runner import train

    distributed.prepare(config.deepspeed is not None)
    try:
        train(config)
    finally:
        if sys.exc_info()[0] is None:
            distributed.finish()


if __name__ == "__main__":
    from llava_moe.cli import exit_on_user_error

    with exit_on_user_error():
        if len(sys.argv) < 2:
            raise RecipeError("name a recipe: python -m llava_moe.train RECIPE [key=value ...]")
        run(sys.argv[1], sys.argv[2:])
