"""What counts as a picture: the same as in training, but no placeholders; OCR-VQA's pictures from their addresses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from data_prep import images
from data_prep.errors import PrepareError
from data_prep.images import look, look_at_all, make_jpeg
from data_prep.ocr_vqa import fetch_pictures, read_addresses
from llava_moe.data.image import load_image
from llava_moe.data.schema import DataError
from tests.data_prep.server import Host, serving
from tests.data_prep.upstream import PAGE, PIXEL, noise, picture

ODD = {
    "plain.jpg": (picture(), "JPEG", ""),
    "gif.jpg": (picture("GIF"), "GIF", ""),
    "png.jpg": (picture("PNG"), "PNG", ""),
    "webp.jpg": (picture("WEBP"), "WEBP", ""),
    "bmp.jpg": (picture("BMP"), "BMP", ""),
    "pixel.jpg": (PIXEL, "GIF", "a placeholder of 1 x 1 pixels"),
    "page.jpg": (PAGE, "", "a web page"),
    "empty.jpg": (b"", "", "empty file"),
    "noise.jpg": (b"\x01\x02\x03" * 50, "", "not an image"),
    "cut.jpg": (noise("JPEG")[:1500], "", "cannot be decoded (image file is truncated"),
    "cut_gif.jpg": (noise("GIF")[:1500], "", "cannot be decoded ("),
    "cut_png.jpg": (noise("PNG")[:1500], "", "cannot be decoded ("),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, (content, _, _) in ODD.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ODD)
def test_verdicts(folder: Path, name: str) -> None:
    _, kind, problem = ODD[name]
    assert look(folder / name)[0] == kind
    assert look(folder / name)[1].startswith(problem)
    assert bool(look(folder / name)[1]) == bool(problem)


def test_missing_and_unreadable(folder: Path) -> None:
    assert look(folder / "gone.jpg") == ("", "missing")
    assert look(folder / "folder.jpg")[1].startswith("cannot be read (")


def test_training_reads_exactly_what_we_let_pass(folder: Path) -> None:
    agreed = 0
    for name in [*ODD, "gone.jpg", "folder.jpg"]:
        try:
            load_image(folder / name, "x")
            readable = True
        except DataError:
            readable = False
        problem = look(folder / name)[1]
        assert readable == (not problem or "placeholder" in problem), name
        agreed += 1
    assert agreed == 14


@pytest.mark.parametrize("workers", [1, 2])
def test_many_files_in_processes(folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_BATCH", 5)
    paths = [str(folder / name) for name in ODD]
    done: list[int] = []
    verdicts = look_at_all(paths, workers=workers, advance=done.append)
    assert verdicts == {path: look(path) for path in paths}
    assert sum(done) == len(paths) == 12


def test_looking_only_whether_files_exist(folder: Path) -> None:
    paths = [str(folder / name) for name in ("page.jpg", "gone.jpg", "folder.jpg")]
    verdicts = look_at_all(paths, workers=1, decode=False)
    assert [verdicts[path][1] for path in paths] == ["", "missing", "missing"]


@pytest.mark.parametrize("name", ["gif.jpg", "png.jpg", "webp.jpg"])
def test_a_real_jpeg_of_the_same_picture(folder: Path, name: str) -> None:
    before = load_image(folder / name, "x")
    make_jpeg(folder / name)
    with Image.open(folder / name) as after:
        assert (after.format, after.size, after.mode) == ("JPEG", before.size, "RGB")
        largest = max(abs(a - b) for a, b in zip(before.tobytes(), after.tobytes(), strict=True))
    assert largest <= 8
    assert not list(folder.glob("*.partial"))


def test_a_link_becomes_a_jpeg_and_what_it_led_to_stays(folder: Path) -> None:
    (folder / "K.jpg").symlink_to("gif.jpg")
    make_jpeg(folder / "K.jpg")
    assert look(folder / "K.jpg") == ("JPEG", "")
    assert (folder / "gif.jpg").read_bytes() == ODD["gif.jpg"][0]


@pytest.fixture
def shop() -> Iterator[Host]:
    with serving(Host({"/1.jpg": picture(), "/2.gif": picture("GIF"), "/3.jpg": PAGE, "/4.jpg": PIXEL})) as host:
        yield host


def test_dead_pictures_are_fetched_or_explained(shop: Host, tmp_path: Path) -> None:
    listing = {f"{i}": {"imageURL": f"{shop.url}/{i}.{'gif' if i == 2 else 'jpg'}", "title": "x"} for i in range(1, 6)}
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    addresses = read_addresses(tmp_path / "dataset.json")
    paths = [tmp_path / f"images/{i}.jpg" for i in range(1, 7)]
    done: list[int] = []
    found = fetch_pictures(paths, addresses, connections=3, advance=done.append)
    assert [found[path] for path in paths[:2]] == ["", ""]
    assert [look(path) for path in paths[:2]] == [("JPEG", ""), ("GIF", "")]
    assert "3.jpg serves a web page" in found[paths[2]]
    assert "4.jpg serves a placeholder of 1 x 1 pixels" in found[paths[3]]
    assert "5.jpg answers 404" in found[paths[4]]
    assert found[paths[5]] == "no address in dataset.json"
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["1.jpg", "2.jpg"]
    assert sum(done) == 6


def test_a_shop_that_is_gone_is_no_crash(tmp_path: Path) -> None:
    with serving(Host()) as host:
        pass
    (problem,) = fetch_pictures([tmp_path / "1.jpg"], {"1": f"{host.url}/1.jpg"}, connections=1).values()
    assert host.url in problem


@pytest.mark.parametrize("text", ["[]", "{", '{"1": {"url": "x"}}', '{"1": "x"}'])
def test_not_the_list_of_addresses(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(PrepareError, match=r"dataset\.json: not OCR-VQA's dataset\.json"):
        read_addresses(tmp_path / "dataset.json")


def test_no_list_of_addresses(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"gone\.json: No such file"):
        read_addresses(tmp_path / "gone.json")
