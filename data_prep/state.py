"""What earlier runs did: downloads/state.json below the data folder."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from filelock import FileLock


class RunLock(FileLock):
    """Held while a run works in a folder.

    A class of its own: where lmms-eval is loaded, every plain FileLock of one path is the same object in the whole
    process, and then locks nobody out.
    """


class State:
    """Facts by name in the manifest: `path`, `size`, `mtime_ns`, `sha256` of the verified file; `unpacked`; `linked`.

    Written in one step after each change, so that an interruption leaves the former state.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._facts: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._facts = {}

    def get(self, name: str) -> dict[str, Any]:
        """A copy of what is known of one file."""
        with self._lock:
            return dict(self._facts.get(name, {}))

    def update(self, name: str, **facts: Any) -> None:
        """Adds facts and saves."""
        with self._lock:
            self._facts.setdefault(name, {}).update(facts)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_name(f"{self.path.name}.new")
            fresh.write_text(json.dumps(self._facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(fresh, self.path)

    def verified(self, name: str, path: Path) -> str | None:
        """The checksum of `path`, if it was taken before and the file has not changed since."""
        facts = self.get(name)
        try:
            found = path.stat()
        except OSError:
            return None
        same = (str(path), found.st_size, found.st_mtime_ns) == tuple(
            facts.get(key) for key in ("path", "size", "mtime_ns")
        )
        return facts.get("sha256") if same else None

    def verify(self, name: str, path: Path, sha256: str) -> None:
        """Notes the checksum of `path`."""
        found = path.stat()
        self.update(name, path=str(path), size=found.st_size, mtime_ns=found.st_mtime_ns, sha256=sha256)
