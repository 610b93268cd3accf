"""Where a run starts: a named checkpoint, or a first one put together from tower and decoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llava_moe.config import RunConfig
from llava_moe.data.processing import DEFAULT_NUM_FRAMES, LlavaMoeProcessor
from llava_moe.data.templates import TEMPLATES
from llava_moe.model.assemble import assemble, check_checkpoint, whole_directory
from llava_moe.model.vision_images import image_processor
from llava_moe.training import distributed
from llava_moe.training.chain import check_start
from llava_moe.training.images import DEFAULT_IMAGE_MODE, family_name, first_tiling, match_images, merging

_FACTS = "assemble.json"
_DEFAULT_TEMPLATE = "plain"


def start_point(config: RunConfig) -> Path:
    """The checkpoint directory to load; rank 0 assembles it when the recipe names none.

    Raises:
        CheckpointError: the named directory is no checkpoint.
        ValueError: a part to assemble is wrong.
    """
    if config.model.checkpoint is not None:
        checkpoint = check_checkpoint(config.model.checkpoint)
        check_start(config, checkpoint)
        return checkpoint
    initial = Path(config.output_dir) / "initial"
    if distributed.rank() == 0:
        facts = {
            "model": _model_facts(dataclasses.asdict(config.model)),
            "seed": config.seed,
            "data": _data_facts(config),
        }
        known = initial / _FACTS
        if not (known.is_file() and _known_facts(known) == facts):
            with distributed.unpartitioned():
                write_initial(config, initial)
            known.write_text(json.dumps(facts, indent=2))
    distributed.barrier()
    return check_checkpoint(initial)


def _model_facts(model: dict[str, Any]) -> dict[str, Any]:
    """What the weights of a first model depend on; how its attention is computed is not among it."""
    return {key: value for key, value in model.items() if key != "attn_implementation"}


def _known_facts(path: Path) -> dict[str, Any]:
    known = json.loads(path.read_text())
    return {**known, "model": _model_facts(known["model"])}


def _data_facts(config: RunConfig) -> dict[str, Any]:
    keys = ("template", "template_options", "image_mode", "tiling", "num_frames")
    return {key: getattr(config.data, key) for key in keys}


def write_initial(config: RunConfig, out: Path) -> None:
    """Assembles model and processor and writes them to `out`."""
    mode = config.data.image_mode or DEFAULT_IMAGE_MODE
    tiling = first_tiling(config)
    section = dataclasses.replace(config.model, family=family_name(config))
    parts = assemble(section, config.seed, None if tiling is None else merging(tiling, mode))
    template = config.data.template or _DEFAULT_TEMPLATE
    vision = parts.model.config.vision_config
    processor = LlavaMoeProcessor(
        image_processor=image_processor(section, vision),
        tokenizer=parts.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=section.vision_feature_select_strategy,
        num_additional_image_tokens=parts.num_additional_image_tokens,
        template=template,
        template_options=config.data.template_options,
        image_mode=mode,
        tiling=tiling,
        num_frames=DEFAULT_NUM_FRAMES if config.data.num_frames is None else config.data.num_frames,
        # what stock tools render with; our own programs use the template by its name
        chat_template=TEMPLATES.get(template).jinja or parts.tokenizer.chat_template,
    )
    if processor.num_image_tokens != parts.model.config.image_seq_length:
        raise ValueError(
            f"model.vision_tower={section.vision_tower}: its image processor makes {processor.num_image_tokens} tokens "
            f"of a picture and the tower {parts.model.config.image_seq_length}; their image sizes differ; "
            "set model.image_size"
        )
    match_images(parts.model, processor)
    with whole_directory(out) as partial:
        parts.model.save_original_format = True
        parts.model.save_pretrained(partial)
        processor.save_pretrained(partial)
