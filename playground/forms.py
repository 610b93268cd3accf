"""Procedural pictures: coloured shapes, outline forms of four kinds, striped flags and printed digits.

They stand in for whatever asset is missing, and they are all that the smoke profile uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from playground.scenes import light_background
from playground.things import Catalogue, Thing, held_out_concepts

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "black": (25, 25, 25),
    "gray": (130, 130, 130),
    "teal": (20, 150, 150),
    "brown": (140, 80, 30),
    "yellow": (225, 200, 30),
}
SHAPES = ("circle", "rectangle", "triangle")
_SUPERSAMPLE = 4


def _polygon(corners: int, turn: float = -90.0, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corner points in -1..1; `inner` below 1 pulls every second one in (a star)."""
    points = []
    for index in range(corners):
        radius = inner if index % 2 else 1.0
        angle = math.radians(turn + 360 * index / corners)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


_CROSS = [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3)]
_POLYGONS: dict[str, tuple[str, list[tuple[float, float]]]] = {
    "triangle": ("polygon", _polygon(3)),
    "square": ("polygon", _polygon(4, -45)),
    "diamond": ("polygon", [(0, -1), (0.6, 0), (0, 1), (-0.6, 0)]),
    "pentagon": ("polygon", _polygon(5)),
    "hexagon": ("polygon", _polygon(6, 0)),
    "star": ("pointed", _polygon(10, inner=0.42)),
    "spark": ("pointed", _polygon(8, inner=0.3)),
    "sun": ("pointed", _polygon(24, inner=0.7)),
    "cross": ("pointed", [*_CROSS, (-1, 0.3), (-1, -0.3), (-0.3, -0.3)]),
    "arrow": ("pointed", [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]),
    "bars": ("striped", []),
    "ladder": ("striped", []),
    "grid": ("striped", []),
    "rungs": ("striped", []),
    "ball": ("round", []),
    "ring": ("round", []),
    "egg": ("round", []),
    "moon": ("round", []),
    "bowl": ("round", []),
}


def draw_form(name: str, side: int, colour: Colour) -> Image.Image:
    """One form on a transparent square of `side` pixels."""
    big = side * _SUPERSAMPLE
    mask = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(mask)
    points = _POLYGONS[name][1]
    if points:
        pen.polygon([((x * 0.94 + 1) * big / 2, (y * 0.94 + 1) * big / 2) for x, y in points], fill=255)
    else:
        _DRAWERS[name](pen, big)
    art = Image.new("RGBA", (big, big), (*colour, 0))
    art.putalpha(mask)
    return art.resize((side, side), Image.Resampling.LANCZOS)


def _box(big: int, *edges: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = (edge * big for edge in edges)
    return left, top, right, bottom


def _bars(pen: ImageDraw.ImageDraw, big: int) -> None:
    for start in (0.05, 0.3, 0.55, 0.8):
        pen.rectangle(_box(big, start, 0.05, start + 0.14, 0.95), fill=255)


def _rungs(pen: ImageDraw.ImageDraw, big: int) -> None:
    for start in (0.05, 0.3, 0.55, 0.8):
        pen.rectangle(_box(big, 0.05, start, 0.95, start + 0.14), fill=255)


def _grid(pen: ImageDraw.ImageDraw, big: int) -> None:
    _bars(pen, big)
    _rungs(pen, big)


def _ladder(pen: ImageDraw.ImageDraw, big: int) -> None:
    _rungs(pen, big)
    for start in (0.15, 0.75):
        pen.rectangle(_box(big, start, 0.02, start + 0.1, 0.98), fill=255)


def _ball(pen: ImageDraw.ImageDraw, big: int) -> None:
    pen.ellipse(_box(big, 0.04, 0.04, 0.96, 0.96), fill=255)


def _ring(pen: ImageDraw.ImageDraw, big: int) -> None:
    _ball(pen, big)
    pen.ellipse(_box(big, 0.28, 0.28, 0.72, 0.72), fill=0)


def _egg(pen: ImageDraw.ImageDraw, big: int) -> None:
    pen.ellipse(_box(big, 0.2, 0.04, 0.8, 0.96), fill=255)


def _moon(pen: ImageDraw.ImageDraw, big: int) -> None:
    _ball(pen, big)
    pen.ellipse(_box(big, 0.3, 0.0, 1.1, 0.8), fill=0)


def _bowl(pen: ImageDraw.ImageDraw, big: int) -> None:
    pen.pieslice(_box(big, 0.04, -0.4, 0.96, 0.9), 0, 180, fill=255)


_DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "bars": _bars,
    "rungs": _rungs,
    "grid": _grid,
    "ladder": _ladder,
    "ball": _ball,
    "ring": _ring,
    "egg": _egg,
    "moon": _moon,
    "bowl": _bowl,
}


