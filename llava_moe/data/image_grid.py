"""anyres in integers: which resolution an image is shown at, its tiles, and how many tokens it becomes.

Every size here is (height, width), as in transformers; LLaVA writes (width, height). The numbers are those of the model
side (`llava_moe/model/merge.py`), which data code may not import; the tests hold both to one independent evaluation.

Sources: LLaVA-1.5 (2310.03744, A.1), the LLaVA-1.6 and LLaVA-OneVision (2408.03326, section 3.2) releases.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Size = tuple[int, int]
"""(height, width) in pixels, or (rows, columns) of tiles or features."""

Merge = Literal["flat", "spatial", "spatial_unpad", "spatial_maxpool2x2"]
SeveralImages = Literal["pad", "anyres"]
UnpadRounding = Literal["exact", "llava"]
PoolMode = Literal["bilinear", "average", "max"]
FrameNewline = Literal["none", "video", "frame", "row"]
Order = Literal["height_width", "width_height"]

LLAVA_1_6_PAIRS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""`image_grid_pinpoints` of LLaVA-1.6 in tiles; the same numbers with width first in LLaVA, height first elsewhere."""

SHRINK_ABOVE = 1.1
"""anyres_max_N leaves a grid alone whose sides are up to 10 % longer than N tiles allow."""


