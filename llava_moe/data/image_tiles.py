"""anyres on pixels: the tiles of an image, and the images of one sample in the order of their markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava_moe.data.image import pad
from llava_moe.data.image_grid import ImagePlan, Size, Tiling, fitted_size
from llava_moe.data.schema import DataError

_ORIENTATION_TAG = 0x0112
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""


def cut_tiles(image: Image.Image, resolution: Size, tile: int) -> list[Image.Image]:
    """The whole image and its tiles, row by row; all are RGB squares of `tile` pixels.

    The whole image is resized without keeping its ratio and the tiles keep it, in the middle of a black canvas: LLaVA
    was trained so, and every checkpoint expects it.

    Args:
        image: RGB.
        resolution: (height, width) in pixels, multiples of `tile`.
        tile: side of a tile in pixels.
    """
    full_height, full_width = resolution
    height, width = fitted_size((image.height, image.width), resolution)
    canvas = Image.new("RGB", (full_width, full_height), (0, 0, 0))
    fitted = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(fitted, ((full_width - width) // 2, (full_height - height) // 2))
    tiles = [
        canvas.crop((left, top, left + tile, top + tile))
        for top in range(0, full_height, tile)
        for left in range(0, full_width, tile)
    ]
    return [image.resize((tile, tile), Image.Resampling.BICUBIC), *tiles]


def tile_images(
    images: Sequence[Image.Image], tiling: Tiling, mean: Sequence[float]
) -> tuple[list[list[Image.Image]], list[ImagePlan]]:
    """The pictures that the image processor gets for the images of one sample, and their plans.

    Args:
        images: RGB, in the order of their markers; the order is kept.
        tiling: the anyres mode.
        mean: the image processor's mean in [0, 1], the colour around a padded image.

    Returns:
        For each image its tiles (`plan.num_tiles` of them), and its plan.
    """
    plans = tiling.plan([(image.height, image.width) for image in images])
    tiles = [
        [pad(image, mean)] if plan.resolution is None else cut_tiles(image, plan.resolution, tiling.tile)
        for image, plan in zip(images, plans, strict=True)
    ]
    return tiles, plans


def read_size(path: Path, sample_id: str) -> Size:
    """(height, width) that `load_image` will find, without decoding the pixels (except those of a PNG without EXIF).

    Lengths of a data set need the size of every image, and decoding them all would take hours.

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION_TAG) in _TURNED
    except FileNotFoundError:
        raise DataError(f"record {sample_id!r}: image {path} does not exist; check the image folder") from None
    except UnidentifiedImageError:
        raise DataError(f"record {sample_id!r}: {path} is not an image; replace the file or drop the record") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"record {sample_id!r}: {path} cannot be read ({error}); fetch it again or drop the record"
        ) from error
    return (width, height) if turned else (height, width)