def form_catalogue(side: int) -> Catalogue:
    """Nineteen forms of four kinds in place of the emoji; the colour of a drawing is random."""
    held_out = held_out_concepts({name: kind for name, (kind, _) in _POLYGONS.items()})
    things = tuple(Thing(name, name, kind, name, name in held_out, name) for name, (kind, _) in _POLYGONS.items())
    palette = list(COLOURS.values())

    def draw(thing: Thing, rng: np.random.Generator) -> Image.Image:
        return draw_form(thing.key, side, palette[int(rng.integers(len(palette)))])

    return Catalogue(things, draw, varied=True)


def draw_shape(shape: str, colour: str, side: int, rng: np.random.Generator) -> Image.Image:
    """One coloured circle, rectangle or triangle of random size and place on a light ground (RGB)."""
    big = side * _SUPERSAMPLE
    canvas = Image.new("RGB", (big, big), light_background(rng))
    pen = ImageDraw.Draw(canvas)
    width, height = rng.uniform(0.25, 0.6, size=2) * big
    if shape == "circle":
        height = width
    left, top = rng.uniform(0, big - width), rng.uniform(0, big - height)
    box = (left, top, left + width, top + height)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "rectangle":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(left, top + height), (left + width, top + height), (left + width / 2, top)], fill=COLOURS[colour])
    return canvas.resize((side, side), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Flag:
    """Three (or two) stripes of a country."""

    country: str
    vertical: bool
    stripes: tuple[Colour, ...]


_RED, _BLUE, _WHITE, _GREEN, _GOLD, _BLACK = (
    (206, 17, 38),
    (0, 56, 168),
    (250, 250, 250),
    (0, 130, 70),
    (255, 205, 0),
    (20, 20, 20),
)
FLAGS = (
    Flag("france", True, (_BLUE, _WHITE, _RED)),
    Flag("italy", True, (_GREEN, _WHITE, _RED)),
    Flag("ireland", True, (_GREEN, _WHITE, (255, 136, 62))),
    Flag("belgium", True, (_BLACK, _GOLD, _RED)),
    Flag("nigeria", True, (_GREEN, _WHITE, _GREEN)),
    Flag("peru", True, (_RED, _WHITE, _RED)),
    Flag("germany", False, (_BLACK, _RED, _GOLD)),
    Flag("austria", False, (_RED, _WHITE, _RED)),
    Flag("hungary", False, (_RED, _WHITE, _GREEN)),
    Flag("russia", False, (_WHITE, _BLUE, _RED)),
    Flag("ukraine", False, (_BLUE, _GOLD)),
    Flag("poland", False, (_WHITE, _RED)),
)


def draw_flag(flag: Flag, side: int) -> Image.Image:
    """The flag, three wide to two high, on a transparent square."""
    art = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(art)
    top, height = side // 6, side - 2 * (side // 6)
    length = side if flag.vertical else height
    for index, colour in enumerate(flag.stripes):
        start, end = (round(length * step / len(flag.stripes)) for step in (index, index + 1))
        box = (start, top, end - 1, top + height - 1) if flag.vertical else (0, top + start, side - 1, top + end - 1)
        pen.rectangle(box, fill=colour)
    return art


def draw_digit(digit: int, side: int, rng: np.random.Generator) -> Image.Image:
    """A printed digit, white on dark and slightly turned (RGB), in place of a handwritten one."""
    canvas = Image.new("L", (side, side), int(rng.integers(0, 40)))
    font = ImageFont.load_default(size=int(side * rng.uniform(0.55, 0.8)))
    ImageDraw.Draw(canvas).text((side / 2, side / 2), str(digit), fill=255, font=font, anchor="mm")
    return canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC).convert("RGB")
