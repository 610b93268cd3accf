"""Images: reading files, and what happens to their shape before the image processor sees them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from llava_moe.data.schema import DataError
from llava_moe.registry import Registry

ImageMode = Callable[[Image.Image, Sequence[float]], Image.Image]
"""(RGB image, the image processor's mean in [0, 1]) -> the image the processor gets."""

IMAGE_MODES: Registry[ImageMode] = Registry("image mode")

_DECODING = threading.Lock()
_decoders = 0
_kept_flag = False


@contextmanager
def truncation_is_an_error() -> Iterator[None]:
    """Within it PIL refuses truncated files, also where another library of the process has told it to accept them.

    lmms-eval does so when it is imported; a grey half of a picture would be trained on without a word. The flag is
    PIL's own and of the whole process: several threads may be inside, and the last one to leave restores it.
    """
    global _decoders, _kept_flag
    with _DECODING:
        if _decoders == 0:
            _kept_flag, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _decoders += 1
    try:
        yield
    finally:
        with _DECODING:
            _decoders -= 1
            if _decoders == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _kept_flag


def load_image(path: Path, sample_id: str) -> Image.Image:
    """Opens and fully decodes a file as RGB.

    The camera's EXIF rotation is applied. Alpha is dropped, not composited: `convert("RGB")` as in LLaVA, so that
    training and stock inference see the same colours.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    try:
        with truncation_is_an_error(), path.open("rb") as file, Image.open(file) as image:
            # convert decodes all pixels, so a truncated file fails here and not in the middle of a batch
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"record {sample_id!r}: image {path} does not exist; check the image folder") from None
    except UnidentifiedImageError:
        raise DataError(f"record {sample_id!r}: {path} is not an image; replace the file or drop the record") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL reports damaged data as OSError, SyntaxError (PNG chunks) or ValueError, depending on the format
        raise DataError(
            f"record {sample_id!r}: {path} cannot be decoded ({error}); fetch it again or drop the record"
        ) from error


@IMAGE_MODES.register("square")
def square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Leaves the image alone: the processor resizes it to its square (CLIP crops the centre, SigLIP distorts)."""
    return image


@IMAGE_MODES.register("pad")
def pad(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Expands to a square in the mean colour, the image centred, so that nothing is cropped (LLaVA-1.5)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas
