"""The image processor (PIL) that goes with a tower of a recipe.

A tower of transformers keeps its own. All others, and a tower of transformers with `model.image_size`, have pictures
resized to a square: DINOv2's own processor, for example, crops to less than the tower was trained with.
"""

from __future__ import annotations

from typing import Any

import timm
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from llava_moe.config import ModelSection
from llava_moe.model.vision_convert import open_clip_config, open_clip_timm
from llava_moe.model.vision_names import MissingTowerError, split_source, with_layer, with_scales

_OPENAI = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def image_processor(section: ModelSection, vision: Any) -> Any:
    """The image processor of the tower that a recipe names, at the size that the tower takes.

    Args:
        vision: the tower's config.

    Raises:
        MissingTowerError: the tower has no image processor here.
        ValueError: it is not known how its pictures are normalised.
    """
    kind, rest = split_source(str(section.vision_tower))
    if kind == "timm":
        return _plain_processor(vision, *_timm_statistics(with_layer(rest)[0]))
    if kind == "open_clip":
        return _plain_processor(vision, *_open_clip_statistics(with_layer(rest)[0]))
    if kind == "fused":
        return _plain_processor(vision, vision.image_means[0], vision.image_stds[0])
    if kind == "s2":
        return _plain_processor(vision, *channel_statistics(with_layer(with_scales(rest)[1])[0]))
    if section.image_size is not None:
        return _plain_processor(vision, *channel_statistics(rest))
    return _own_processor(rest)


def channel_statistics(source: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels that a tower of transformers was trained with.

    Raises:
        MissingTowerError: it has no image processor here.
    """
    found = _own_processor(source)
    return list(found.image_mean), list(found.image_std)


def _own_processor(source: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError) as error:
        raise MissingTowerError(
            f"model.vision_tower={source}: no image processor: {str(error).splitlines()[0]}"
        ) from error


def _timm_statistics(architecture: str) -> tuple[list[float], list[float]]:
    defaults = timm.get_pretrained_cfg(architecture)
    if defaults is None:
        raise ValueError(
            f"model.vision_tower=timm:{architecture}: timm does not say how its pictures are normalised; choose "
            "a model that timm has weights for"
        )
    return list(defaults.mean), list(defaults.std)


def _open_clip_statistics(name: str) -> tuple[list[float], list[float]]:
    """Those in the JSON file; without them, those of OpenAI's CLIP, as most transformers of open_clip have them."""
    model = open_clip_config(name)
    found = model["preprocess_cfg"]
    if "mean" in found and "std" in found:
        return list(found["mean"]), list(found["std"])
    if open_clip_timm(model) is not None:
        raise ValueError(
            f"model.vision_tower=open_clip:{name}: its config does not say how pictures are normalised, which differs "
            "between weights; name the open_clip_config.json beside them, which has a preprocess_cfg"
        )
    return _OPENAI


def _plain_processor(vision: Any, mean: list[float], std: list[float]) -> Any:
    """Resizes to the square that the tower takes, and normalises."""
    size = {"height": int(vision.image_size), "width": int(vision.image_size)}
    return CLIPImageProcessorPil(
        do_resize=True, size=size, do_center_crop=False, crop_size=size, image_mean=mean, image_std=std
    )
