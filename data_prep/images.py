"""Looks at image files, in many processes. Imports Pillow only, so that a worker starts at once.

`look` must agree with `llava_moe.data.image.load_image` about what can be read (a test holds it to that), and is
stricter in one point: a picture of one pixel, which is what shops serve in the place of a deleted one, teaches nothing.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import IO

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

MIN_SIDE = 2
_BATCH = 256

Verdict = tuple[str, str]
"""(format as Pillow names it, problem): one of them is empty, except for a readable placeholder."""


def look(path: str | os.PathLike[str]) -> Verdict:
    """Opens and decodes a file."""
    try:
        with open(path, "rb") as handle:
            return _judge(handle)
    except FileNotFoundError:
        return "", "missing"
    except OSError as error:
        return "", f"cannot be read ({error.strerror or error})"


def look_at_bytes(content: bytes) -> Verdict:
    """The same for what is not a file yet."""
    return _judge(io.BytesIO(content))


def _judge(handle: IO[bytes]) -> Verdict:
    kept, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # other libraries set it
    try:
        with Image.open(handle) as image:
            kind = image.format or ""
            width, height = image.size
            ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        handle.seek(0)
        head = handle.read(512).lstrip()
        return "", "empty file" if not head else "a web page" if head.startswith(b"<") else "not an image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "", f"cannot be decoded ({' '.join(str(error).split())})"
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = kept
    return kind, f"a placeholder of {width} x {height} pixels" if min(width, height) < MIN_SIDE else ""


def _look_at_batch(paths: Sequence[str]) -> list[Verdict]:
    return [look(path) for path in paths]


def _exists_batch(paths: Sequence[str]) -> list[Verdict]:
    return [("", "" if os.path.isfile(path) else "missing") for path in paths]


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def look_at_all(
    paths: Sequence[str], *, workers: int, decode: bool = True, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Verdict]:
    """Verdicts by path.

    Args:
        paths: image files.
        workers: processes; 1 stays in this one.
        decode: False only looks whether the files exist.
        advance: called with the number of files seen.
    """
    judge = _look_at_batch if decode else _exists_batch
    batches = [paths[start : start + _BATCH] for start in range(0, len(paths), _BATCH)]
    verdicts: dict[str, Verdict] = {}
    if workers <= 1 or len(batches) <= 1:
        for batch in batches:
            verdicts.update(zip(batch, judge(batch), strict=True))
            advance(len(batch))
        return verdicts
    # spawn: a fork would copy whatever threads hold locks at that moment
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_interrupts_to_the_parent) as pool:
        jobs = {pool.submit(judge, batch): batch for batch in batches}
        try:
            for job in as_completed(jobs):
                verdicts.update(zip(jobs[job], job.result(), strict=True))
                advance(len(jobs[job]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return verdicts


def make_jpeg(path: Path) -> None:
    """Replaces a readable image of another format by a JPEG (first frame, RGB, quality 95) under the same name."""
    with Image.open(path) as image:
        picture = ImageOps.exif_transpose(image).convert("RGB")
    fresh = path.with_name(f"{path.name}.partial")
    try:
        picture.save(fresh, "JPEG", quality=95)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
