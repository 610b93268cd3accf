"""Archives and folders end up in the layout of the recipes, and odd OCR-VQA names get a second one."""

from __future__ import annotations

import errno
import io
import os
import threading
import zipfile
from pathlib import Path

import pytest

from data_prep import unpack as module
from data_prep.errors import InterruptError, PrepareError
from data_prep.manifest import Unpack
from data_prep.unpack import add_jpg_names, count_images, link_folder, settle_names, unpack
from tests.data_prep.upstream import picture, zipped

RULE = Unpack(r"images/([^/]+\.\w+)$", "mix/ocr_vqa/images", 3)
MEMBERS = {"images/1.jpg": picture(shade=1), "images/2.gif": picture("GIF"), "images/3.jpg": picture(shade=3)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "images.zip"
    path.write_bytes(zipped(MEMBERS))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_the_images_and_at_their_place(archive: Path, tmp_path: Path) -> None:
    done: list[int] = []
    assert unpack(archive, RULE, tmp_path / "data", advance=done.append) == 3
    target = tmp_path / "data/mix/ocr_vqa/images"
    assert files_of(target) == {name.removeprefix("images/"): content for name, content in MEMBERS.items()}
    assert sum(done) == sum(map(len, MEMBERS.values()))
    assert count_images(target) == 3


def test_what_is_there_is_left_alone_and_the_rest_completed(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "data/mix/ocr_vqa/images"
    unpack(archive, RULE, tmp_path / "data")
    kept = (target / "1.jpg").stat()
    (target / "2.gif").unlink()
    (target / "3.jpg").write_bytes(b"half")  # as a copy that was cut off
    unpack(archive, RULE, tmp_path / "data")
    assert files_of(target) == {name.removeprefix("images/"): content for name, content in MEMBERS.items()}
    assert (target / "1.jpg").stat().st_mtime_ns == kept.st_mtime_ns


def test_an_interruption_leaves_no_half_file(archive: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    with pytest.raises(InterruptError):
        unpack(archive, RULE, tmp_path / "data", advance=lambda _: stop.set(), stop=stop)
    target = tmp_path / "data/mix/ocr_vqa/images"
    assert files_of(target) == {"1.jpg": MEMBERS["images/1.jpg"]}
    assert unpack(archive, RULE, tmp_path / "data") == 3
    assert count_images(target) == 3


def test_a_full_disk_leaves_no_half_file(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(PrepareError, match=r"the disk is full while unpacking .*1\.jpg"):
        unpack(archive, RULE, tmp_path / "data")
    assert files_of(tmp_path / "data/mix/ocr_vqa/images") == {}


def test_damage_inside_an_archive_is_named(archive: Path, tmp_path: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[content.index(MEMBERS["images/3.jpg"]) + 100] ^= 255
    archive.write_bytes(content)
    with pytest.raises(PrepareError, match=r"images\.zip: images/3\.jpg is damaged .*CRC"):
        unpack(archive, RULE, tmp_path / "data")
    assert set(files_of(tmp_path / "data/mix/ocr_vqa/images")) == {"1.jpg", "2.gif"}


def test_a_truncated_archive_is_named(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(PrepareError, match=r"images\.zip: not a whole zip file"):
        unpack(archive, RULE, tmp_path / "data")


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped({"train2017/1.jpg": b"x"}))
    with pytest.raises(PrepareError, match=r"x\.zip: no member matches .*not upstream's file"):
        unpack(tmp_path / "x.zip", RULE, tmp_path / "data")


def test_no_member_can_leave_the_folder(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("images/../../../evil.jpg", b"x")
    (tmp_path / "x.zip").write_bytes(sink.getvalue())
    with pytest.raises(PrepareError, match="would leave the folder"):
        unpack(tmp_path / "x.zip", Unpack(r"images/(.+)$", "a/b", 1), tmp_path / "data")
    assert not (tmp_path / "evil.jpg").exists()


def test_odd_names_get_the_name_of_the_records(tmp_path: Path) -> None:
    gif = picture("GIF")
    for name in ("1.jpg", "2.gif", "3.PNG", "4.jpg", "4.gif", "noending"):
        (tmp_path / name).write_bytes(gif)
    assert add_jpg_names(tmp_path) == 2
    assert (tmp_path / "2.jpg").read_bytes() == gif
    assert (tmp_path / "3.jpg").read_bytes() == gif
    assert not (tmp_path / "4.jpg").is_symlink()
    assert add_jpg_names(tmp_path) == 0


def test_a_folder_is_linked_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/1.jpg").write_bytes(b"x")
    target = tmp_path / "data/mix/gqa/images"
    for _ in range(2):  # again after an interruption
        link_folder(tmp_path / "there", target, odd_names=False)
    assert target.is_symlink()
    assert (target / "1.jpg").read_bytes() == b"x"
    assert count_images(target) == 1


def test_a_folder_with_odd_names_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("1.jpg", "2.gif"):
        (tmp_path / "there" / name).write_bytes(name.encode())
    target = tmp_path / "data/mix/ocr_vqa/images"
    for _ in range(2):
        link_folder(tmp_path / "there", target, odd_names=True)
    assert files_of(target) == {"1.jpg": b"1.jpg", "2.gif": b"2.gif", "2.jpg": b"2.gif"}
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["1.jpg", "2.gif"]


def test_a_link_made_by_hand_is_taken_apart_only_for_odd_names(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/1.jpg").write_bytes(b"1")
    target = tmp_path / "images"
    target.symlink_to(tmp_path / "there")
    settle_names(target)
    assert target.is_symlink()
    (tmp_path / "there/2.gif").write_bytes(b"2")
    settle_names(target)
    assert not target.is_symlink()
    assert files_of(target) == {"1.jpg": b"1", "2.gif": b"2", "2.jpg": b"2"}
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_a_folder_in_the_way_is_not_removed(tmp_path: Path) -> None:
    for name in ("there", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    with pytest.raises(PrepareError, match=r"linking .*target: "):
        link_folder(tmp_path / "there", tmp_path / "target", odd_names=False)
    assert (tmp_path / "target/1.jpg").is_file()


def test_counting_sees_one_level_of_folders(tmp_path: Path) -> None:
    for name in ("00000/1.jpg", "00001/2.jpg", "00001/3.jpg.partial", "4.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert count_images(tmp_path) == 3
    assert count_images(tmp_path / "gone") == 0
    assert count_images(tmp_path / "4.jpg") == 0
