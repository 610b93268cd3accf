"""Puts transparent drawings on a light canvas: one thing plain, one thing augmented, or several things in places.

All sizes follow from the canvas side, so that the smoke profile (32 px) and the default (128 px) share the code.
Random choices come from a `numpy.random.Generator`, never from global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

QUADRANTS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))
WHITE = (255, 255, 255)


def light_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A flat light colour (flat keeps the PNG small)."""
    red, green, blue = rng.integers(205, 256, size=3)
    return int(red), int(green), int(blue)


def paste(canvas: Image.Image, art: Image.Image, centre: tuple[float, float], side: int) -> None:
    """Draws RGBA `art`, resized to `side`, at the relative `centre`."""
    art = art.resize((side, side), Image.Resampling.BICUBIC)
    left = round(centre[0] * canvas.width - side / 2)
    top = round(centre[1] * canvas.height - side / 2)
    canvas.paste(art, (left, top), art)


def plain(art: Image.Image, side: int) -> Image.Image:
    """The fixed rendering used for tests: centred, 80 % of a white canvas."""
    canvas = Image.new("RGB", (side, side), WHITE)
    paste(canvas, art, (0.5, 0.5), round(0.8 * side))
    return canvas


def augmented(art: Image.Image, side: int, rng: np.random.Generator, flip: bool = True, turn: float = 8) -> Image.Image:
    """A training rendering: random light ground, scale, place, turn of up to `turn` degrees, and perhaps a flip."""
    canvas = Image.new("RGB", (side, side), light_background(rng))
    if flip and rng.random() < 0.5:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    art = art.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC)
    scale = rng.uniform(0.72, 0.9)
    slack = (1 - scale) / 2
    centre = (0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))
    paste(canvas, art, centre, round(scale * side))
    return canvas


def scene(
    arts: Sequence[Image.Image], centres: Sequence[tuple[float, float]], side: int, rng: np.random.Generator
) -> Image.Image:
    """Several drawings of about 0.42 of the canvas at jittered relative centres on one light ground."""
    canvas = Image.new("RGB", (side, side), light_background(rng))
    for art, (x, y) in zip(arts, centres, strict=True):
        jitter_x, jitter_y = rng.uniform(-0.04, 0.04, size=2)
        paste(canvas, art, (x + jitter_x, y + jitter_y), round(rng.uniform(0.38, 0.46) * side))
    return canvas


def pick_quadrants(count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """`count` (at most four) different quadrant centres in random order."""
    return [QUADRANTS[index] for index in rng.permutation(4)[:count]]


class ImageStore:
    """Keeps pictures as PNG: files below `folder` for training, bytes in memory for evaluation records."""

    def __init__(self, side: int, folder: Path | None = None) -> None:
        self.side = side
        self.folder = folder
        self._bytes: dict[str, bytes] = {}
        self._keys: set[str] = set()

    def put(self, key: str, picture: Image.Image | bytes) -> str:
        """Stores one picture under `key` (without suffix) and returns its relative path.

        Raises:
            ValueError: the key is taken.
        """
        path = f"{key}.png"
        if path in self._keys:
            raise ValueError(f"two pictures under the key {key!r}")
        self._keys.add(path)
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            picture = buffer.getvalue()
        if self.folder is None:
            self._bytes[path] = picture
        else:
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(picture)
        return path

    def read(self, path: str) -> bytes:
        """The PNG bytes of a stored picture."""
        return self._bytes[path] if self.folder is None else (self.folder / path).read_bytes()

    def __contains__(self, path: str) -> bool:
        return path in self._keys

    def __len__(self) -> int:
        return len(self._keys)
