"""Asks a running stage to save and end: `python -m llava_moe.stop RECIPE [key=value ...]`, as it was started.

It makes the file `<output_dir>/stop`, which the run looks for after every step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llava_moe.config import RecipeError, load_recipe

FILE = "stop"


def run(recipe: str, overrides: Sequence[str] = ()) -> Path:
    """Makes the file and returns its path.

    Raises:
        RecipeError: the recipe is wrong, or no run of it has begun.
    """
    out = Path(load_recipe(recipe, overrides).output_dir)
    if not out.is_dir():
        raise RecipeError(f"output_dir: {out} does not exist, so no run of this recipe is there to be stopped")
    file = out / FILE
    file.touch()
    return file


if __name__ == "__main__":
    from llava_moe.cli import exit_on_user_error

    with exit_on_user_error():
        if len(sys.argv) < 2:
            raise RecipeError("name a recipe: python -m llava_moe.stop RECIPE [key=value ...]")
        print(f"stop: asked by {run(sys.argv[1], sys.argv[2:])}; the run saves and ends after its step")
