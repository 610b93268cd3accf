"""Where a data set comes from: the Hub, at one commit, or a folder that holds a copy of it."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from data_prep.benchmarks.card import CARD, UPSTREAM_CARD
from data_prep.errors import InterruptError, PrepareError, explain_os_error
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.mirror import FORMER_ORGANISATION, ORGANISATION, read_manifest

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 60.0


class Origin(Protocol):
    """What a data set is taken from.

    Attributes:
        revision: commit; None where it is not known.
        sizes: bytes by file; None where it is not known beforehand.
        sha256: of the files whose checksum is known beforehand.
    """

    revision: str | None
    sizes: dict[str, int | None]
    sha256: dict[str, str]

    @property
    def name(self) -> str:
        """The folder, or the word hub."""

    def card(self, work: Path) -> str:
        """The text of README.md, "" where there is none. `work` is a folder that may be written."""

    def fetch(self, files: Sequence[str], work: Path) -> None:
        """Puts files into `work`."""


@dataclass
class HubOrigin:
    """A data set of the Hub at one commit; see `Origin`."""

    repo: str
    revision: str | None
    sizes: dict[str, int | None]
    sha256: dict[str, str]
    name: str = "hub"

    def card(self, work: Path) -> str:
        if CARD not in self.sizes:
            return ""
        self.fetch([CARD], work)
        return (work / CARD).read_text(encoding="utf-8")

    def fetch(self, files: Sequence[str], work: Path) -> None:
        try:
            snapshot_download(
                self.repo,
                repo_type="dataset",
                revision=self.revision,
                local_dir=work,
                allow_patterns=[glob.escape(name) for name in files],
            )
        except OSError as error:
            if error.errno is not None:
                raise explain_os_error(error, work, "writing to") from error
            raise _hub_error(self.repo, error) from error
        except Exception as error:  # of whichever HTTP library the Hub's client is built on
            raise _hub_error(self.repo, error) from error


def on_hub(repo: str, revision: str | None) -> HubOrigin:
    """The data set at a commit, or at its newest one.

    Raises:
        PrepareError: it is not there, not allowed, or the Hub cannot be reached.
    """
    try:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except Exception as error:  # of whichever HTTP library the Hub's client is built on
        raise _hub_error(repo, error) from error
    siblings = info.siblings or []
    checksums = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs is not None}
    return HubOrigin(repo, info.sha, {file.rfilename: file.size for file in siblings}, checksums)


def _hub_error(repo: str, error: Exception) -> PrepareError:
    page = f"https://huggingface.co/datasets/{repo}"
    lines = str(error).strip().splitlines()
    reason = lines[0][:300] if lines else type(error).__name__
    if isinstance(error, GatedRepoError):
        return PrepareError(f"{repo}: its terms must be accepted at {page}; then log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return PrepareError(f"{repo}: the Hub has no such public data set ({reason}); look at {page}")
    if isinstance(error, OfflineModeIsEnabled):
        return PrepareError(f"{repo}: HF_HUB_OFFLINE forbids to ask the Hub; unset it, or use --from DIR")
    return PrepareError(f"{repo}: {type(error).__name__}: {reason}; run again later, or use --from DIR")


@dataclass
class FolderOrigin:
    """A copy of a data set on disk; see `Origin`. Files are linked where the disk allows it, and never changed."""

    folder: Path
    revision: str | None
    sizes: dict[str, int | None]
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.folder)

    def card(self, work: Path) -> str:
        for name in (UPSTREAM_CARD, CARD):
            if (self.folder / name).is_file():
                return (self.folder / name).read_text(encoding="utf-8")
        return ""

    def fetch(self, files: Sequence[str], work: Path) -> None:
        for name in files:
            source, target = (self.folder / name).resolve(), work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another disk, or one without links
                _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except KeyboardInterrupt as error:
        target.unlink(missing_ok=True)
        raise InterruptError from error
    except OSError as error:
        target.unlink(missing_ok=True)
        raise explain_os_error(error, target, "copying to") from error


def copies(places: Sequence[Path], repo: str) -> Iterator[FolderOrigin]:
    """Copies in given folders: a mirror, a folder with the data set's name, or a cache of the Hub's client."""
    organisation, _, short = repo.partition("/")
    # lmms-lab's data sets moved between two organisations
    moved = {ORGANISATION: FORMER_ORGANISATION, FORMER_ORGANISATION: ORGANISATION}.get(organisation)
    names = [repo] + ([f"{moved}/{short}"] if moved else [])
    seen: set[Path] = set()
    for place in places:
        for name in names:
            cached = f"datasets--{name.replace('/', '--')}"
            for folder in (place / name, *_snapshots(place / cached), *_snapshots(place / "hub" / cached)):
                if folder.is_dir() and folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    yield _folder_origin(folder, place, name)
        if (place / short).is_dir():
            yield _folder_origin(place / short, place, repo)


def _snapshots(cache: Path) -> list[Path]:
    """The commits in a cache, the newest first."""
    return sorted((cache / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)


def _folder_origin(folder: Path, place: Path, name: str) -> FolderOrigin:
    revision = folder.name if _COMMIT.fullmatch(folder.name) else None
    checksums: dict[str, str] = {}
    try:
        record = read_manifest(place).get(name)
    except EvaluationError as error:
        raise PrepareError(str(error)) from error
    if record is not None:
        revision = record.revision
        checksums = {file: facts.sha256 for file, facts in record.files.items() if file != CARD}
    sizes: dict[str, int | None] = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    return FolderOrigin(folder, revision, sizes, checksums)
