"""Nothing here leaves the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_prep.runs import FILES
from tests.data_prep.server import Host, serving
from tests.data_prep.upstream import write_manifest


@pytest.fixture(autouse=True)
def _loopback_needs_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def host() -> Iterator[Host]:
    names = {name: ("json" if name.endswith("records") else "zip") for name in FILES}
    with serving(Host({f"/{name}.{ending}": FILES[name] for name, ending in names.items()})) as running:
        yield running


@pytest.fixture
def addresses(host: Host) -> dict[str, str]:
    return {path[1:].split(".")[0]: host.url + path for path in host.files}


@pytest.fixture
def manifest(tmp_path: Path, addresses: dict[str, str]) -> Path:
    return write_manifest(tmp_path / "manifest.yaml", FILES, addresses)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"
