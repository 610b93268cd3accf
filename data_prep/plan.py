"""What is there already, what is missing, and what it takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from data_prep.errors import PrepareError, readable
from data_prep.fetch import partial_size
from data_prep.manifest import Mixture, Upstream
from data_prep.state import State
from data_prep.unpack import count_images, members

DEPTH = 4
Kind = Literal["done", "link", "use", "unpack", "download"]


@dataclass(frozen=True)
class Step:
    """What is to be done about one file.

    Attributes:
        file: the file.
        kind: done (nothing), link (a folder of `--from`), use (a record file that is there), unpack (an archive that is
            there), download (and unpack).
        source: the folder, record file or archive that is there.
        to_fetch: bytes still to be downloaded.
        to_write: bytes that unpacking still writes, taken as the size of the archive (images do not compress).
    """

    file: Upstream
    kind: Kind
    source: Path | None = None
    to_fetch: int = 0
    to_write: int = 0

    def __str__(self) -> str:
        what = {
            "done": "in place",
            "link": f"link {self.source}",
            "use": f"use {self.source}",
            "unpack": f"unpack {self.source}",
            "download": f"download {self.file.address}",
        }[self.kind]
        if self.kind == "download" and self.to_fetch < self.file.size:
            what = f"go on with the {what} ({readable(self.file.size - self.to_fetch)} are there)"
        return f"{self.file.name:<22} {readable(self.file.size):>9}  {what}"


@dataclass
class Plan:
    """All steps of a mixture, and remarks about what was found and not used."""

    steps: list[Step]
    remarks: list[str] = field(default_factory=list)

    @property
    def to_fetch(self) -> int:
        """Bytes to download."""
        return sum(step.to_fetch for step in self.steps)

    def space(self, delete_archives: bool) -> int:
        """Bytes of disk: archives and images together, or (deleting as it goes) one archive at a time."""
        archives = [step.to_fetch for step in self.steps]
        return sum(step.to_write for step in self.steps) + (
            max(archives, default=0) if delete_archives else sum(archives)
        )


def download_path(data: Path, file: Upstream) -> Path:
    """Where a file is downloaded to. Names repeat (images.zip), so each file has its own folder."""
    return data / "downloads" / file.name / file.filename


def make_plan(mixture: Mixture, data: Path, given: Sequence[Path], state: State) -> Plan:
    """Looks at the data folder and at the folders of `--from`."""
    found, remarks = _look_around(mixture, given)
    steps = [
        _archive_step(file, data, given, found, state) if file.unpack else _records_step(mixture, file, data, found)
        for file in mixture.files
    ]
    return Plan(steps, remarks)


def free_space(data: Path) -> int:
    """Bytes free where the data folder lies or will lie."""
    place = data.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _records_step(mixture: Mixture, file: Upstream, data: Path, found: dict[str, Path]) -> Step:
    downloaded = download_path(data, file)
    if downloaded.is_file():
        return Step(file, "use", downloaded)
    placed = data / mixture.json  # put there by hand, as LLaVA's instructions say
    if placed.is_file() and placed.stat().st_size == file.size:
        return Step(file, "use", placed)
    if file.name in found:
        return Step(file, "use", found[file.name])
    return Step(file, "download", to_fetch=file.size - partial_size(downloaded))


def _archive_step(file: Upstream, data: Path, given: Sequence[Path], found: dict[str, Path], state: State) -> Step:
    assert file.unpack is not None
    target = data / file.unpack.into
    present = count_images(target)
    facts = state.get(file.name)
    if present >= (facts.get("unpacked") or file.unpack.images) or (present and facts.get("linked")):
        return Step(file, "done", target)
    folder = _folder(file.unpack.into, target, given)
    if folder is not None:
        return Step(file, "link", folder)
    to_write = int(file.size * (1 - min(1.0, present / file.unpack.images)))
    downloaded = download_path(data, file)
    archive = downloaded if downloaded.is_file() else found.get(file.name)
    if archive is not None:
        return Step(file, "unpack", archive, to_write=to_write)
    return Step(file, "download", to_fetch=file.size - partial_size(downloaded), to_write=to_write)


def _folder(into: str, target: Path, given: Sequence[Path]) -> Path | None:
    """An unpacked folder below `--from`: with all of the layout's path, or with its end only where that says enough."""
    parts = PurePosixPath(into).parts
    tails = [Path(*parts[start:]) for start in range(len(parts)) if parts[start:] != ("images",)]
    for folder in (place / tail for place in given for tail in tails):
        if folder.is_dir() and folder.resolve() != target.resolve() and count_images(folder):
            return folder
    return None


def _look_around(mixture: Mixture, given: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Finds upstream files below `--from` by their size (names repeat and are often changed)."""
    by_size = {file.size: file for file in mixture.files}
    names = {file.filename for file in mixture.files}
    prune = {PurePosixPath(file.unpack.into).name for file in mixture.archives if file.unpack is not None}
    found: dict[str, Path] = {}
    remarks: list[str] = []
    for place in given:
        for folder, folders, files in os.walk(place):
            depth = len(Path(folder).relative_to(place).parts)
            folders[:] = sorted(f for f in folders if depth < DEPTH and f not in prune)
            for name in sorted(files):
                path = Path(folder, name)
                if path.suffix not in (".zip", ".json") or not path.is_file():
                    continue
                size = path.stat().st_size
                file = by_size.get(size)
                if file is not None and path.suffix == Path(file.filename).suffix:
                    try:
                        if _fits(path, file):
                            found.setdefault(file.name, path)
                    except PrepareError as error:  # the right size, but a download manager had only reserved it
                        remarks.append(f"{error}: ignored")
                elif file is None and name in names:
                    remarks.append(
                        f"{path} has {size} bytes, which no file of {mixture.name} has: ignored (not whole?)"
                    )
    return found, remarks


def _fits(path: Path, file: Upstream) -> bool:
    return file.unpack is None or next(members(path, file.unpack), None) is not None