def _refuse(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


def parse_mode(name: str) -> int | None:
    """The N of "anyres_max_N", None for "anyres".

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"anyres(?:_max_([1-9]\d*))?", name)
    if found is None:
        raise ValueError(f"image mode {name!r} is no anyres mode; write 'anyres' or 'anyres_max_N' with N at least 1")
    return None if found[1] is None else int(found[1])


def parse_grid(value: str | Sequence[Sequence[int]], tile: int, order: Order = "height_width") -> tuple[Size, ...]:
    """The resolutions an image may be shown at, in pixels and in the order given (the order decides ties).

    Args:
        value: "llava-1.6"; a range of tile counts "(1x1),...,(6x6)"; or pairs of pixels, as a list or as its text.
        tile: side of a tile in pixels.
        order: what the two numbers of a pair are. LLaVA's config.json has width first, transformers' height first. With
            the list of LLaVA-1.6 an image no larger than a tile is a tie: two tiles one above the other in LLaVA, side
            by side in transformers, and another number of tokens.

    Raises:
        ValueError: the text has another form, or a resolution is not made of whole tiles.
    """
    _refuse("grid order", order, get_args(Order))
    if value == "llava-1.6":
        pairs = [(first * tile, second * tile) for first, second in LLAVA_1_6_PAIRS]
    elif isinstance(value, str) and re.search(r"\d\s*x\s*\d", value):
        pairs = [(first * tile, second * tile) for first, second in _tile_range(value)]
    else:
        pairs = _pixel_pairs(value)
    if not pairs:
        raise ValueError("image_grid_pinpoints is empty; give at least one resolution")
    for pair in pairs:
        if min(pair) < tile or any(length % tile for length in pair):
            raise ValueError(f"image_grid_pinpoints has {pair}; both sides must be positive multiples of {tile}")
    return tuple(pairs) if order == "height_width" else tuple((second, first) for first, second in pairs)


def _tile_range(text: str) -> list[Size]:
    """(1x1),...,(6x6): all pairs between the first and the last, the second number running fastest."""
    found = [(int(first), int(second)) for first, second in re.findall(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)", text)]
    if not found:
        raise ValueError(f"image_grid_pinpoints is {text!r}; write a range of tile counts as '(1x1),...,(6x6)'")
    (first_low, second_low), (first_high, second_high) = found[0], found[-1]
    full = [(i, j) for i in range(first_low, first_high + 1) for j in range(second_low, second_high + 1)]
    if "..." not in text and found != full:
        # LLaVA-NeXT reads such a list as a range too, whatever stands in the middle
        raise ValueError(
            f"image_grid_pinpoints is {text!r}, which LLaVA-NeXT reads as the range from {found[0]} to {found[-1]}; "
            "write it as '(1x1),...,(6x6)', or list the resolutions in pixels"
        )
    return full


def _pixel_pairs(value: str | Sequence[Sequence[int]]) -> list[Size]:
    try:
        raw = ast.literal_eval(value) if isinstance(value, str) else value
        pairs = [(first, second) for first, second in raw]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(
            f"image_grid_pinpoints is {value!r}; allowed are 'llava-1.6', '(1x1),...,(6x6)' and pairs of pixels"
        ) from None
    for number in (number for pair in pairs for number in pair):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"image_grid_pinpoints holds {number!r}; allowed are whole numbers of pixels")
    return pairs


def select_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most pixels of the image; of equal ones that with the least waste, then the first."""
    height, width = size

    def merit(resolution: Size) -> tuple[int, int]:
        # in this order of operations, as LLaVA and transformers have it: the rounding of the products decides ties
        scale = min(resolution[1] / width, resolution[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - resolution[0] * resolution[1]

    return max(resolutions, key=merit)  # the first of equals


def fitted_size(size: Size, resolution: Size) -> Size:
    """The size of the image inside its resolution: ratio kept, one side filled, the other rounded up."""
    (height, width), (full_height, full_width) = size, resolution
    scale_y, scale_x = full_height / height, full_width / width
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), full_height), full_width
    return full_height, min(math.ceil(width * scale_y), full_width)


def unpadded(size: Size, grid: Size, rounding: UnpadRounding = "exact") -> Size:
    """Rows and columns left of a grid of features when the rows or columns of pure padding are cut off.

    As many are cut on one side as on the other, so one row of padding may stay. "exact" is what transformers computes
    since its pull request 35779; "llava" drops the fraction of a floating-point product, which may lie just below a
    whole number: then two more rows go.
    """
    (height, width), (rows, cols) = size, grid
    if width / height > cols / rows:
        kept = height * cols // width if rounding == "exact" else int(height * (cols / width))
        return rows - 2 * ((rows - kept) // 2), cols
    kept = width * rows // height if rounding == "exact" else int(width * (rows / height))
    return rows, cols - 2 * ((cols - kept) // 2)


def shrunk(grid: Size, side: int, max_tiles: int) -> Size:
    """Rows and columns after anyres_max_N: scaled down to the area of N tiles if more than 10 % longer; at least 1."""
    rows, cols = grid
    ratio = math.sqrt(rows * cols / (max_tiles * side**2))
    return (max(1, int(rows // ratio)), max(1, int(cols // ratio))) if ratio > SHRINK_ABOVE else grid


@dataclass(frozen=True)
class FramePooling:
    """The features of every frame of a video are pooled (LLaVA-NeXT-Video, LLaVA-OneVision 2408.03326).

    Attributes:
        stride: how many times smaller a side becomes; 1 leaves the frames alone.
        mode: "bilinear" rounds the side up, "average" and "max" drop what does not fill a window.
        newline: where newline vectors stand. "video": one at the end (LLaVA's `one_token`), "frame": behind every
            frame, "row": behind every row (`grid`), "none" (`no_token`).

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

    def num_tokens(self, num_frames: int, side: int) -> int:
        """Tokens of `num_frames` frames of side x side features each, newlines included.

        Raises:
            ValueError: there is no frame, or the stride is longer than the side.
        """
        if num_frames < 1:
            raise ValueError(f"a video of {num_frames} frames; it must have at least 1")
        if self.stride > side:
            raise ValueError(f"stride is {self.stride}, more than the {side} features along a frame's side")
        pooled = math.ceil(side / self.stride) if self.mode == "bilinear" else side // self.stride
        newlines = {"none": 0, "video": 1, "frame": num_frames, "row": num_frames * pooled}
        return num_frames * pooled**2 + newlines[self.newline]


@dataclass(frozen=True)
class ImagePlan:
    """What becomes of one image of a sample.

    Attributes:
        size: (height, width) in pixels.
        resolution: what the tiles are cut from, (height, width) in pixels; None: the image is one padded square tile.
        num_tiles: pictures for the vision tower.
        num_tokens: placeholders in the sequence.
    """

    size: Size
    resolution: Size | None
    num_tiles: int
    num_tokens: int


@dataclass(frozen=True)
class Tiling:
    """The anyres mode of a checkpoint.

    Attributes:
        tile: side of a tile in pixels; the vision tower's image size.
        side: features along a side of a tile, behind the projector.
        resolutions: (height, width) in pixels that an image may be shown at; see `parse_grid`.
        merge: how the features of the tiles become a sequence, `mm_patch_merge_type` of LLaVA. "flat": tile after tile;
            "spatial": row after row of the whole image; "spatial_unpad": the same without padding and with a newline
            vector behind every row; "spatial_maxpool2x2": "spatial" of every second row and column.
        base: the features of the whole image stand in front ("nobase" in LLaVA's merge type: False).
        max_tiles: N of anyres_max_N, or None.
        several_images: "pad": the images of a sample with more than one are a padded square tile each (LLaVA-NeXT's
            training code, LLaVA-OneVision); "anyres": each is cut into tiles (transformers' LLaVA-NeXT).
        unpad_rounding: see `unpadded`.
        frames: how the frames of a video are pooled; None: no videos.

    Raises:
        ValueError: a value is not allowed, or an option has no effect with this `merge`.
    """

    tile: int
    side: int
    resolutions: tuple[Size, ...]
    merge: Merge = "spatial_unpad"
    base: bool = True
    max_tiles: int | None = None
    several_images: SeveralImages = "pad"
    unpad_rounding: UnpadRounding = "exact"
    frames: FramePooling | None = None

    def __post_init__(self) -> None:
        for key in ("tile", "side"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        _refuse("merge", self.merge, get_args(Merge))
        _refuse("several_images", self.several_images, get_args(SeveralImages))
        _refuse("unpad_rounding", self.unpad_rounding, get_args(UnpadRounding))
        parse_grid(self.resolutions, self.tile)
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles is {self.max_tiles}; it must be at least 1, or null for no limit")
        if self.merge == "flat" and not self.base:
            raise ValueError("base is False, which merge 'flat' does not know; use 'spatial'")
        if self.merge == "spatial_unpad":
            return
        if self.max_tiles is not None:
            raise ValueError(f"max_tiles is {self.max_tiles}, but only merge 'spatial_unpad' shrinks features")
        if self.unpad_rounding != "exact":
            raise ValueError("unpad_rounding is 'llava', but only merge 'spatial_unpad' cuts off padding")
        if self.frames is not None and self.frames.newline != "none":
            raise ValueError(
                f"frames.newline is {self.frames.newline!r}, but only merge 'spatial_unpad' has a newline vector; "
                "allowed here: 'none'"
            )

    def tile_grid(self, size: Size) -> Size:
        """Rows and columns of tiles of an image that is cut."""
        height, width = select_resolution(size, self.resolutions)
        return height // self.tile, width // self.tile

    def num_tokens(self, size: Size) -> int:
        """Tokens of an image that is cut into tiles, the whole image in front and the newlines included."""
        return self._num_grid_tokens(self.tile_grid(size), size) + (self.side**2 if self.base else 0)

    def _num_grid_tokens(self, tile_grid: Size, size: Size) -> int:
        rows, cols = tile_grid[0] * self.side, tile_grid[1] * self.side
        if self.merge in ("flat", "spatial"):
            return rows * cols
        if self.merge == "spatial_maxpool2x2":
            return (rows // 2) * (cols // 2)
        rows, cols = unpadded(size, (rows, cols), self.unpad_rounding)
        if self.max_tiles is not None:
            rows, cols = shrunk((rows, cols), self.side, self.max_tiles)
        return rows * (cols + 1)

    @property
    def num_single_tokens(self) -> int:
        """Tokens of an image that is one tile; it ends in one newline if there are newlines at all."""
        return self.side**2 + (1 if self.merge == "spatial_unpad" else 0)

    def num_video_tokens(self, num_frames: int) -> int:
        """Tokens of a video of which `num_frames` frames are shown.

        Raises:
            ValueError: this mode has no videos.
        """
        if self.frames is None:
            raise ValueError("frames is null, so there are no videos; say how their frames are pooled")
        return self.frames.num_tokens(num_frames, self.side)

    def plan(self, sizes: Sequence[Size]) -> list[ImagePlan]:
        """What becomes of the images of one sample, in the order of their markers.

        Raises:
            ValueError: a size is not positive.
        """
        for size in sizes:
            if min(size) < 1:
                raise ValueError(f"an image is {size[0]} pixels high and {size[1]} wide; both must be at least 1")
        if len(sizes) > 1 and self.several_images == "pad":
            return [ImagePlan(size, None, 1, self.num_single_tokens) for size in sizes]
        plans = []
        for size in sizes:
            rows, cols = self.tile_grid(size)
            resolution = (rows * self.tile, cols * self.tile)
            plans.append(ImagePlan(size, resolution, 1 + rows * cols, self.num_tokens(size)))
        return plans
