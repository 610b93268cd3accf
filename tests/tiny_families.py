"""Tiny models of all LLaVA families with their processors; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
from PIL import Image  # isort: skip

from llava_moe.data.processing import LlavaMoeProcessor  # isort: skip
from llava_moe.data.processor_parts import default_tiling
from llava_moe.data.schema import Turn
from llava_moe.model.families import FAMILIES
from llava_moe.model.projectors.base import Projector
from llava_moe.moe import Experts, Router
from llava_moe.training.images import match_images
from tests.tiny import tiny_image, tiny_siglip_processor, tiny_tokenizer
from tests.tiny_model import tiny_text_config, tiny_vision_config

TILE, SIDE = 16, 2  # pixels and features along a side of a tile
MODES = {"llava": "square", "llava_next": "anyres", "llava_onevision": "anyres_max_2"}
SIZES = ((40, 20), (17, 33), (16, 16), (50, 14))
"""(width, height) of four images: two tiles side by side, two one above the other, one, three in a row."""


def family_processor(
    family: str, image_mode: str | None = None, template: str = "chatml", **tiling: Any
) -> LlavaMoeProcessor:
    """The processor of a tiny model; keys of `tiling` as in a recipe."""
    mode = image_mode or MODES[family]
    made = tiny_siglip_processor(template, "square", TILE, TILE // SIDE)
    if not FAMILIES.get(family).is_tiled:
        return tiny_siglip_processor(template, mode, TILE, TILE // SIDE)
    return LlavaMoeProcessor(
        made.image_processor,
        made.tokenizer,
        patch_size=TILE // SIDE,
        vision_feature_select_strategy="full",
        template=template,
        image_mode=mode,
        tiling=default_tiling(family, {"grids": "(1x1),...,(3x3)", **tiling}),
    )


def family_config(family: str, moe: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The config of a tiny model."""
    image_token = tiny_tokenizer().convert_tokens_to_ids("<image>")
    values: dict[str, Any] = {
        "vision_config": tiny_vision_config("siglip"),
        "text_config": tiny_text_config("qwen2"),
        "image_token_index": image_token,
        "image_seq_length": SIDE**2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
        "moe": moe,
    }
    if family == "llava_onevision":
        values["video_token_index"] = image_token
    return FAMILIES.get(family).config(**{**values, **changes})


def family_model(
    family: str, moe: dict[str, Any] | None = None, processor: LlavaMoeProcessor | None = None, **changes: Any
) -> Any:
    """A seeded float32 model in eval mode that goes with a processor; the global random state is left alone."""
    config = family_config(family, moe, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES.get(family).model(config).eval()
        # the default initial values are so small that neither pictures nor routing would matter to the answers
        for module in model.modules():
            if isinstance(module, Projector | Experts | Router):
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
        if getattr(model.model, "image_newline", None) is not None:
            torch.nn.init.normal_(model.model.image_newline)
    match_images(model, processor or family_processor(family))
    return model


def write_family_checkpoint(
    path: Path, family: str, moe: dict[str, Any] | None = None, processor: LlavaMoeProcessor | None = None
) -> Path:
    """Writes model and processor as a finished run does; returns `path`."""
    processor = processor or family_processor(family)
    model = family_model(family, moe, processor)
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.pad_token_id
    model.save_pretrained(path, save_original_format=True)
    processor.save_pretrained(path)
    return path


def images(count: int, first: int = 0) -> list[Image.Image]:
    """Drawn images of different sizes."""
    return [tiny_image(i, SIZES[i % len(SIZES)]) for i in range(first, first + count)]


def prompts(processor: LlavaMoeProcessor) -> list[dict[str, Any]]:
    """Eight questions with none, one or two images of different sizes."""
    questions = (
        "<image>\nWhat is the shape?",
        "describe",
        "<image>\n<image>\nWhat colour is it?",
        "<image>\nred",
        "What is <image> and <image> and the colour?",
        "<image>\ndescribe the image and the shape and the colour",
        "is it red",
        "<image>\nis it green and what is a circle?",
    )
    found, used = [], 0
    for question in questions:
        count = question.count("<image>")
        found.append(processor.encode_prompt([Turn("user", question)], images(count, used)))
        used += count
    return found


def write_mixed_json(folder: Path, n: int = 6) -> tuple[Path, Path]:
    """Records with one image, with two, and with none, in turn; the images differ in size."""
    where = folder / "images"
    where.mkdir(parents=True, exist_ok=True)
    records, used = [], 0
    for index in range(n):
        count = (1, 2, 0)[index % 3]
        names = [f"{used + i}.png" for i in range(count)]
        for name, image in zip(names, images(count, used), strict=True):
            image.save(where / name)
        used += count
        question = ("<image>\nWhat colour is it?", "The <image> and the <image>?", "What is red?")[index % 3]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a red square"}]
        records.append({"id": f"mixed-{index}", "image": names, "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path, where
