"""Videos as frames: a list of frame files, or a video file where PyAV is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_moe.data.image import load_image
from llava_moe.data.schema import DataError


def frame_indices(total: int, wanted: int) -> list[int]:
    """`wanted` of `total` frames at equal distances, the first and the last among them; all if there are not more.

    LLaVA-NeXT's rule (`linspace(0, total - 1, wanted)` without fractions), in integers. transformers' video processors
    leave the last frame out.

    Raises:
        ValueError: a number is below 1.
    """
    if total < 1 or wanted < 1:
        raise ValueError(f"{wanted} frame(s) of {total} were asked for; both must be at least 1")
    if total <= wanted:
        return list(range(total))
    if wanted == 1:
        return [0]
    return [index * (total - 1) // (wanted - 1) for index in range(wanted)]


def num_shown(source: Path | Sequence[Path], num_frames: int) -> int:
    """How many frames `load_frames` gives; of a video file, which is not opened, as many as it can be at most."""
    return num_frames if isinstance(source, Path) else min(len(source), num_frames)


def load_frames(source: Path | Sequence[Path], num_frames: int, sample_id: str) -> list[Image.Image]:
    """At most `num_frames` RGB frames in their order.

    Args:
        source: one video file, or the files of its frames in order.
        num_frames: how many frames are wanted.
        sample_id: for messages.

    Raises:
        DataError: there are no frames, a file cannot be decoded, or a video file is given and PyAV is not installed.
    """
    if isinstance(source, Path):
        return _video_frames(source, num_frames, sample_id)
    if not source:
        raise DataError(f"record {sample_id!r}: the video has no frame files; list at least one")
    return [load_image(source[index], sample_id) for index in frame_indices(len(source), num_frames)]


def _video_frames(path: Path, num_frames: int, sample_id: str) -> list[Image.Image]:
    if not path.is_file():
        raise DataError(f"record {sample_id!r}: video {path} does not exist; check the video folder")
    if importlib.util.find_spec("av") is None:
        raise DataError(
            f"record {sample_id!r}: {path} is a video file, and reading it needs PyAV; run `pip install av`, or list "
            "the files of its frames instead"
        )
    import av  # only where a video file is read: it is no dependency of the package

    try:
        with av.open(str(path)) as container:
            announced = int(container.streams.video[0].frames)
        total = announced or _walk(av, path, frozenset())[1]
        frames, found = _walk(av, path, frozenset(frame_indices(total, num_frames))) if total else ([], 0)
        if found != total and found:
            # the head of a file may announce another number of frames than it holds
            frames, _ = _walk(av, path, frozenset(frame_indices(found, num_frames)))
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise DataError(
            f"record {sample_id!r}: video {path} cannot be decoded ({error}); fetch it again or drop the record"
        ) from error
    if not frames:
        raise DataError(f"record {sample_id!r}: video {path} holds no frame; fetch it again or drop the record")
    return frames


def _walk(av: Any, path: Path, wanted: frozenset[int]) -> tuple[list[Image.Image], int]:
    """Decodes a whole file: the wanted frames, and the number of all."""
    frames, found = [], 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if found in wanted:
                frames.append(frame.to_image().convert("RGB"))
            found += 1
    return frames, found
