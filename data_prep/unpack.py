"""Archives and folders into the layout that the recipes expect."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from data_prep.errors import InterruptError, PrepareError, explain_os_error
from data_prep.manifest import Unpack

_PIECE = 1 << 20
_PARTIAL = ".partial"


def members(archive: Path, rule: Unpack) -> Iterator[tuple[zipfile.ZipInfo, str]]:
    """The wanted members of a zip with their paths below `rule.into`.

    Raises:
        PrepareError: no zip, or a member that would leave the folder.
    """
    try:
        with zipfile.ZipFile(archive) as handle:
            infos = handle.infolist()
    except (zipfile.BadZipFile, EOFError) as error:
        raise PrepareError(f"{archive}: not a whole zip file ({error}); fetch it again") from error
    for info in infos:
        name = None if info.is_dir() else rule.path_of(info.filename)
        if name is None:
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise PrepareError(
                f"{archive}: the member {info.filename!r} would leave the folder; this is not upstream's file"
            )
        yield info, name


def unpack(
    archive: Path,
    rule: Unpack,
    data: Path,
    *,
    advance: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> int:
    """Extracts the images of a zip; those that are there in full are left alone, so it can be interrupted.

    Args:
        archive: the zip.
        rule: which members, and where to.
        data: the data folder that `rule.into` is below.
        advance: called with bytes as they are done.
        stop: when set, ends soon.

    Returns:
        How many images it holds.

    Raises:
        PrepareError: a damaged archive, a full disk, no image in it.
        InterruptError: `stop` was set.
    """
    wanted = list(members(archive, rule))
    if not wanted:
        raise PrepareError(f"{archive}: no member matches {rule.members!r}; this is not upstream's file")
    target = data / rule.into
    made: set[Path] = set()
    with zipfile.ZipFile(archive) as handle:
        for info, name in wanted:
            if stop is not None and stop.is_set():
                raise InterruptError
            path = target / name
            try:
                if path.parent not in made:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    made.add(path.parent)
                if not _has_size(path, info.file_size):
                    _extract(handle, info, path)
            except OSError as error:
                raise explain_os_error(error, path, "unpacking") from error
            except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
                raise PrepareError(
                    f"{archive}: {info.filename} is damaged ({error}); fetch the archive again"
                ) from error
            advance(info.file_size)
    return len(wanted)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _extract(handle: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """Writes one member under another name and moves it into place; reading to the end checks its CRC."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with handle.open(info) as source, partial.open("wb") as sink:
            while piece := source.read(_PIECE):
                sink.write(piece)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def count_images(folder: Path) -> int:
    """Files in a folder and the folders in it (LLaVA-Pretrain has one level); 0 if there is none."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    with os.scandir(entry.path) as inner:
                        total += sum(1 for file in inner if not file.name.endswith(_PARTIAL))
                else:
                    total += not entry.name.endswith(_PARTIAL)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return total


def link_folder(source: Path, target: Path, odd_names: bool) -> None:
    """Makes `target` stand for a folder that is already somewhere else, without writing into that folder.

    Args:
        source: unpacked images.
        target: becomes a symbolic link to it; with `odd_names` a folder of links, one for each file.
        odd_names: see `add_jpg_names`.

    Raises:
        PrepareError: something else is in the way.
    """
    source = source.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not odd_names:
            if target.is_symlink():
                target.unlink()
            elif target.is_dir():
                target.rmdir()  # only if it is empty
            target.symlink_to(source, target_is_directory=True)
            return
        target.mkdir(exist_ok=True)
        there = set(os.listdir(target))
        with os.scandir(source) as entries:
            for entry in entries:
                if entry.name not in there and not entry.is_dir():
                    os.symlink(entry.path, target / entry.name)
    except OSError as error:
        raise explain_os_error(error, target, "linking") from error
    add_jpg_names(target)


def settle_names(target: Path) -> None:
    """`add_jpg_names` for a folder that was there already; one that is a link is not written into but taken apart."""
    if target.is_symlink() and _odd(target):
        source = target.resolve()
        target.unlink()
        link_folder(source, target, odd_names=True)
    elif not target.is_symlink():
        add_jpg_names(target)


def _odd(folder: Path) -> list[tuple[str, str]]:
    """(name, missing .jpg name) of the files that have another ending."""
    names = set(os.listdir(folder))
    found: dict[str, str] = {}
    for name in sorted(names):
        stem, ending = os.path.splitext(name)
        if ending not in ("", ".jpg", _PARTIAL) and f"{stem}.jpg" not in names:
            found.setdefault(f"{stem}.jpg", name)
    return [(name, plain) for plain, name in found.items()]


def add_jpg_names(folder: Path) -> int:
    """Gives `K.gif`, `K.png`, `K.JPG` ... also the name `K.jpg` that the records use, if nothing has it.

    The bytes stay what they are, as in LLaVA's own copy ("we save all files as .jpg"): readers go by content. 901 of
    the 207,572 files that OCR-VQA's script fetches are of this kind, mostly GIF.

    Returns:
        How many names were added.

    Raises:
        PrepareError: the folder cannot be written.
    """
    odd = _odd(folder)
    for name, plain in odd:
        try:
            os.symlink(name, folder / plain)
        except OSError as error:
            raise explain_os_error(error, folder / plain, "linking") from error
    return len(odd)
