"""anyres on pixels, against transformers' image processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_moe  # noqa: F401  before anything that may import torchvision

from PIL import Image  # isort: skip
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil  # isort: skip
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil  # isort: skip
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (  # isort: skip
    LlavaOnevisionImageProcessorPil,
)

from llava_moe.data.image import load_image  # isort: skip
from llava_moe.data.image_grid import Tiling, parse_grid  # isort: skip
from llava_moe.data.image_tiles import cut_tiles, read_size, tile_images  # isort: skip
from llava_moe.data.schema import DataError  # isort: skip

TILE = 28
SIZES = [(28, 28), (9, 9), (31, 97), (97, 31), (55, 57), (60, 45), (95, 126), (83, 84), (200, 13), (13, 200), (5, 40)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_whole_image_is_distorted_and_the_tiles_are_not():
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (4, 0, 8, 4))
    base, *tiles = cut_tiles(image, (8, 8), 4)
    assert base.size == (4, 4)
    assert len(tiles) == 4
    assert [base.getpixel((0, y)) for y in range(4)] == [(255, 0, 0)] * 4  # no bars above and below
    rows = [[tile.getpixel((1, y)) for y in range(4)] for tile in tiles]
    black, red, blue = (0, 0, 0), (255, 0, 0), (0, 0, 255)
    assert rows[0] == [black, black, red, red]  # the image is 8 x 4 in the middle of 8 x 8
    assert rows[1] == [black, black, blue, blue]
    assert rows[2] == [red, red, black, black]
    assert rows[3] == [blue, blue, black, black]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_llava_next_processor(size: tuple[int, int]):
    grid = [list(pair) for pair in parse_grid("llava-1.6", TILE)]
    square: Any = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    theirs = LlavaNextImageProcessorPil(image_grid_pinpoints=grid, **square)(picture(size), return_tensors="np")
    mode = Tiling(tile=TILE, side=2, resolutions=parse_grid("llava-1.6", TILE))
    tiles, plans = tile_images([picture(size)], mode, (0.5, 0.5, 0.5))
    ours = CLIPImageProcessorPil(**square)(tiles[0], return_tensors="np")["pixel_values"]
    assert len(tiles[0]) == plans[0].num_tiles
    np.testing.assert_array_equal(ours, theirs["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_onevision_processor(size: tuple[int, int]):
    resolutions = parse_grid("(1x1),...,(3x3)", TILE)
    options: Any = {
        "size": {"height": TILE, "width": TILE},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }
    theirs = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=[list(pair) for pair in resolutions], **options)
    one = SiglipImageProcessorPil(**options)
    mode = Tiling(tile=TILE, side=2, resolutions=resolutions, max_tiles=4)

    tiles, _ = tile_images([picture(size)], mode, theirs.image_mean)
    expected = theirs([[picture(size)]], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(one(tiles[0], return_tensors="np")["pixel_values"], expected)

    pair = [picture(size), picture((20, 30), seed=1)]  # two images of one sample: padded squares, in their order
    tiles, plans = tile_images(pair, mode, theirs.image_mean)
    assert [len(of_one) for of_one in tiles] == [plan.num_tiles for plan in plans] == [1, 1]
    expected = theirs([pair], return_tensors="np")["pixel_values"]
    for ours, wanted in zip(tiles, expected, strict=True):
        np.testing.assert_array_equal(one(ours, return_tensors="np")["pixel_values"], wanted)


def test_the_tiles_of_several_images_keep_their_order():
    mode = Tiling(tile=4, side=1, resolutions=((4, 4), (4, 8)), several_images="anyres")
    images = [Image.new("RGB", (8, 4), "red"), Image.new("RGB", (4, 4), "blue")]
    tiles, plans = tile_images(images, mode, (0.5, 0.5, 0.5))
    assert [{tile.getpixel((2, 2)) for tile in of_one} for of_one in tiles] == [{(255, 0, 0)}, {(0, 0, 255)}]
    assert [len(of_one) for of_one in tiles] == [plan.num_tiles for plan in plans] == [3, 2]
    assert [plan.size for plan in plans] == [(4, 8), (4, 4)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_sizes_are_read_as_images_are_loaded(tmp_path: Path, suffix: str, orientation: int | None):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture((5, 11)).save(path, exif=exif)
    loaded = load_image(path, "r1")
    assert read_size(path, "r1") == (loaded.height, loaded.width)
    assert read_size(path, "r1") == ((11, 5) if orientation in (5, 6, 7, 8) else (5, 11))


def test_files_without_a_size_name_the_record_and_the_file(tmp_path: Path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"'r1'.*text.png is not an image"):
        read_size(tmp_path / "text.png", "r1")
    with pytest.raises(DataError, match=r"'r1'.*gone.png does not exist"):
        read_size(tmp_path / "gone.png", "r1")
    picture((64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"'r1'.*cut.png cannot be read"):
        read_size(tmp_path / "cut.png", "r1")
