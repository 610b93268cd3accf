"""How a tiny snapshot of a data set is described and written; the data sets themselves are in imitations.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Features
from PIL import Image as PilImage

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        row: the record as it is stored, with colours in the place of pictures.
        right: the answer of a model that sees.
        planned: the answer of the model with planned mistakes.
    """

    row: dict[str, Any]
    right: str
    planned: str = ""

    @property
    def mistaken(self) -> str:
        return self.planned or self.right


@dataclass(frozen=True)
class Part:
    """One split of a data set: `path` is its file, `items` its questions, `pictures` its columns with pictures."""

    config: str
    split: str
    path: str
    features: Features
    items: Sequence[Item]
    pictures: tuple[str, ...] = ("image",)


@dataclass(frozen=True)
class Imitation:
    """One data set. `stated` tells whether its card names configurations, or leaves them to the files' names."""

    repo: str
    parts: Sequence[Part]
    stated: bool = True
    licence: str | None = None


def colour(data_set: int, row: int, picture: int = 0) -> Colour:
    return (10 + 20 * data_set, 10 + 8 * row, 10 + 40 * picture)


def picture(code: Colour) -> PilImage.Image:
    return PilImage.new("RGB", (24, 16), code)


def code_of(image: PilImage.Image) -> Colour:
    red, green, blue = image.convert("RGB").getpixel((0, 0))
    return (red, green, blue)


def write(folder: Path, imitation: Imitation) -> Path:
    """A snapshot as the Hub has it: parquet files, and the card that names them."""
    place = folder / imitation.repo
    infos: dict[str, dict[str, Any]] = {}
    configs: dict[str, list[dict[str, str]]] = {}
    for part in imitation.parts:
        path = place / part.path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                name: picture(value) if name in part.pictures and value is not None else value
                for name, value in item.row.items()
                if name in part.features
            }
            for item in part.items
        ]
        Dataset.from_list(rows, features=part.features).to_parquet(path)
        info = infos.setdefault(part.config, {"config_name": part.config, "splits": [], "download_size": 1})
        info["splits"].append({"name": part.split, "num_bytes": path.stat().st_size, "num_examples": len(rows)})
        configs.setdefault(part.config, []).append(
            {"split": part.split, "path": part.path.replace("00000-of-00001.parquet", "*")}
        )
    head: dict[str, Any] = {"dataset_info": list(infos.values())}
    if imitation.licence is not None:
        head = {"license": imitation.licence, **head}
    if imitation.stated:
        head["configs"] = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    else:
        (head["dataset_info"],) = [{"splits": info["splits"]} for info in infos.values()]
    name = imitation.repo.split("/")[1]
    (place / "README.md").write_text(f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {name}\n", encoding="utf-8")
    (place / ".gitattributes").write_text("*.parquet filter=lfs\n")
    return place
