"""Is a training image one of a benchmark's? Two answers: the same file, and an image that looks the same.

The same file: equal SHA-1 of the bytes. Looks the same: the difference hash (dHash) of the decoded image in grey, 128
bits: whether each of 8 x 8 places is brighter than the one to its right, and the one below it, in a thumbnail of 9 x 9;
and the mean colours of the four quarters. It outlives another size, format or compression; a crop, a mirror image or an
overlay it does not. Thumbnails without a gradient (a blank page) look all alike, so they are compared by their bytes
only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_moe.data.image import load_image
from llava_moe.data.schema import DataError
from llava_moe.data.sources import EmbeddedImage, open_files
from llava_moe.data.sources.ranges import IMAGE_SUFFIXES

_SIDE = 8
_FEWEST_BITS = 8
_COLOUR_STEPS = 16  # of 256, in which the mean of a channel in a quarter may differ
DEFAULT_DISTANCE = 8


class Mark(NamedTuple):
    """SHA-1 of the file, the dHash as 16 bytes (None for an image without a gradient), the colours of the quarters."""

    exact: bytes
    look: bytes | None
    colours: bytes


class Match(NamedTuple):
    """A training image that is in a benchmark; `distance` in bits of 128, None where the files are the same."""

    benchmark: str
    item: str
    distance: int | None

    def __str__(self) -> str:
        how = "the same file" if self.distance is None else f"looks the same, dHash distance {self.distance} of 128"
        return f"{self.benchmark}: {self.item} ({how})"


def mark_of(data: bytes, image: Image.Image) -> Mark:
    """Of an encoded image and its decoded self."""
    colours = image.convert("RGB").resize((2, 2), Image.Resampling.BOX).tobytes()
    return Mark(hashlib.sha1(data).digest(), difference_hash(image), colours)


def difference_hash(image: Image.Image) -> bytes | None:
    """128 bits, horizontal gradients first; None where fewer than 8 are set."""
    thumbnail = image.convert("L").resize((_SIDE + 1, _SIDE + 1), Image.Resampling.BOX)
    grey = np.asarray(thumbnail, dtype=np.int16)
    across = grey[:_SIDE, :_SIDE] > grey[:_SIDE, 1:]
    down = grey[:_SIDE, :_SIDE] > grey[1:, :_SIDE]
    bits = np.concatenate([across.reshape(-1), down.reshape(-1)])
    return np.packbits(bits).tobytes() if bits.sum() >= _FEWEST_BITS else None


class Benchmarks:
    """The images of named benchmarks.

    Args:
        places: name of each benchmark: a folder of images (with those in it), or a source that holds its images
            (parquet, a saved data set, tar).
        distance: the largest number of differing bits at which two images look the same.

    Raises:
        DataError: a place is missing, holds no image, or an image cannot be read; or the distance is negative.
    """

    def __init__(self, places: Mapping[str, str | Path], distance: int = DEFAULT_DISTANCE) -> None:
        if not 0 <= distance < 64:
            raise DataError(f"distance={distance} must lie between 0 and 63 of the 128 bits")
        self.distance = distance
        self.sizes: dict[str, int] = {}
        self._exact: dict[bytes, tuple[str, str]] = {}
        self._items: list[tuple[str, str]] = []
        looks: list[bytes] = []
        colours: list[bytes] = []
        for name, place in places.items():
            for file in _images(Path(place)):
                mark = mark_of(file.open("rb").read(), load_image(file, name))  # type: ignore[arg-type]
                self.sizes[name] = self.sizes.get(name, 0) + 1
                self._exact.setdefault(mark.exact, (name, str(file)))
                if mark.look is not None:
                    self._items.append((name, str(file)))
                    looks.append(mark.look)
                    colours.append(mark.colours)
            if name not in self.sizes:
                raise DataError(f"benchmark {name}: no image in {place}")
        self._looks = np.frombuffer(b"".join(looks), dtype=np.uint64).reshape(-1, 2)
        self._colours = np.frombuffer(b"".join(colours), dtype=np.uint8).reshape(-1, 12).astype(np.int16)

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def find(self, mark: Mark) -> Match | None:
        """The same file if there is one, else the nearest image that looks the same."""
        if mark.exact in self._exact:
            return Match(*self._exact[mark.exact], None)
        if mark.look is None or not len(self._looks):
            return None
        distances = np.bitwise_count(self._looks ^ np.frombuffer(mark.look, dtype=np.uint64)).sum(axis=1)
        shift = np.abs(self._colours - np.frombuffer(mark.colours, dtype=np.uint8)).max(axis=1)
        distances = np.where(shift <= _COLOUR_STEPS, distances, 255)
        nearest = int(distances.argmin())
        if distances[nearest] > self.distance:
            return None
        return Match(*self._items[nearest], int(distances[nearest]))


def _images(place: Path) -> Iterator[Path | EmbeddedImage]:
    if place.is_dir() and not any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from sorted(file for file in place.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        return
    for reader in open_files(place):
        for locator in reader.scan():
            yield from reader.read(locator).images or ()
