"""How a LLaVA checkpoint sees pictures, from its config.json: whole, or as tiles (LLaVA-1.6, LLaVA-NeXT, OneVision).

A model of tiles becomes `LlavaNextMoeConfig`, or `LlavaOnevisionMoeConfig` where it limits its tokens (anyres_max_N):
these are the two that transformers has counterparts for. LLaVA rounds the padding that it cuts off in floating point;
`unpad_rounding: llava` keeps that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_moe.model.configuration import LlavaMoeConfig, LlavaNextMoeConfig, LlavaOnevisionMoeConfig
from llava_moe.model.formats.parts import Options, Parts
from llava_moe.model.modeling import CheckpointError

WHOLE = {None: "square", "square": "square", "pad": "pad"}
_ANYRES = re.compile(r"anyres(_max_[1-9]\d*)?")
_GRIDS_1_6 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_NEWLINES = {"one_token": "video", "grid": "row", "frame": "frame", "no_token": "none"}
_VIDEO_KEYS = ("mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride")
ReadGrids = Callable[[Any, int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Seeing:
    """Pictures of a checkpoint.

    Attributes:
        image_mode: of the processor.
        config_class: the family.
        values: keys of its config.
        tiling: of the processor; None where a picture is taken whole.
        has_newline: whether there is a newline vector in the model.
    """

    image_mode: str
    config_class: Any
    values: dict[str, Any]
    tiling: dict[str, Any] | None = None
    has_newline: bool = False


def read_seeing(parts: Parts, options: Options, tile: int) -> Seeing:
    """What config.json asks for, unless the user says otherwise.

    Args:
        tile: side of the tower's input in pixels.

    Raises:
        CheckpointError: no class here sees pictures like this.
    """
    raw = parts.raw
    if raw.get("mm_use_im_start_end"):
        raise CheckpointError(
            f"{parts.where}: mm_use_im_start_end puts tokens around every picture (LLaVA before 1.5), which no "
            "template here does"
        )
    if raw.get("mm_resampler_type") not in (None, "identity"):
        raise CheckpointError(
            f"{parts.where}: mm_resampler_type={raw['mm_resampler_type']!r} makes fewer tokens of a picture in a way "
            "that no class here does"
        )
    if options.image_mode is not None:
        return Seeing(options.image_mode, LlavaMoeConfig, {})
    asked = raw.get("image_aspect_ratio")
    if asked in WHOLE:
        return Seeing(WHOLE[asked], LlavaMoeConfig, {})
    if _ANYRES.fullmatch(str(asked)) is None:
        raise CheckpointError(
            f"{parts.where}: image_aspect_ratio={asked!r} is none of square, pad, anyres and anyres_max_N; "
            "--image-mode pad (or square) imports it as a model that takes a picture whole"
        )
    return _tiled(parts, options, str(asked), tile)


def _tiled(parts: Parts, options: Options, asked: str, tile: int) -> Seeing:
    raw = parts.raw
    merge = _merge(str(raw.get("mm_patch_merge_type", "flat")), parts.where)
    has_newline = merge["merge"] == "spatial_unpad"
    if has_newline and parts.newline is None:
        raise CheckpointError(f"{parts.where}: model.image_newline is missing, which mm_patch_merge_type asks for")
    limited = "max" in asked and has_newline  # the limit belongs to that merge
    frames = _frames(raw, has_newline) if any(raw.get(key) is not None for key in _VIDEO_KEYS) else None
    if options.read_grids is None:
        raise CheckpointError(f"{parts.where}: its grids of tiles cannot be read; use llava_moe.convert")
    try:
        grids = [list(pair) for pair in options.read_grids(raw.get("image_grid_pinpoints") or _GRIDS_1_6, tile)]
    except ValueError as error:
        raise CheckpointError(f"{parts.where}: config.json: {error}") from error
    mode = asked if limited else "anyres"
    values = {"image_grid_pinpoints": grids, "vision_aspect_ratio": mode, "merge": merge, "frames": frames}
    # LLaVA-1.6 cuts every picture of a sample; its successors, which know videos, show several as one tile each
    several = "anyres" if frames is None else "pad"
    tiling = {"grids": grids, **merge, "several_images": several, "frames": frames}
    family = LlavaOnevisionMoeConfig if limited else LlavaNextMoeConfig
    return Seeing(mode, family, values, tiling, has_newline)


def _merge(asked: str, where: str) -> dict[str, Any]:
    """LLaVA looks for words in the name of a merge, in this order."""
    if asked == "flat":
        return {"merge": "flat"}
    if not asked.startswith("spatial"):
        raise CheckpointError(
            f"{where}: mm_patch_merge_type={asked!r} is neither flat nor one that begins with spatial"
        )
    base = {"base": False} if "nobase" in asked else {}
    if "maxpool2x2" in asked:
        return {"merge": "spatial_maxpool2x2", **base}
    return {"merge": "spatial_unpad", "unpad_rounding": "llava", **base} if "unpad" in asked else {"merge": "spatial"}


def _frames(raw: dict[str, Any], has_newline: bool) -> dict[str, Any]:
    newline = _NEWLINES.get(str(raw.get("mm_newline_position") or "one_token"), "video") if has_newline else "none"
    return {
        "stride": int(raw.get("mm_spatial_pool_stride") or 2),
        "mode": str(raw.get("mm_spatial_pool_mode") or "bilinear"),
        "newline": newline,
    }
