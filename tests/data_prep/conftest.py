"""Nothing here leaves the machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_prep.fake_hub import FakeHub
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


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imitations of benchmarks, to be copied."""
    from tests.evaluation.imitations import gqa, mmbench, mme, pope, textvqa
    from tests.evaluation.imitations_files import write

    folder = tmp_path_factory.mktemp("snapshots")
    for imitation in (gqa(), mmbench(), mme(), pope(), textvqa()):
        write(folder, imitation)
    return folder


@pytest.fixture
def hub(snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The Hub for the preparation of benchmarks."""
    from data_prep.benchmarks import origin

    hub = FakeHub(tmp_path / "hub")
    shutil.copytree(snapshots, hub.root)
    monkeypatch.setattr(origin, "HfApi", lambda: hub)
    monkeypatch.setattr(origin, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mirror that is not there yet."""
    return tmp_path / "mirror"


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """What is known beforehand of benchmarks."""
    from tests.data_prep.benchmark_runs import write_known

    return write_known(tmp_path / "known.yaml")
