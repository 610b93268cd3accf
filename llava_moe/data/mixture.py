"""Mixtures: which records of which sources make up an epoch.

A mixture is a YAML file, or the `data.sources` of a recipe:

    sources:
      - {path: llava_665k.json, image_folder: images}                    # every record, once in an epoch
      - {path: docs.jsonl, image_folder: docs, limit: "random:20%"}      # a random fifth, the same in every epoch
      - {path: "shards/*.tar", weight: 2}                                # every record twice
      - {path: saved_dataset, split: train, limit: "first:1000", weight: 0.5}

`limit` says which records take part: `all`, `first:N`, `end:N`, `random:N`, where N is a number or a percentage, and
`N%` for `random:N%`. `weight` says how often those come in an epoch: each as many times as its whole part says, and a
random share of them, as large as its fraction, once more. Both draws follow from the seed and the source's place in the
list alone. LLaVA-NeXT's own files (`datasets: [{json_path, sampling_strategy}]`) are read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llava_moe.data.schema import DataError
from llava_moe.registry import near_misses

_LIMIT = re.compile(r"(?:(first|end|random):)?(\d+(?:\.\d+)?)(%?)")
_LLAVA_NEXT = {"json_path": "path", "sampling_strategy": "limit"}
MAX_WEIGHT = 100.0


@dataclass(frozen=True)
class Limit:
    """Which records of a source take part.

    Attributes:
        how: "all", "first", "end" or "random".
        amount: a number of records, or a percentage.
        is_share: whether it is a percentage.
    """

    how: str = "all"
    amount: float = 100.0
    is_share: bool = True

    @staticmethod
    def parse(text: str) -> Limit:
        """Reads `all`, `first:N`, `end:N`, `random:N` or `N%`; N may be a percentage.

        Raises:
            ValueError: it is none of these.
        """
        text = str(text).strip()
        if text == "all":
            return Limit()
        match = _LIMIT.fullmatch(text)
        if match is None or (match[1] is None and not match[3]):
            raise ValueError(f"limit={text!r}: must be all, first:N, end:N, random:N (N a number or N%), or N%")
        amount, is_share = float(match[2]), bool(match[3])
        if is_share and not 0 < amount <= 100:
            raise ValueError(f"limit={text!r}: a percentage lies above 0 and is at most 100")
        if not is_share and (amount < 1 or amount != int(amount)):
            raise ValueError(f"limit={text!r}: a number of records is whole and at least 1")
        return Limit(match[1] or "random", amount, is_share)

    def size(self, total: int) -> int:
        """How many of `total` records take part; of a percentage the ceiling, as in LLaVA-NeXT.

        Raises:
            ValueError: more are asked for than there are.
        """
        # The small term keeps a product that should be whole from being rounded up.
        wanted = math.ceil(self.amount / 100 * total - 1e-9) if self.is_share else int(self.amount)
        if wanted > total:
            raise ValueError(f"limit {self.how}:{wanted} asks for more than the {total} records of the source")
        return wanted


@dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture.

    Attributes:
        path: a data file, a pattern of files, or a folder of save_to_disk.
        image_folder: what image names are relative to; None where the images lie in the data.
        limit: see the module.
        weight: see the module.
        split: of a saved data set that has several.
    """

    path: str
    image_folder: str | None = None
    limit: str = "all"
    weight: float = 1.0
    split: str | None = None

    def __post_init__(self) -> None:
        for name, value, kind in (("path", self.path, str), ("image_folder", self.image_folder, str | None)):
            if not isinstance(value, kind) or value == "":
                raise DataError(f"source {self.path!r}: {name}={value!r} must be a path")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight <= MAX_WEIGHT:
            raise DataError(f"source {self.path}: weight={self.weight!r} must be above 0 and at most {MAX_WEIGHT:g}")
        try:
            Limit.parse(self.limit)
        except ValueError as error:
            raise DataError(f"source {self.path}: {error}") from error

    def draw(self, total: int, seed: int, place: int) -> np.ndarray:
        """The records of one epoch by number, int64; those that come more than once stand there so many times.

        Args:
            total: records of the source.
            seed: of the mixture.
            place: of the source in the mixture.

        Raises:
            DataError: the limit asks for more records than there are, or nothing is left.
        """
        generator = np.random.default_rng([seed, place])
        limit = Limit.parse(self.limit)
        try:
            size = limit.size(total)
        except ValueError as error:
            raise DataError(f"source {self.path}: {error}") from error
        if limit.how == "random":
            chosen = np.sort(generator.permutation(total)[:size])
        else:
            chosen = np.arange(total - size, total) if limit.how == "end" else np.arange(size)
        whole, part = int(self.weight), self.weight - int(self.weight)
        more = np.sort(generator.permutation(chosen)[: round(part * size)])
        drawn = np.concatenate([*[chosen] * whole, more]).astype(np.int64)
        if total and not len(drawn):
            raise DataError(f"source {self.path}: limit {self.limit} with weight {self.weight} leaves no record")
        return drawn


@dataclass(frozen=True)
class Mixture:
    """Sources in order, and the seed of what is drawn from them."""

    sources: tuple[SourceSpec, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("a mixture needs at least one source under `sources`")

    @staticmethod
    def parse(raw: Any, where: str, seed: int | None = None) -> Mixture:
        """From plain values, as YAML gives them; a list is that of the sources.

        Args:
            raw: a mapping with `sources` and perhaps `seed`, or a list.
            where: for messages.
            seed: in the place of the one in `raw`.

        Raises:
            DataError: a key is unknown or missing, or a value is refused.
        """
        given: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {"sources": raw}
        if "datasets" in given and "sources" not in given:
            given = {("sources" if key == "datasets" else key): value for key, value in given.items()}
        _known(given, ["sources", "seed"], where)
        listed = given.get("sources")
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise DataError(f"{where}: `sources` must be a list of sources, found {type(listed).__name__}")
        own = given.get("seed", 0)
        if not isinstance(own, int) or isinstance(own, bool) or own < 0:
            raise DataError(f"{where}: seed={own!r} must be a whole number of at least 0")
        sources = tuple(_source(item, f"{where}: source {index}") for index, item in enumerate(listed))
        try:
            return Mixture(sources, own if seed is None else seed)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _source(item: Any, where: str) -> SourceSpec:
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {type(item).__name__}, expected a mapping with `path`")
    values: dict[str, Any] = {_LLAVA_NEXT.get(str(key), str(key)): value for key, value in item.items()}
    _known(values, [field.name for field in fields(SourceSpec)], where)
    if "limit" in values:
        values["limit"] = str(values["limit"])  # YAML reads 500 as a number; the message says what is wrong with it
    if "path" not in values:
        raise DataError(f"{where} has no `path`")
    try:
        return SourceSpec(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _known(given: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise DataError(f"{where}: unknown key {key!r}; {near_misses(str(key), known)}")


def load_mixture(path: str | Path, seed: int | None = None) -> Mixture:
    """Reads a mixture, or takes a single data file as a mixture of one, with its images beside it.

    Relative paths are relative to the working directory, as in recipes.

    Raises:
        DataError: the file is missing, no YAML, or no mixture.
    """
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return Mixture((SourceSpec(str(path), str(path.parent)),), seed or 0)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such mixture; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    return Mixture.parse(raw, str(path), seed)
