"""Where a run starts: a named checkpoint, or a first one put together from tower and decoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, CLIPImageProcessorPil

from llava_moe.config import ModelSection, RunConfig
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.templates import TEMPLATES
from llava_moe.model.assemble import assemble, check_checkpoint, whole_directory
from llava_moe.training import distributed

_FACTS = "assemble.json"
_DEFAULT_TEMPLATE, _DEFAULT_IMAGE_MODE = "plain", "square"
_TIMM = "timm:"


def start_point(config: RunConfig) -> Path:
    """The checkpoint directory to load; rank 0 assembles it when the recipe names none.

    Raises:
        CheckpointError: the named directory is no checkpoint.
        ValueError: a part to assemble is wrong.
    """
    if config.model.checkpoint is not None:
        return check_checkpoint(config.model.checkpoint)
    initial = Path(config.output_dir) / "initial"
    if distributed.rank() == 0:
        facts = {"model": dataclasses.asdict(config.model), "seed": config.seed, "data": _data_facts(config)}
        known = initial / _FACTS
        if not (known.is_file() and json.loads(known.read_text()) == facts):
            with distributed.unpartitioned():
                write_initial(config, initial)
            known.write_text(json.dumps(facts, indent=2))
    distributed.barrier()
    return check_checkpoint(initial)


def _data_facts(config: RunConfig) -> dict[str, Any]:
    data = config.data
    return {"template": data.template, "template_options": data.template_options, "image_mode": data.image_mode}


def write_initial(config: RunConfig, out: Path) -> None:
    """Assembles model and processor and writes them to `out`."""
    section = config.model
    parts = assemble(section, config.seed)
    template = config.data.template or _DEFAULT_TEMPLATE
    vision = parts.model.config.vision_config
    processor = LlavaMoeProcessor(
        image_processor=_image_processor(section, vision),
        tokenizer=parts.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=section.vision_feature_select_strategy,
        num_additional_image_tokens=parts.num_additional_image_tokens,
        template=template,
        template_options=config.data.template_options,
        image_mode=config.data.image_mode or _DEFAULT_IMAGE_MODE,
        # what stock tools render with; our own programs use the template by its name
        chat_template=TEMPLATES.get(template).jinja or parts.tokenizer.chat_template,
    )
    if processor.num_image_tokens != parts.model.config.image_seq_length:
        raise ValueError(
            f"model.vision_tower={section.vision_tower}: its image processor makes {processor.num_image_tokens} tokens "
            f"of a picture and the tower {parts.model.config.image_seq_length}; their image sizes differ"
        )
    with whole_directory(out) as partial:
        parts.model.save_original_format = True
        parts.model.save_pretrained(partial)
        processor.save_pretrained(partial)


def _image_processor(section: ModelSection, vision: Any) -> Any:
    source = str(section.vision_tower)
    if not source.startswith(_TIMM):
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    import timm

    defaults = timm.get_pretrained_cfg(source.removeprefix(_TIMM))
    size = {"height": vision.image_size, "width": vision.image_size}
    return CLIPImageProcessorPil(
        do_resize=True,
        size=size,
        do_center_crop=False,
        crop_size=size,
        image_mean=list(defaults.mean),
        image_std=list(defaults.std),
    )
