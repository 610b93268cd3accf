"""The Hugging Face Hub as far as benchmark preparation sees it: snapshots in a folder, commits, and what goes wrong."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub.utils import filter_repo_objects


@dataclass
class FakeHub:
    """Data sets below `root`; `spoil` may change what arrives, `broken` says what asking for a data set raises."""

    root: Path
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    broken: dict[str, Exception] = field(default_factory=dict)
    spoil: Callable[[Path], None] = lambda path: None

    def commit(self, repo: str) -> str:
        """Changes with the files."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted((self.root / repo).rglob("*")):
            if path.is_file():
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def dataset_info(self, repo: str, *, revision: str | None, files_metadata: bool, timeout: float) -> Any:
        assert files_metadata
        assert timeout > 0
        self.asked.append((repo, revision))
        if repo in self.broken:
            raise self.broken[repo]
        siblings = []
        for path in sorted((self.root / repo).rglob("*")):
            if path.is_file():
                name, content = path.relative_to(self.root / repo).as_posix(), path.read_bytes()
                big = path.suffix == ".parquet"
                lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if big else None
                siblings.append(SimpleNamespace(rfilename=name, size=len(content), lfs=lfs))
        return SimpleNamespace(sha=self.commit(repo), siblings=siblings)

    def snapshot_download(
        self, repo: str, *, repo_type: str, revision: str, local_dir: Path, allow_patterns: list[str]
    ) -> str:
        assert repo_type == "dataset"
        assert revision == self.commit(repo)
        names = [p.relative_to(self.root / repo).as_posix() for p in (self.root / repo).rglob("*") if p.is_file()]
        for name in sorted(filter_repo_objects(names, allow_patterns=allow_patterns)):
            target = local_dir / name
            if target.is_file() and target.read_bytes() == (self.root / repo / name).read_bytes():
                continue
            self.fetched.append(f"{repo}/{name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / repo / name, target)
            self.spoil(target)
        (local_dir / ".cache/huggingface").mkdir(parents=True, exist_ok=True)
        (local_dir / ".cache/huggingface/notes").write_text("the client's own")
        return str(local_dir)
