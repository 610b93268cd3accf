from pathlib import Path

import pytest
from PIL import Image

from llava_moe.data.image import IMAGE_MODES, load_image
from llava_moe.data.schema import DataError


def test_square_leaves_the_image_alone():
    image = Image.new("RGB", (6, 3), "red")
    assert IMAGE_MODES.get("square")(image, (0.5, 0.5, 0.5)) is image


@pytest.mark.parametrize(("size", "box"), [((6, 3), (0, 1, 6, 4)), ((3, 6), (1, 0, 4, 6)), ((4, 4), (0, 0, 4, 4))])
def test_pad_centres_the_image_on_the_mean_colour(size: tuple[int, int], box: tuple[int, int, int, int]):
    padded = IMAGE_MODES.get("pad")(Image.new("RGB", size, "red"), (0.48145466, 0.4578275, 0.40821073))
    assert padded.size == (max(size), max(size))
    for x in range(padded.width):
        for y in range(padded.height):
            inside = box[0] <= x < box[2] and box[1] <= y < box[3]
            assert padded.getpixel((x, y)) == ((255, 0, 0) if inside else (122, 116, 104))


def test_files_become_rgb_and_upright(tmp_path: Path):
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise when shown
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png", "r1")
    assert loaded.mode == "RGB"
    assert loaded.size == (2, 4)
    assert loaded.getpixel((1, 0)) == (200, 200, 200)


def test_alpha_is_dropped_not_composited(tmp_path: Path):
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", "r1").getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_truncated_files_name_the_record_and_the_file(tmp_path: Path, suffix: str):
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="r1") as caught:
        load_image(path, "r1")
    assert str(path) in str(caught.value)


def test_other_bad_files_name_the_record_and_the_file(tmp_path: Path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"'r1'.*text.png is not an image"):
        load_image(tmp_path / "text.png", "r1")
    with pytest.raises(DataError, match=r"'r1'.*gone.png does not exist"):
        load_image(tmp_path / "gone.png", "r1")
