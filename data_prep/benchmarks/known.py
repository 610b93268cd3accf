"""known.yaml, read strictly: licences, commits and sizes of the data sets, as far as they are known beforehand."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.manifest import UNKNOWN, ManifestError

KNOWN = Path(__file__).with_name("known.yaml")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KEYS = {"licence", "revision", "splits"}


@dataclass(frozen=True)
class Split:
    """What is known of a split: rows, and the bytes of its files."""

    rows: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a data set.

    Attributes:
        licence: "unknown" where neither the page nor the authors state one.
        revision: the commit to take; None for the newest one at the first download, which is then recorded.
        splits: by `configuration/split`, with "default" for a configuration without name.
    """

    licence: str = UNKNOWN
    revision: str | None = None
    splits: dict[str, Split] = field(default_factory=dict)


def load_known(path: Path = KNOWN) -> dict[str, Known]:
    """Data sets by name.

    Raises:
        ManifestError: the file cannot be read, or an entry has an unknown key or a value of the wrong kind.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ManifestError(f"{path}: expected data sets by name")
    return {str(repo): _known(entry, f"{path}: {repo}") for repo, entry in raw.items()}


def _known(entry: Any, where: str) -> Known:
    if not isinstance(entry, dict) or set(entry) - _KEYS or not isinstance(entry.get("licence"), str):
        raise ManifestError(f"{where}: expected a mapping with the text `licence`; further keys: revision, splits")
    revision = entry.get("revision")
    if revision is not None and not (isinstance(revision, str) and _COMMIT.fullmatch(revision)):
        raise ManifestError(f"{where}.revision: expected a commit of 40 hexadecimal digits, found {revision!r}")
    splits = {}
    for name, facts in (entry.get("splits") or {}).items():
        numbers = isinstance(facts, dict) and all(type(value) is int and value > 0 for value in facts.values())
        if not numbers or set(facts) - {"rows", "size"} or "/" not in str(name):
            form = "configuration/split: {rows: N, size: BYTES}"
            raise ManifestError(f"{where}.splits: expected `{form}`, found {name!r}: {facts!r}")
        splits[str(name)] = Split(**facts)
    return Known(entry["licence"], revision, splits)
