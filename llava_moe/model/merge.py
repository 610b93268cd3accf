"""Features of tiles and frames to one sequence: grid order, cut padding, anyres_max_N, newline vectors.

Suffixes: T tiles (the whole image first), F frames, N features of a tile, D width, R rows, C columns, M tokens out.
Sizes are (height, width) as in transformers. Data code counts the same tokens without tensors
(`llava_moe/data/image_grid.py`); nothing here reads a tensor's values, so nothing waits for a GPU.

Sources: the LLaVA-1.6 and LLaVA-OneVision (2408.03326) releases.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from llava_moe.registry import near_misses

Merge = Literal["flat", "spatial", "spatial_unpad", "spatial_maxpool2x2"]
UnpadRounding = Literal["exact", "llava"]
PoolMode = Literal["bilinear", "average", "max"]
FrameNewline = Literal["none", "video", "frame", "row"]

_SHRINK_ABOVE = 1.1


def _refuse(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class MergeRule:
    """How the tiles of an image become a sequence.

    Attributes:
        merge: "flat": tile after tile; "spatial": row after row of the whole image; "spatial_unpad": the same without
            padding and with the newline vector behind every row; "spatial_maxpool2x2": "spatial" after max pooling.
        base: the features of the whole image stand in front.
        max_tiles: N of anyres_max_N, or None; with "spatial_unpad" only.
        unpad_rounding: how the length without padding loses its fraction. "exact": as transformers since its pull
            request 35779; "llava": that of a floating-point product; with "spatial_unpad" only.

    Raises:
        ValueError: a value is not allowed or has no effect with this `merge`.
    """

    merge: Merge = "spatial_unpad"
    base: bool = True
    max_tiles: int | None = None
    unpad_rounding: UnpadRounding = "exact"

    def __post_init__(self) -> None:
        _refuse("merge", self.merge, get_args(Merge))
        _refuse("unpad_rounding", self.unpad_rounding, get_args(UnpadRounding))
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles is {self.max_tiles}; it must be at least 1, or null for no limit")
        if self.merge == "flat" and not self.base:
            raise ValueError("base is False, which merge 'flat' does not know; use 'spatial'")
        if self.merge != "spatial_unpad" and self.max_tiles is not None:
            raise ValueError(f"max_tiles is {self.max_tiles}, but only merge 'spatial_unpad' shrinks features")
        if self.merge != "spatial_unpad" and self.unpad_rounding != "exact":
            raise ValueError("unpad_rounding is 'llava', but only merge 'spatial_unpad' cuts off padding")

    @property
    def has_newline(self) -> bool:
        """The model needs a newline vector."""
        return self.merge == "spatial_unpad"


@dataclass(frozen=True)
class FrameRule:
    """How the frames of a video become a sequence.

    Attributes:
        stride, mode: of `pool_frames`.
        newline: of `merge_video`.

    Raises:
        ValueError: a value is not allowed.
    """

    stride: int = 2
    mode: PoolMode = "bilinear"
    newline: FrameNewline = "video"

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; it must be at least 1")
        _refuse("mode", self.mode, get_args(PoolMode))
        _refuse("newline", self.newline, get_args(FrameNewline))


def merge_rule(config: Any, vision_aspect_ratio: str | None = None) -> MergeRule:
    """The rule that a config asks for by `merge` and `vision_aspect_ratio`.

    Args:
        config: of a model with tiles.
        vision_aspect_ratio: in the place of the config's.

    Raises:
        ValueError: an option is unknown or not allowed.
    """
    name = config.vision_aspect_ratio if vision_aspect_ratio is None else vision_aspect_ratio
    found = re.fullmatch(r"anyres(?:_max_([1-9]\d*))?", name)
    if found is None:
        raise ValueError(f"config.json: vision_aspect_ratio={name!r} must be anyres or anyres_max_N, N at least 1")
    options = _options(MergeRule, "merge", config.merge, without="max_tiles")
    return MergeRule(**options, max_tiles=None if found[1] is None else int(found[1]))


def frame_rule(config: Any) -> FrameRule:
    """The rule that a config asks for by `frames`; without newline vectors in its merge, videos have none either.

    Raises:
        ValueError: an option is unknown or not allowed.
    """
    has_newline = merge_rule(config).has_newline
    rule = FrameRule(**{"newline": "video" if has_newline else "none", **_options(FrameRule, "frames", config.frames)})
    if rule.newline != "none" and not has_newline:
        raise ValueError(
            f"config.json: frames.newline={rule.newline!r}, but only merge spatial_unpad has a newline vector"
        )
    return rule


def _options(kind: type[Any], where: str, raw: dict[str, Any] | None, without: str = "") -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(kind) if field.name != without]
    for key in raw or {}:
        if key not in known:
            raise ValueError(f"config.json: {where} has no key {key!r}; {near_misses(key, known)}")
    return dict(raw or {})


def tile_grid(image_size: Sequence[int], resolutions: Sequence[Sequence[int]], tile: int) -> tuple[int, int]:
    """Rows and columns of tiles of an image.

    Args:
        image_size: (height, width) in pixels, as Python numbers: float32 arithmetic on a tensor gives other grids.
        resolutions: (height, width) in pixels, `image_grid_pinpoints` of the config.
        tile: side of a tile in pixels.
    """
    height, width = select_best_resolution((image_size[0], image_size[1]), [tuple(pair) for pair in resolutions])
    return height // tile, width // tile


def merge_images(
    features: Sequence[Tensor],
    image_sizes: Sequence[Sequence[int]],
    resolutions: Sequence[Sequence[int]],
    tile: int,
    rule: MergeRule,
    newline_D: Tensor | None,
) -> list[Tensor]:
    """All images of a batch.

    Args:
        features: (T, N, D) for each image; T = 1: it was not cut.
        image_sizes: (height, width) of each in pixels, as Python numbers.
        resolutions: as for `tile_grid`.
        tile: side of a tile in pixels.
        rule: the merge.
        newline_D: the newline vector; None where the rule has none.

    Returns:
        (M, D) for each image.

    Raises:
        ValueError: the shapes do not fit, or a newline vector is missing or has no place.
    """
    return [
        merge_single(features_TND[0], rule, newline_D)
        if features_TND.shape[0] == 1
        else merge_tiles(features_TND, tile_grid(size, resolutions, tile), size, rule, newline_D)
        for features_TND, size in zip(features, image_sizes, strict=True)
    ]


def merge_tiles(
    features_TND: Tensor, grid: tuple[int, int], image_size: Sequence[int], rule: MergeRule, newline_D: Tensor | None
) -> Tensor:
    """One image that was cut into tiles.

    Args:
        features_TND: the whole image, then the tiles row by row; N is a square number unless the merge is "flat".
        grid: rows and columns of tiles; T = 1 + rows * columns.
        image_size: (height, width) of the image in pixels.
        rule: the merge.
        newline_D: the newline vector; None where the rule has none.

    Returns:
        (M, D).

    Raises:
        ValueError: the shapes do not fit, or a newline vector is missing or has no place.
    """
    _check_newline(rule.has_newline, newline_D)
    num_tiles, num_features, width = features_TND.shape
    rows, cols = grid
    if num_tiles != 1 + rows * cols:
        raise ValueError(f"{num_tiles} tiles for a grid of {rows} x {cols}; expected {1 + rows * cols}")
    if rule.merge == "flat":
        return features_TND.reshape(-1, width)
    side = _side(num_features)
    # (rows, side, cols, side, D): a row of features runs through all tiles of its row of tiles
    parts = features_TND[1:].reshape(rows, cols, side, side, width).transpose(1, 2)
    grid_RCD = parts.reshape(rows * side, cols * side, width)
    if rule.merge == "spatial_maxpool2x2":
        grid_RCD = F.max_pool2d(grid_RCD.permute(2, 0, 1), 2).permute(1, 2, 0)
    elif rule.merge == "spatial_unpad":
        grid_RCD = _cut_padding(grid_RCD, image_size, rule.unpad_rounding)
        if rule.max_tiles is not None:
            grid_RCD = _shrink(grid_RCD, side, rule.max_tiles)
        grid_RCD = _end_rows(grid_RCD, newline_D)
    grid_MD = grid_RCD.reshape(-1, width)
    return torch.cat((features_TND[0], grid_MD)) if rule.base else grid_MD


def merge_single(features_ND: Tensor, rule: MergeRule, newline_D: Tensor | None) -> Tensor:
    """One image that is one tile: its features, and one newline if there are newlines. (M, D)."""
    _check_newline(rule.has_newline, newline_D)
    return features_ND if newline_D is None else torch.cat((features_ND, newline_D[None].to(features_ND)))


def pool_frames(features_FND: Tensor, stride: int = 2, mode: PoolMode = "bilinear") -> Tensor:
    """Every frame on a grid whose side is `stride` times smaller.

    Args:
        features_FND: N is a square number.
        stride: from 1 to the side.
        mode: "bilinear" rounds the side up, "average" and "max" drop what does not fill a window.

    Returns:
        (F, N', D).

    Raises:
        ValueError: a value is not allowed.
    """
    _refuse("mode", mode, get_args(PoolMode))
    side = _side(features_FND.shape[1])
    if not 1 <= stride <= side:
        raise ValueError(f"stride is {stride}; it must be from 1 to the {side} features along a frame's side")
    grid_FDRC = features_FND.transpose(1, 2).unflatten(2, (side, side))
    if mode == "bilinear":
        pooled = math.ceil(side / stride)
        grid_FDRC = F.interpolate(grid_FDRC, size=(pooled, pooled), mode="bilinear")
    else:
        grid_FDRC = (F.avg_pool2d if mode == "average" else F.max_pool2d)(grid_FDRC, stride)
    return grid_FDRC.flatten(2).transpose(1, 2)


def merge_video(features_FND: Tensor, newline: FrameNewline, newline_D: Tensor | None) -> Tensor:
    """Pooled frames one after the other, with newline vectors at the places asked for.

    Args:
        features_FND: N is a square number if newlines stand behind rows.
        newline: "video": one at the end; "frame": behind every frame; "row": behind every row; "none".
        newline_D: the newline vector; None with "none".

    Returns:
        (M, D).

    Raises:
        ValueError: `newline` is unknown, or the vector is missing or has no place.
    """
    _refuse("newline", newline, get_args(FrameNewline))
    _check_newline(newline != "none", newline_D)
    num_frames, num_features, width = features_FND.shape
    if newline == "frame":
        return _end_rows(features_FND, newline_D).reshape(-1, width)
    if newline == "row":
        side = _side(num_features)
        return _end_rows(features_FND.reshape(num_frames * side, side, width), newline_D).reshape(-1, width)
    flat_MD = features_FND.reshape(-1, width)
    return flat_MD if newline_D is None else torch.cat((flat_MD, newline_D[None].to(flat_MD)))


def _check_newline(wanted: bool, newline_D: Tensor | None) -> None:
    if wanted and newline_D is None:
        raise ValueError("this merge puts newline vectors between rows, and the model has none (image_newline)")
    if not wanted and newline_D is not None:
        raise ValueError("a newline vector is given, and this merge has no place for it; give None")


def _side(num_features: int) -> int:
    side = math.isqrt(num_features)
    if side * side != num_features:
        raise ValueError(
            f"{num_features} features of a tile are no square grid; drop the class token "
            "(vision_feature_select_strategy 'default'), or use merge 'flat'"
        )
    return side


def _cut_padding(grid_RCD: Tensor, image_size: Sequence[int], rounding: UnpadRounding) -> Tensor:
    """Without the rows or columns that are padding alone; as many go on one side as on the other."""
    height, width = image_size[0], image_size[1]
    rows, cols = grid_RCD.shape[:2]
    if width / height > cols / rows:
        kept = height * cols // width if rounding == "exact" else int(height * (cols / width))
        cut = (rows - kept) // 2
        return grid_RCD[cut : rows - cut]
    kept = width * rows // height if rounding == "exact" else int(width * (rows / height))
    cut = (cols - kept) // 2
    return grid_RCD[:, cut : cols - cut]


def _shrink(grid_RCD: Tensor, side: int, max_tiles: int) -> Tensor:
    """Bilinearly to the area of `max_tiles` tiles, if the sides are more than 10 % longer than that."""
    rows, cols = grid_RCD.shape[:2]
    ratio = math.sqrt(rows * cols / (max_tiles * side**2))
    if ratio <= _SHRINK_ABOVE:
        return grid_RCD
    size = (max(1, int(rows // ratio)), max(1, int(cols // ratio)))
    return F.interpolate(grid_RCD.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].permute(1, 2, 0)


def _end_rows(grid_RCD: Tensor, newline_D: Tensor | None) -> Tensor:
    """(R, C, D) to (R, C + 1, D)."""
    assert newline_D is not None
    return torch.cat((grid_RCD, newline_D.to(grid_RCD).expand(grid_RCD.shape[0], 1, -1)), dim=1)
