"""Whether a stage fits the checkpoint that it starts from, told from files alone and before compute is spent.

What the weights must say (tensors that are missing, parts that the model does not have) is refused where the model is
loaded and by `stage.apply_stage`; here it is what a recipe and the files beside the weights say.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llava_moe.config import ModelSection, RecipeError, RunConfig
from llava_moe.data.visuals import is_tiled
from llava_moe.model.families import family_of
from llava_moe.model.upcycling import PROVENANCE

# Of the parts of a first model: a checkpoint has them already.
_PARTS = (
    "family",
    "vision_tower",
    "vision_weights",
    "image_size",
    "language_model",
    "projector",
    "projector_args",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "random_weights",
)


def check_recipe(config: RunConfig) -> None:
    """Checks what the recipe says of its start point against itself.

    Raises:
        RecipeError: it names a checkpoint and parts to assemble, which would not be used.
    """
    if config.model.checkpoint is None:
        return
    defaults = ModelSection()
    given = [key for key in _PARTS if getattr(config.model, key) != getattr(defaults, key)]
    if given:
        raise RecipeError(
            f"model.{', model.'.join(given)}: of a model to assemble, but model.checkpoint={config.model.checkpoint} "
            "names one that is made already; leave out one of the two"
        )


def check_image_mode(config: RunConfig, shape: Any) -> None:
    """Checks what a stage says of images against the config of the model that it starts from.

    Raises:
        RecipeError: it cuts images into tiles, and the model takes them whole.
    """
    family, data = family_of(shape), config.data
    if family is None or family.is_tiled:
        return
    tiled = f"data.image_mode={data.image_mode}" if data.image_mode is not None and is_tiled(data.image_mode) else ""
    asked = tiled or ("data.tiling" if data.tiling is not None else "")
    if asked:
        raise RecipeError(
            f"{asked}: cuts images into tiles, and a model of the family {family.stock_type} takes an image whole; "
            "start from a model that was assembled as llava_next or llava_onevision, or leave it out"
        )


def check_start(config: RunConfig, checkpoint: Path) -> None:
    """Checks a checkpoint directory against the recipe that starts from it.

    Raises:
        RecipeError: the recipe upcycles, and this checkpoint is dense or was made from another section.
    """
    check_recipe(config)
    if config.upcycle is None:
        return
    found = json.loads((checkpoint / "config.json").read_text()).get("moe")
    if not found:
        raise RecipeError(
            f"{checkpoint}: a dense checkpoint, and the recipe's section upcycle asks for one with experts; make it "
            "with `llava-moe upcycle` and the same recipe, or scripts/train/moe.sh"
        )
    provenance = checkpoint / PROVENANCE
    if not provenance.is_file():
        return  # made elsewhere or by hand; its config.json is what counts
    made = json.loads(provenance.read_text()).get("section", {})
    asked = dataclasses.asdict(config.upcycle)
    # `llava-moe upcycle --from` names another parent on purpose; what counts is what was made of it.
    differing = [d for part in config.upcycle.parts() for d in differences(made.get(part), asked[part], part)]
    if differing:
        raise RecipeError(
            f"{checkpoint}: made from another section upcycle than this recipe's; different: "
            f"{'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}; run `llava-moe upcycle` again"
        )


def differences(made: Any, asked: Any, key: str) -> list[str]:
    """`key: made with one, asked for another` of every value that differs."""
    if isinstance(made, dict) and isinstance(asked, dict):
        names = list(dict.fromkeys([*made, *asked]))
        return [d for name in names for d in differences(made.get(name), asked.get(name), f"{key}.{name}")]
    return [] if made == asked else [f"upcycle.{key} was {made!r} and is {asked!r}"]
