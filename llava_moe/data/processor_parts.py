"""What a processor is made of: checks of its parts, the settings of a model with tiles, and those of a stock processor.

The settings of tiles are `tiling` in processor_config.json and `data.tiling` in a recipe:

    grids           "llava-1.6", a range "(1x1),...,(6x6)", or (height, width) pairs of pixels; see `parse_grid`
    merge, base, several_images, unpad_rounding   see `Tiling`
    frames          how the frames of a video are pooled, see `FramePooling`; null: no videos
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil

from llava_moe.data.image_grid import FramePooling, Tiling, parse_grid, parse_mode
from llava_moe.data.schema import DataError
from llava_moe.data.visuals import is_tiled
from llava_moe.registry import near_misses

_DEFAULT_GRIDS = {"llava_next": "llava-1.6"}
_RANGE = "(1x1),...,(6x6)"
_OPTIONS = ("grids", "merge", "base", "several_images", "unpad_rounding", "frames")
_STOCK = {"LlavaNextProcessor": "anyres", "LlavaOnevisionProcessor": "pad"}


def default_tiling(family: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options with the grids of a family: those of LLaVA-1.6 for llava_next, 1 x 1 to 6 x 6 for llava_onevision."""
    return {"grids": _DEFAULT_GRIDS.get(family, _RANGE), **(options or {})}


def build_tiling(options: Mapping[str, Any], image_mode: str, tile: int, num_tile_tokens: int) -> Tiling:
    """The anyres mode of a checkpoint.

    Args:
        options: see the module.
        image_mode: N of "anyres_max_N" is the limit of the merge.
        tile: side of a tile in pixels.
        num_tile_tokens: tokens of a tile, behind the projector.

    Raises:
        DataError: an option is unknown or has a value that is not allowed.
    """
    for key in options:
        if key not in _OPTIONS:
            raise DataError(f"tiling has no key {key!r}; {near_misses(key, list(_OPTIONS))}")
    if "grids" not in options:
        raise DataError("tiling.grids is missing; give 'llava-1.6', '(1x1),...,(6x6)' or pairs of pixels")
    values = {key: value for key, value in options.items() if key not in ("grids", "frames")}
    side = isqrt(num_tile_tokens)
    merge = values.get("merge", "spatial_unpad")
    if side * side != num_tile_tokens:
        raise DataError(
            f"a tile has {num_tile_tokens} tokens, which is no square grid, and grids of tiles are put together; "
            "use a projector that keeps the grid, and vision_feature_select_strategy default without the class token"
        )
    try:
        return Tiling(
            tile=tile,
            side=side,
            resolutions=parse_grid(options["grids"], tile),
            max_tiles=parse_mode(image_mode) if is_tiled(image_mode) else None,
            frames=_frames(options, merge),
            **values,
        )
    except (ValueError, TypeError) as error:
        raise DataError(f"tiling: {error}") from error


def _frames(options: Mapping[str, Any], merge: str) -> FramePooling | None:
    if "frames" in options and options["frames"] is None:
        return None
    given = dict(options.get("frames") or {})
    known = [field.name for field in dataclasses.fields(FramePooling)]
    for key in given:
        if key not in known:
            raise DataError(f"tiling.frames has no key {key!r}; {near_misses(key, known)}")
    return FramePooling(**{"newline": "video" if merge == "spatial_unpad" else "none", **given})


def check_parts(image_processor: Any, tokenizer: Any, patch_size: Any, strategy: Any, image_token: str) -> None:
    """Raises DataError when a part of a processor is missing or does not fit the others."""
    if image_processor is None or tokenizer is None:
        raise DataError("a LlavaMoeProcessor needs an image_processor and a tokenizer")
    if getattr(image_processor, "backend", "pil") != "pil":
        raise DataError(
            f"{type(image_processor).__name__} uses the {image_processor.backend} backend; use its PIL twin "
            "(AutoImageProcessor.from_pretrained(..., backend='pil')), which gives the same pixels on every machine"
        )
    if not isinstance(patch_size, int) or strategy not in ("default", "full"):
        raise DataError(
            f"patch_size is {patch_size!r} and vision_feature_select_strategy {strategy!r}; set both in "
            "processor_config.json to the vision tower's patch size and to 'default' or 'full' as in config.json"
        )
    token = getattr(tokenizer, "image_token", None) or image_token
    if len(tokenizer.encode(token, add_special_tokens=False)) != 1 or token not in tokenizer.get_vocab():
        raise DataError(f"the tokenizer has no image token {token!r}; add it with add_special_tokens before assembling")


def check_directory(path: Path) -> None:
    """Raises DataError when a directory does not hold the files of a processor and a tokenizer."""
    if not path.is_dir():
        raise DataError(f"{path} is not a directory; give a checkpoint directory with a processor and a tokenizer")
    if not any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise DataError(
            f"{path} holds no processor_config.json or preprocessor_config.json; give a vision-language checkpoint, "
            "not a language model or a training output without processor"
        )
    if not any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        raise DataError(
            f"{path} holds no tokenizer (tokenizer_config.json); copy the tokenizer files of its language model"
        )


def check_mode(image_mode: str, tiling: Mapping[str, Any] | None, num_frames: int) -> None:
    """Raises DataError when a model without tiles is asked for an image mode with tiles, or a value makes no sense."""
    if is_tiled(image_mode) and tiling is None:
        raise DataError(
            f"image_mode {image_mode!r} needs a model with tiles, and this checkpoint's takes an image whole; assemble "
            "one with this image_mode (model.family llava_next or llava_onevision), or use square or pad"
        )
    if num_frames < 1:
        raise DataError(f"num_frames is {num_frames}; it must be at least 1")


def plain_image_processor(found: Any) -> Any:
    """The image processor for single tiles in the place of a stock one that cuts by itself; others are returned."""
    if not hasattr(found, "image_grid_pinpoints"):
        return found
    size = found.size
    side = size.get("shortest_edge") or size["height"]
    square = {"height": side, "width": side}
    return CLIPImageProcessorPil(
        do_resize=True,
        size=square,
        resample=found.resample,
        do_center_crop=False,
        crop_size=square,
        do_rescale=found.do_rescale,
        rescale_factor=found.rescale_factor,
        do_normalize=found.do_normalize,
        image_mean=list(found.image_mean),
        image_std=list(found.image_std),
    )


def stock_settings(path: Path, saved: Mapping[str, Any], image_processor: Any) -> dict[str, Any]:
    """What a processor of ours needs beside the parts of a stock LLaVA-NeXT or LLaVA-OneVision one.

    Args:
        path: the checkpoint; its config.json says the patch size, which OneVision's processor does not.
        saved: the content of processor_config.json.
        image_processor: the stock one.

    Raises:
        DataError: config.json is missing.
    """
    kind = str(saved.get("processor_class"))
    if kind not in _STOCK:
        return {}
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise DataError(f"{path}: no config.json beside the {kind}, which leaves the tower's patch size open")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    patch_size = saved.get("patch_size") or (config.get("vision_config") or {}).get("patch_size", 14)
    # processors of older checkpoints do not count the class token, which strategy "default" takes off
    num_extra = saved.get("num_additional_image_tokens", int(saved.get("vision_feature_select_strategy") == "default"))
    return {
        "patch_size": patch_size,
        "num_additional_image_tokens": num_extra,
        "image_mode": saved.get("vision_aspect_ratio", "anyres"),
        "tiling": {
            "grids": [list(pair) for pair in image_processor.image_grid_pinpoints],
            "several_images": _STOCK[kind],
        },
    }
