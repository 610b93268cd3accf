"""The wheels are pinned, checked, and named clearly when they are missing; nothing here touches the network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from playground import assets
from playground.assets import Asset, AssetError, fetch_assets, find_asset, read_member, read_requirements


@pytest.fixture
def small_asset(tmp_path: Path) -> tuple[Asset, Path]:
    wheel = tmp_path / "easy_vqa-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("easy_vqa/data/README.md", "hello")
    return Asset("easy-vqa", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest()), wheel


def fake_pip(monkeypatch: pytest.MonkeyPatch, output: str, returncode: int = 1) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, returncode, "", output)

    monkeypatch.setattr(assets.subprocess, "run", run)
    return calls


def test_requirements_name_every_role() -> None:
    pinned = read_requirements()
    roles = {assets.TOWER, assets.LANGUAGE_MODEL, assets.EMOJI_IMAGES, assets.EMOJI_NAMES, assets.SHAPES, assets.DIGITS}
    assert set(pinned) == roles
    assert len(pinned) == 6


def test_a_line_without_hash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "assets.txt"
    path.write_text("# fine\neasy-vqa==1.0\n")
    with pytest.raises(AssetError, match="line 2"):
        read_requirements(path)


def test_only_the_pinned_bytes_count(small_asset: tuple[Asset, Path]) -> None:
    asset, wheel = small_asset
    assert find_asset(asset, wheel.parent) == wheel
    wheel.write_bytes(wheel.read_bytes()[:-1])
    assert find_asset(asset, wheel.parent) is None


def test_offline_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = fetch_assets(tmp_path, offline=True)
    assert all(status.path is None and str(tmp_path) in status.problem for status in statuses.values())
    assert assets.main(["--cache", str(tmp_path), "--offline"]) == 0
    assert capsys.readouterr().out.count("missing") == 6


def test_each_wheel_has_its_own_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, "ERROR: No matching distribution found for x")
    statuses = fetch_assets(tmp_path)
    assert len(calls) == 6
    assert all("--require-hashes" in call and "--no-deps" in call for call in calls)
    assert all("does not have it" in status.problem for status in statuses.values())


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "sha256 differs"),
        ("Failed to establish a new connection: [Errno -2]", "cannot be reached"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("something\nERROR: odd", "ERROR: odd"),
    ],
)
def test_reasons_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, words: str) -> None:
    fake_pip(monkeypatch, output)
    problem = fetch_assets(tmp_path)[assets.SHAPES].problem
    assert words in problem
    assert "\n" not in problem


def test_a_full_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake_pip(monkeypatch, "OSError: [Errno 28] No space left on device")
    assert assets.main(["--cache", str(tmp_path)]) == 1
    assert "disk is full" in capsys.readouterr().err


def test_a_damaged_file_is_removed_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "easy_vqa-1.0-py3-none-any.whl"
    damaged.write_bytes(b"half")
    fake_pip(monkeypatch, "No matching distribution")
    assert fetch_assets(tmp_path)[assets.SHAPES].path is None
    assert not damaged.exists()


def test_members(small_asset: tuple[Asset, Path], tmp_path: Path) -> None:
    _, wheel = small_asset
    assert read_member(wheel, "easy_vqa/data/README.md") == b"hello"
    with pytest.raises(AssetError, match=r"absent\.txt"):
        read_member(wheel, "absent.txt")
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip")
    with pytest.raises(AssetError, match=r"broken\.whl"):
        read_member(broken, "x")


def test_cache_folder_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_MOE_CACHE", "/somewhere")
    assert assets.default_cache() == Path("/somewhere")
