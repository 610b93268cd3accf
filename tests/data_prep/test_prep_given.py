"""Whole runs on files that are there already: `--from` with archives or folders, and folders put in place by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.data_prep.runs import FILES, report_of, run, trained_on
from tests.data_prep.server import Host
from tests.data_prep.upstream import mix_archives, picture


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def given_archives(folder: Path) -> Path:
    """As a person stores them: some renamed, where names would collide."""
    names = {"mix665k-records": "llava_v1_5_mix665k.json", "visual-genome-part1": "vg/images.zip"}
    for name, content in FILES.items():
        path = folder / names.get(name, f"{name}/images.zip")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_archives_from_a_folder(manifest: Path, data: Path, host: Host, tmp_path: Path) -> None:
    given = given_archives(tmp_path / "given")
    before = {path: _untouched(given / path) for path in tree(given)}
    assert run(manifest, data, "--from", str(given), "--offline") == 0
    assert trained_on(data) == 16
    assert host.requests == []
    assert {path: _untouched(given / path) for path in tree(given)} == before
    assert not list((data / "downloads").rglob("*.zip"))


def given_folders(folder: Path) -> Path:
    """LLaVA's own layout below playground/data, unpacked."""
    (folder / "LLaVA-Instruct").mkdir(parents=True)
    (folder / "LLaVA-Instruct/llava_v1_5_mix665k.json").write_bytes(FILES["mix665k-records"])
    above = {"coco-train2017": "coco", "textvqa": "textvqa", "gqa": "gqa", "ocr-vqa": "ocr_vqa"}
    for name, members in mix_archives().items():
        for member, content in members.items():
            path = folder / above.get(name, "vg") / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def _untouched(path: Path) -> tuple[int, int, int, int]:
    """What reading leaves alone: all but the time of the last access."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_nlink


def test_unpacked_folders_are_linked(manifest: Path, data: Path, host: Host, tmp_path: Path) -> None:
    given = given_folders(tmp_path / "given")
    before = {path: _untouched(given / path) for path in tree(given)}
    assert run(manifest, data, "--from", str(given), "--offline") == 0
    assert trained_on(data) == 16
    assert host.requests == []
    assert (data / "LLaVA-Instruct/coco/train2017").is_symlink()
    assert not (data / "LLaVA-Instruct/ocr_vqa/images").is_symlink()
    assert (data / "LLaVA-Instruct/ocr_vqa/images/0002.jpg").is_file()
    assert {path: _untouched(given / path) for path in tree(given)} == before
    assert run(manifest, data, "--offline") == 0  # and --from is not needed again


def test_folders_put_in_place_by_hand(manifest: Path, data: Path, host: Host) -> None:
    given_folders(data / "LLaVA-Instruct")
    shutil.move(data / "LLaVA-Instruct/LLaVA-Instruct/llava_v1_5_mix665k.json", data / "LLaVA-Instruct")
    assert run(manifest, data, "--offline") == 0
    assert host.requests == []
    assert trained_on(data) == 16
    kept = data / "downloads/mix665k-records/mix665k-records.json"
    assert kept.read_bytes() == FILES["mix665k-records"]  # the cleaned records did not take upstream's with them
    assert run(manifest, data, "--offline") == 0


def test_a_half_archive_is_remarked_and_not_used(
    manifest: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given/gqa.zip").write_bytes(FILES["gqa"][:-50])
    assert run(manifest, data, "--from", str(tmp_path / "given")) == 0
    assert "given/gqa.zip has" in capsys.readouterr().out
    assert trained_on(data) == 16


def test_an_archive_that_is_only_reserved_is_not_used(
    manifest: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given/images.zip").write_bytes(bytes(len(FILES["gqa"])))
    assert run(manifest, data, "--from", str(tmp_path / "given")) == 0
    assert "given/images.zip: not a whole zip file" in capsys.readouterr().out
    assert trained_on(data) == 16


def test_a_wrong_archive_is_refused_and_the_others_go_on(
    manifest: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given").mkdir()
    content = bytearray(FILES["gqa"])
    content[60] ^= 255
    (tmp_path / "given/gqa.zip").write_bytes(content)
    assert run(manifest, data, "--from", str(tmp_path / "given")) == 1
    error = capsys.readouterr().err
    assert "given/gqa.zip: wrong checksum: sha256" in error
    assert "leave it out of --from, or replace it" in error
    assert (data / "LLaVA-Instruct/coco/train2017/000000000009.jpg").is_file()
    assert not (data / "LLaVA-Instruct/gqa").exists()
    assert run(manifest, data) == 0


def test_real_jpegs_on_request(manifest: Path, data: Path, tmp_path: Path) -> None:
    given = given_folders(tmp_path / "given")
    assert run(manifest, data, "--from", str(given), "--offline", "--reencode-jpeg") == 0
    assert report_of(data)["reencoded"] == 2
    assert report_of(data)["formats"] == {"JPEG": 12, "GIF": 1}  # the placeholder stays what it is, and is dropped
    assert (given / "ocr_vqa/images/0002.gif").read_bytes() == picture("GIF")
    assert (given / "ocr_vqa/images/0003.jpg").read_bytes() == picture("PNG")
    assert trained_on(data) == 16
