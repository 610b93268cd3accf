"""The list of upstream files: manifest.yaml, read strictly."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

MANIFEST = Path(__file__).with_name("manifest.yaml")
UNKNOWN = "unknown"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(ValueError):
    """The manifest names something it should not; the message says where."""


@dataclass(frozen=True)
class Hub:
    """A file of a data set on the Hugging Face Hub at one commit."""

    repo: str
    revision: str
    file: str


@dataclass(frozen=True)
class Unpack:
    """What comes out of an archive.

    Attributes:
        members: a regular expression searched in each member's name; its group is the path below `into`.
        into: folder below the data folder.
        images: how many members match.
    """

    members: str
    into: str
    images: int

    def path_of(self, member: str) -> str | None:
        """The path below `into` of a member, or None if it is none of ours (folders, __MACOSX, notes)."""
        if member.startswith("__MACOSX/") or PurePosixPath(member).name.startswith("._"):
            return None
        match = re.search(self.members, member)
        return None if match is None else match[1]


@dataclass(frozen=True)
class Upstream:
    """One published file; see the head of manifest.yaml for the fields."""

    name: str
    size: int
    sha256: str
    licence: str
    seen: str = ""
    page: str = ""
    url: str | None = None
    hub: Hub | None = None
    unpack: Unpack | None = None
    odd_names: bool = False

    @property
    def filename(self) -> str:
        """The last part of its address."""
        return PurePosixPath(self.hub.file if self.hub else str(self.url)).name

    @property
    def known_sha256(self) -> str | None:
        """The checksum, or None where nobody states one."""
        return None if self.sha256 == UNKNOWN else self.sha256

    @property
    def address(self) -> str:
        """For people: where it comes from."""
        return f"{self.hub.repo}@{self.hub.revision[:7]}/{self.hub.file} (Hub)" if self.hub else str(self.url)


@dataclass(frozen=True)
class Mixture:
    """The files of a mixture and where the recipes look for it. The first file holds the records."""

    name: str
    summary: str
    page: str
    json: str
    image_folder: str
    records: int
    text_only: int
    files: tuple[Upstream, ...]

    @property
    def archives(self) -> tuple[Upstream, ...]:
        """The files that hold images."""
        return tuple(file for file in self.files if file.unpack is not None)

    @property
    def record_file(self) -> Upstream:
        """The one that holds the records."""
        return next(file for file in self.files if file.unpack is None)


def load_manifest(path: Path = MANIFEST) -> dict[str, Mixture]:
    """Mixtures by name.

    Raises:
        ManifestError: not YAML, an unknown or missing key, a wrong type, a bad checksum or expression.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not raw:
        raise ManifestError(f"{path}: expected mixtures by name")
    return {str(name): _mixture(str(name), value, f"{path}: {name}") for name, value in raw.items()}


def _mixture(name: str, raw: Any, where: str) -> Mixture:
    fields = _fields(Mixture, raw, where, given={"name": name})
    files = fields["files"]
    if not isinstance(files, list):
        raise ManifestError(f"{where}.files: expected a list")
    fields["files"] = tuple(_upstream(file, f"{where}.files[{index}]") for index, file in enumerate(files))
    names = [file.name for file in fields["files"]]
    if len(set(names)) != len(names):
        raise ManifestError(f"{where}.files: a name occurs twice: {names}")
    if sum(file.unpack is None for file in fields["files"]) != 1:
        raise ManifestError(f"{where}.files: exactly one must have no `unpack`: the one that holds the records")
    return Mixture(**fields)


def _upstream(raw: Any, where: str) -> Upstream:
    fields = _fields(Upstream, raw, where)
    if (fields.get("url") is None) == (fields.get("hub") is None):
        raise ManifestError(f"{where}: give either `url` or `hub`")
    if fields.get("hub") is not None:
        fields["hub"] = Hub(**_fields(Hub, fields["hub"], f"{where}.hub"))
    if fields.get("unpack") is not None:
        unpack = Unpack(**_fields(Unpack, fields["unpack"], f"{where}.unpack"))
        try:
            groups = re.compile(unpack.members).groups
        except re.error as error:
            raise ManifestError(f"{where}.unpack.members: {error}") from error
        if groups != 1:
            raise ManifestError(f"{where}.unpack.members: needs exactly one group, found {groups}")
        fields["unpack"] = unpack
    if fields["sha256"] != UNKNOWN and not _SHA256.fullmatch(fields["sha256"]):
        raise ManifestError(f"{where}.sha256: expected 64 hexadecimal digits or `{UNKNOWN}`")
    return Upstream(**fields)


_TYPES = {"str": str, "int": int, "bool": bool, "str | None": str}


def _fields(kind: Any, raw: Any, where: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """The mapping `raw` as arguments of a dataclass, with names and plain types checked."""
    if not isinstance(raw, dict):
        raise ManifestError(f"{where}: expected a mapping, found {type(raw).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in (given or {})}
    unknown = sorted(set(raw) - set(fields))
    missing = sorted(
        name for name, field in fields.items() if field.default is dataclasses.MISSING and raw.get(name) is None
    )
    if unknown or missing:
        raise ManifestError(f"{where}: unknown keys {unknown}, missing keys {missing}; known: {sorted(fields)}")
    for name, value in raw.items():
        wanted = _TYPES.get(str(fields[name].type))
        if wanted is not None and type(value) is not wanted:
            raise ManifestError(f"{where}.{name}: expected {wanted.__name__}, found {value!r}")
    return {**(given or {}), **raw}
