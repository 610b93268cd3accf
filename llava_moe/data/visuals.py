"""Images and videos of a sample: how many placeholders they take, and what the vision tower gets to see of them.

A visual is an image, or a video as the list of its frames. A model without tiles takes each image and each frame whole,
so its batch is `pixel_values` alone. A model with tiles also gets, as Python numbers and not as tensors (they decide
shapes, and reading them from a GPU would wait for it):

    image_sizes       (height, width) in pixels of every visual
    num_tiles         pictures of every visual in `pixel_values`; of a video its frames
    batch_num_images  visuals of every sample
    is_video          for every visual; absent if there is no video in the batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava_moe.data.image import IMAGE_MODES
from llava_moe.data.image_grid import ImagePlan, Size, Tiling, parse_mode
from llava_moe.data.image_tiles import tile_images
from llava_moe.data.schema import DataError

Visual = Image.Image | Sequence[Image.Image]
"""An RGB image, or the RGB frames of a video."""

Shape = Size | int
"""(height, width) of an image in pixels, or the number of frames of a video."""


def is_tiled(image_mode: str) -> bool:
    """Whether an image mode cuts images into tiles.

    Raises:
        ValueError: there is no such mode.
    """
    if image_mode in IMAGE_MODES.names():
        return False
    if not image_mode.startswith("anyres"):
        IMAGE_MODES.get(image_mode)
    parse_mode(image_mode)
    return True


def shape_of(visual: Visual) -> Shape:
    """What decides how many tokens a visual takes."""
    return (visual.height, visual.width) if isinstance(visual, Image.Image) else len(visual)


def frames_of(visual: Visual) -> list[Image.Image]:
    """The pictures of a visual that is not cut into tiles."""
    return [visual] if isinstance(visual, Image.Image) else list(visual)


@dataclass(frozen=True)
class TilePlanner:
    """How a model with tiles is shown the visuals of a sample.

    Attributes:
        image_mode: "square" and "pad" show every image as one tile.
        tiling: grids and merge.
    """

    image_mode: str
    tiling: Tiling

    def plan(self, shapes: Sequence[Shape]) -> list[ImagePlan]:
        """What becomes of each visual.

        Raises:
            DataError: a size is not positive, a video has no frame, or this checkpoint takes no videos.
        """
        sizes = [shape for shape in shapes if not isinstance(shape, int)]
        try:
            images = iter(self._plan_images(sizes))
            return [self._plan_video(shape) if isinstance(shape, int) else next(images) for shape in shapes]
        except ValueError as error:
            raise DataError(str(error)) from error

    def _plan_images(self, sizes: Sequence[Size]) -> list[ImagePlan]:
        if is_tiled(self.image_mode):
            return self.tiling.plan(sizes)
        return [ImagePlan(size, None, 1, self.tiling.num_single_tokens) for size in sizes]

    def _plan_video(self, num_frames: int) -> ImagePlan:
        tile = self.tiling.tile
        return ImagePlan((tile, tile), None, num_frames, self.tiling.num_video_tokens(num_frames))

    def cut(self, visuals: Sequence[Visual], mean: Sequence[float]) -> tuple[list[Image.Image], list[ImagePlan]]:
        """The pictures that the image processor gets, those of one visual after another, and the plans.

        Args:
            visuals: of one sample, in the order of their markers; alpha is dropped.
            mean: the image processor's mean in [0, 1], the colour around a padded image.
        """
        plans = self.plan([shape_of(visual) for visual in visuals])
        images = [visual.convert("RGB") for visual in visuals if isinstance(visual, Image.Image)]
        if is_tiled(self.image_mode):
            tiles = iter(tile_images(images, self.tiling, mean)[0])
        else:
            tiles = iter([[IMAGE_MODES.get(self.image_mode)(image, mean)] for image in images])
        pictures: list[Image.Image] = []
        for visual in visuals:
            # LLaVA-NeXT resizes the frames of a video to squares, whatever the image mode is
            pictures += next(tiles) if isinstance(visual, Image.Image) else list(visual)
        return pictures, plans


def plan_entries(visuals: Sequence[Visual], plans: Sequence[ImagePlan]) -> dict[str, Any]:
    """The entries of a sample beside its pixels; `image_tokens` are the placeholders that the plan reserves."""
    return {
        "image_sizes": [plan.size for plan in plans],
        "num_tiles": [plan.num_tiles for plan in plans],
        "is_video": [not isinstance(visual, Image.Image) for visual in visuals],
        "image_tokens": [plan.num_tokens for plan in plans],
    }


def join_visuals(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The visuals of a batch, in the order of the samples; empty if there are none.

    Args:
        samples: results of the processor, with or without visuals.
    """
    shown = [sample for sample in samples if sample.get("pixel_values") is not None]
    if not shown:
        return {}
    joined: dict[str, Any] = {"pixel_values": torch.cat([sample["pixel_values"] for sample in shown])}
    if "num_tiles" not in shown[0]:
        return joined
    for key in ("image_sizes", "num_tiles", "is_video"):
        joined[key] = [value for sample in shown for value in sample[key]]
    if not any(joined["is_video"]):
        del joined["is_video"]
    joined["batch_num_images"] = [len(sample.get("num_tiles", ())) for sample in samples]
    return joined
