"""anyres by definition: one image, its tiles and its sequence, in numpy and loops, straight from the rules.

LLaVA's point of view: sizes are (width, height). Where both implementations of the package divide and round, this one
searches, counts or copies.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

Pair = tuple[int, int]
Array = np.ndarray[Any, np.dtype[np.float64]]

# (height, width): square, prime, tiny, huge, extremely long, just beside a grid's own ratio, and sizes of the reports
# (transformers #33501: 950 x 1256; #35775 and others: the ratios that end a hair below a whole number of features)
ODD_SIZES: tuple[Pair, ...] = (
    (1, 1), (1, 2), (2, 1), (7, 7), (13, 17), (17, 13), (27, 27), (28, 28), (31, 97), (97, 31), (100, 100), (101, 99),
    (120, 160), (223, 227), (224, 224), (239, 241), (333, 1001), (335, 337), (336, 336), (336, 672), (337, 335),
    (337, 337), (383, 385), (384, 384), (385, 383), (400, 300), (427, 640), (480, 640), (500, 375), (500, 333),
    (640, 427), (641, 479), (672, 336), (673, 671), (700, 840), (767, 769), (768, 1152), (800, 600), (950, 1256),
    (1001, 333), (1008, 336), (1024, 768), (1080, 1920), (1153, 769), (1256, 950), (1920, 1080), (2303, 2305),
    (2304, 2304), (3000, 40), (40, 3000), (4032, 3024), (1, 3000), (3000, 1), (5000, 4999), (199, 487), (257, 509),
    (610, 1453), (863, 1201),
)  # fmt: skip


def best_resolution(image: Pair, candidates: list[Pair]) -> Pair:
    """(width, height): candidates are looked at in their order, a later one has to be strictly better."""
    width, height = image
    best, best_kept, best_waste = candidates[0], -1, 0
    for candidate in candidates:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = candidate[0] * candidate[1] - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = candidate, kept, waste
    return best


def resized(image: Pair, target: Pair) -> Pair:
    """(width, height) inside the target: LLaVA's `resize_and_pad_image`."""
    scale_w, scale_h = target[0] / image[0], target[1] / image[1]
    if scale_w < scale_h:
        return target[0], min(math.ceil(image[1] * scale_w), target[1])
    return min(math.ceil(image[0] * scale_h), target[0]), target[1]


def without_padding(canvas: Array, image: Pair, rounding: str) -> Array:
    """Cuts rows or columns off in pairs, one at each end, while the rest still holds the image without its fraction."""
    rows, cols = canvas.shape[:2]
    width, height = image
    if Fraction(width, height) > Fraction(cols, rows):  # as wide as the canvas: padding above and below
        exact = math.floor(Fraction(height * cols, width))
        kept = exact if rounding == "exact" else int(height * (cols / width))
        while canvas.shape[0] - 2 >= kept:
            canvas = canvas[1:-1]
        return canvas
    exact = math.floor(Fraction(width * rows, height))
    kept = exact if rounding == "exact" else int(width * (rows / height))
    while canvas.shape[1] - 2 >= kept:
        canvas = canvas[:, 1:-1]
    return canvas


def bilinear(grid: Array, rows: int, cols: int) -> Array:
    """Each output cell's middle is looked up between the middles of the input cells; beyond the edge: the edge."""
    for axis, length in ((0, rows), (1, cols)):
        old = grid.shape[axis]
        place = np.clip((np.arange(length) + 0.5) * (old / length) - 0.5, 0, None)
        low = np.minimum(np.floor(place).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, high, axis) * share
    return grid


def shrunk(canvas: Array, side: int, max_tiles: int) -> Array:
    rows, cols = canvas.shape[:2]
    times = math.sqrt(rows * cols / (max_tiles * side**2))
    if times <= 1.1:
        return canvas
    return bilinear(canvas, max(1, int(rows // times)), max(1, int(cols // times)))


def tile_counts(size: Pair, resolutions: list[Pair], tile: int) -> Pair:
    """(rows, columns) of tiles; `size` and `resolutions` are (height, width)."""
    width, height = best_resolution((size[1], size[0]), [(w, h) for h, w in resolutions])
    return height // tile, width // tile


def sequence(
    features: Array,
    size: Pair,
    counts: Pair,
    merge: str,
    *,
    base: bool = True,
    max_tiles: int | None = None,
    rounding: str = "exact",
    newline: Array | None = None,
) -> Array:
    """The sequence (M, D) of an image from the features (T, N, D) of its tiles; `size` is (height, width)."""
    side = math.isqrt(features.shape[1])
    if merge == "flat":
        return np.concatenate(list(features))
    rows, cols = counts
    canvas = np.zeros((rows * side, cols * side, features.shape[2]))
    for row in range(rows):
        for col in range(cols):
            tile = features[1 + row * cols + col].reshape(side, side, -1)
            canvas[row * side : (row + 1) * side, col * side : (col + 1) * side] = tile
    out = [features[0]] if base else []
    if merge == "spatial_maxpool2x2":
        canvas = np.maximum.reduce(
            [canvas[i : canvas.shape[0] // 2 * 2 : 2, j : canvas.shape[1] // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]
        )
    elif merge == "spatial_unpad":
        canvas = without_padding(canvas, (size[1], size[0]), rounding)
        if max_tiles is not None:
            canvas = shrunk(canvas, side, max_tiles)
    for line in canvas:
        out.append(line)
        if newline is not None:
            out.append(newline[None])
    return np.concatenate([*out, np.zeros((0, features.shape[2]))])
