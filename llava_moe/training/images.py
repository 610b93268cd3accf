"""Image modes of a run: which family a recipe asks for, and a model that merges tiles as its processor counts them.

The merge of tiles has no weights but one newline vector, so a stage may show images otherwise than the one before it:
a projector is pretrained on whole images (square), and the next stage cuts them (anyres).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_moe.config import RecipeError, RunConfig
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.processor_parts import default_tiling
from llava_moe.data.visuals import is_tiled
from llava_moe.model.families import FAMILIES, family_of
from llava_moe.model.merge import merge_rule

DEFAULT_IMAGE_MODE = "square"
_MERGE = ("merge", "base", "unpad_rounding")


def family_name(config: RunConfig) -> str:
    """The family of a first model: the one that is named, or that which goes with the image mode.

    Raises:
        ValueError: family or image mode are unknown.
    """
    if config.model.family is not None:
        FAMILIES.get(config.model.family)
        return config.model.family
    mode = config.data.image_mode or DEFAULT_IMAGE_MODE
    if not is_tiled(mode):
        return "llava"
    return "llava_next" if mode == "anyres" else "llava_onevision"


def first_tiling(config: RunConfig) -> dict[str, Any] | None:
    """The settings of the tiles of a first model; None for a family without.

    Raises:
        RecipeError: there are settings, and the family has no tiles.
    """
    family = FAMILIES.get(family_name(config))
    if family.is_tiled:
        return default_tiling(family.stock_type, config.data.tiling)
    if config.data.tiling is not None:
        raise RecipeError(
            f"data.tiling is set, but models of the family {family.stock_type} take an image whole; set "
            "data.image_mode to anyres or anyres_max_N, or model.family to llava_next or llava_onevision"
        )
    return None


def merging(tiling: Mapping[str, Any], image_mode: str) -> dict[str, Any]:
    """The values of a model's config that say how tiles become a sequence; the grids depend on the tower, too."""
    merge = {key: tiling[key] for key in _MERGE if key in tiling}
    frames = tiling.get("frames")
    values: dict[str, Any] = {"merge": merge or None, "frames": None if frames is None else dict(frames)}
    if is_tiled(image_mode):
        values["vision_aspect_ratio"] = image_mode
    elif merge.get("merge", "spatial_unpad") != "spatial_unpad":
        values["vision_aspect_ratio"] = "anyres"  # merges that keep padding know no limit
    return values


def match_images(model: Any, processor: LlavaMoeProcessor) -> None:
    """Makes the model merge tiles as the processor counts them; nothing happens without tiles.

    Raises:
        RecipeError: model and processor do not belong together, or the merge needs a newline vector that the model has
            not, or the other way round.
    """
    family = family_of(model.config)
    has_tiles = family is not None and family.is_tiled
    if has_tiles != (processor.tiling is not None):
        raise RecipeError(
            f"the model ({model.config.model_type}) and its processor do not belong together: one of them has tiles"
        )
    if processor.tiling is None or processor.planner is None:
        return
    had_newline = merge_rule(model.config).has_newline
    for key, value in merging(processor.tiling, processor.image_mode).items():
        setattr(model.config, key, value)
    model.config.image_grid_pinpoints = [list(pair) for pair in processor.planner.tiling.resolutions]
    if merge_rule(model.config).has_newline != had_newline:
        raise RecipeError(
            f"data.tiling.merge={processor.planner.tiling.merge!r}: only spatial_unpad has a newline vector, and this "
            f"checkpoint {'has' if had_newline else 'lacks'} one; choose the merge when the model is assembled"
        )
