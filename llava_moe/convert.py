"""Mains of `llava-moe import` and `llava-moe export`: checkpoints of other programs in, and out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int
from transformers import (
    AutoImageProcessor,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from transformers.models.llava.processing_llava import LlavaProcessor

from llava_moe.data.image import IMAGE_MODES
from llava_moe.data.image_grid import parse_grid
from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.data.templates import TEMPLATES
from llava_moe.model.assemble import fingerprint, whole_directory
from llava_moe.model.formats import (
    LAYOUTS,
    ExportPlan,
    Imported,
    Options,
    check_export,
    export_weights,
    plan_export,
    plan_import,
)
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.streaming import MAX_SHARD_BYTES
from llava_moe.model.upcycling import count_parameters
from llava_moe.model_card import Origin, start_facts, versions, write_card

IMPORT_FACTS, EXPORT_FACTS = "import.json", "export.json"
# Image processors are ours in their PIL form, which is the default of older programs under the plain name.
_PIL = re.compile(r'("image_processor_type": "\w+?)Pil"')


def _shard_bytes(text: str) -> int:
    """Raises argparse.ArgumentTypeError where the text is no size."""
    try:
        return int(convert_file_size_to_int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB, 500MB or 2GiB") from None


def _add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, required=True, metavar="DIRECTORY", help="where the result goes")
    parser.add_argument(
        "--max-shard-size",
        type=_shard_bytes,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="a file of weights is at most this large (default: 5GB)",
    )
    parser.add_argument("--license", metavar="ID", help="for the model card, as on the hub, e.g. apache-2.0")


class Import:
    """Turns a checkpoint of another program into one of ours.

    The layout is found by looking at the files. Weights are read one tensor at a time, and pickled files are read
    without executing what is in them. Nothing appears at --to before it is complete.
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.epilog = (
            f"Layouts: {'; '.join(LAYOUTS.values())}. Example: llava-moe import llava-v1.5-7b --to models/llava "
            "--vision-tower clip-vit-large-patch14-336 --template v1"
        )
        parser.add_argument("checkpoint", type=Path, help="the directory to read")
        _add_writing_arguments(parser)
        parser.add_argument(
            "--base", type=Path, metavar="DIRECTORY", help="the language model that a projector or LoRA belongs to"
        )
        parser.add_argument(
            "--vision-tower", type=Path, metavar="DIRECTORY", help="in the place of config.json's mm_vision_tower"
        )
        parser.add_argument(
            "--template",
            choices=TEMPLATES.names(),
            help="the conversation it was trained with, which LLaVA's files do not say (LLaVA-1.5 and Vicuna: v1)",
        )
        parser.add_argument(
            "--image-mode", choices=IMAGE_MODES.names(), help="in the place of config.json's image_aspect_ratio"
        )

    @staticmethod
    def main(arguments: argparse.Namespace) -> None:
        facts = import_checkpoint(
            arguments.checkpoint,
            arguments.to,
            Options(arguments.base, arguments.vision_tower, arguments.image_mode),
            arguments.template,
            arguments.max_shard_size,
            arguments.license,
        )
        print(f"import: {arguments.checkpoint} ({LAYOUTS[facts['layout']]}) -> {arguments.to}")
        print(f"  template {facts['template']}, image mode {facts['image_mode']}, {facts['new_rows']} rows added")
        for origin in facts["left_out"][:4]:
            print(f"  left out: {origin}")
        if len(facts["left_out"]) > 4:
            print(f"  left out: {len(facts['left_out']) - 4} more, see {IMPORT_FACTS}")


class Export:
    """Turns a checkpoint of ours into one that transformers, vLLM and SGLang load without this project.

    A model without experts always has such a form if its projector is mlp2x_gelu; one with experts has it for top-k
    routers in a Llama, Mistral, Qwen2 or Qwen3 decoder. Where there is none, the reason is named. docs/serving.md says
    how to serve the result.
    """

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.epilog = "Example: llava-moe export runs/my_model/model --to exports/my_model"
        parser.add_argument("checkpoint", type=Path, help="a checkpoint directory of ours")
        _add_writing_arguments(parser)

    @staticmethod
    def main(arguments: argparse.Namespace) -> None:
        facts = export_checkpoint(arguments.checkpoint, arguments.to, arguments.max_shard_size, arguments.license)
        print(f"export: {arguments.checkpoint} -> {arguments.to} ({facts['class']} with a {facts['target']} decoder)")
        error = facts["max_abs_logit_error"]
        print(
            "  too large to be compared with its source here"
            if error is None
            else f"  largest logit difference to its source: {error:.2e} (float32)"
        )
        for note in facts["notes"]:
            print(f"  not the same: {note}")


def import_checkpoint(
    path: Path,
    out: Path,
    options: Options,
    template: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    license: str | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint with its processor and model card, and returns what was done, which is saved beside it.

    Raises:
        CheckpointError: the source cannot be imported; nothing is left then.
        ValueError: the template is missing, or does not fit the tokenizer.
    """
    _check_target(path, out, IMPORT_FACTS)
    plan = plan_import(path, dataclasses.replace(options, read_grids=partial(parse_grid, order="width_height")))
    processor = _imported_processor(path, plan, template)
    facts = {
        "source": str(path),
        "layout": plan.layout,
        "template": processor.template,
        "image_mode": processor.image_mode,
        "new_rows": plan.new_rows,
        "left_out": plan.placed.left_out,
        "versions": versions(),
    }
    origin = Origin(out.name, "llava-moe import", plan.parents, facts={"layout": LAYOUTS[plan.layout]})
    with whole_directory(out) as folder:
        plan.write(folder, max_shard_bytes)
        processor.save_pretrained(folder)
        (folder / IMPORT_FACTS).write_text(json.dumps(facts, indent=2))
        write_card(folder, origin, license)
    return facts


def _check_target(path: Path, out: Path, facts: str) -> None:
    """A directory is only replaced by the program that made it."""
    if not out.exists():
        return
    earlier = out.is_dir() and ((out / facts).is_file() or not any(out.iterdir()))
    if not earlier or out.resolve() == path.resolve():
        raise CheckpointError(f"--to {out}: holds something else than an earlier result; name another directory")


def _imported_processor(path: Path, plan: Imported, template: str | None) -> LlavaMoeProcessor:
    if plan.tokenizer is None:
        return load_processor(path, template=template, image_mode=plan.image_mode)
    if template is None:
        raise ValueError(
            f"{path}: its files do not say which conversation it was trained with; name it: --template "
            f"(LLaVA-1.5 and Vicuna: v1; known: {', '.join(TEMPLATES.names())})"
        )
    config = plan.config
    try:
        image_processor = AutoImageProcessor.from_pretrained(plan.tower_folder, backend="pil")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{plan.tower_folder}: no image processor: {str(error).splitlines()[0]}") from error
    processor = LlavaMoeProcessor(
        image_processor=image_processor,
        tokenizer=plan.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=plan.num_additional_image_tokens,
        template=template,
        image_mode=plan.image_mode or "square",
        tiling=plan.tiling,
        chat_template=TEMPLATES.get(template).jinja or plan.tokenizer.chat_template,
    )
    if processor.num_image_tokens != config.image_seq_length:
        raise CheckpointError(
            f"{plan.tower_folder}: its image processor makes {processor.num_image_tokens} tokens of a picture, and the "
            f"tower {config.image_seq_length}; their image sizes differ"
        )
    return processor


def export_checkpoint(
    path: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES, license: str | None = None
) -> dict[str, Any]:
    """Writes the stock checkpoint with a stock processor and a card; returns what was done, which is saved beside it.

    Raises:
        CheckpointError: there is no stock class for it, or the result computes something else; nothing is left then.
    """
    _check_target(path, out, EXPORT_FACTS)
    plan = plan_export(path)
    processor = _stock_processor(load_processor(path), plan)
    facts: dict[str, Any] = {"source": str(path), "source_fingerprint": fingerprint(path)}
    facts |= {"class": plan.config.model_type, "target": plan.target, "notes": plan.notes}
    with whole_directory(out) as folder:
        export_weights(plan, folder, max_shard_bytes)
        _save_processor(processor, folder)
        facts["max_abs_logit_error"] = check_export(plan, folder)
        facts["versions"] = versions()
        (folder / EXPORT_FACTS).write_text(json.dumps(facts, indent=2))
        compared = {"logit difference to its source": facts["max_abs_logit_error"], **start_facts(path)}
        parameters = count_parameters(plan.stored.model)
        origin = Origin(out.name, "llava-moe export", [str(path)], facts=compared, parameters=parameters)
        write_card(folder, origin, license)
    return facts


def _stock_processor(processor: LlavaMoeProcessor, plan: ExportPlan) -> Any:
    """The parts that the stock one has: template and image mode become its chat template and its padding or tiles.

    Raises:
        CheckpointError: it cannot do what ours does.
    """
    template = TEMPLATES.get(processor.template).jinja or processor.tokenizer.chat_template
    makers = {"llava": _whole_processor, "llava_next": _next_processor, "llava_onevision": _onevision_processor}
    return makers[plan.config.model_type](processor, plan, template)


def _save_processor(stock: Any, folder: Path) -> None:
    stock.save_pretrained(folder)
    stock.image_processor.save_pretrained(folder)  # preprocessor_config.json, for programs that look for it
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        file.write_text(_PIL.sub(r'\1"', file.read_text(encoding="utf-8")), encoding="utf-8")


def _whole_processor(processor: LlavaMoeProcessor, plan: ExportPlan, template: str | None) -> Any:
    inner = processor.image_processor
    if processor.image_mode not in ("square", "pad"):
        raise CheckpointError(
            f"{plan.stored.path}: its image mode is {processor.image_mode!r}; transformers' LLaVA takes one, whole or "
            "padded"
        )
    if processor.image_mode == "pad":
        inner = LlavaImageProcessorPil(do_pad=True, **_picture_options(inner))
    return LlavaProcessor(
        image_processor=inner,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=template,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )


def _onevision_processor(processor: LlavaMoeProcessor, plan: ExportPlan, template: str | None) -> Any:
    mode = str(plan.config.vision_aspect_ratio)
    options = _tile_options(processor, plan, mode)
    if options["several_images"] != "pad":
        plan.notes.append("several pictures in one sample: the stock processor shows each of them as one tile")
    size = {"height": processor.image_shape[1], "width": processor.image_shape[2]}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            image_grid_pinpoints=options["grids"], **_picture_options(processor.image_processor)
        ),
        tokenizer=processor.tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=processor.num_image_tokens,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=template,
        image_token=processor.image_token,
        vision_aspect_ratio=mode,
    )


def _next_processor(processor: LlavaMoeProcessor, plan: ExportPlan, template: str | None) -> Any:
    options = _tile_options(processor, plan, "anyres")
    if options["several_images"] == "pad":
        plan.notes.append("several pictures in one sample: the stock processor cuts each of them into tiles")
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            image_grid_pinpoints=options["grids"], **_picture_options(processor.image_processor)
        ),
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=template,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )


def _tile_options(processor: LlavaMoeProcessor, plan: ExportPlan, image_mode: str) -> dict[str, Any]:
    """Grids in pixels, and how several images of a sample are shown."""
    if processor.image_mode != image_mode or processor.planner is None:
        raise CheckpointError(
            f"{plan.stored.path}: its image mode is {processor.image_mode!r}, and the stock processor of its class has "
            f"{image_mode} alone"
        )
    tiling = processor.planner.tiling
    grids = [list(pair) for pair in tiling.resolutions]
    if grids != [list(pair) for pair in plan.config.image_grid_pinpoints]:
        raise CheckpointError(
            f"{plan.stored.path}: config.json and processor_config.json name different grids of tiles; which are right?"
        )
    return {"grids": grids, "several_images": tiling.several_images}


def _picture_options(inner: Any) -> dict[str, Any]:
    """What the processors of single pictures and of tiles have in common."""
    keys = ["do_resize", "size", "resample", "crop_size", "do_rescale", "rescale_factor", "do_normalize"]
    keys += ["image_mean", "image_std", "do_convert_rgb"]
    values = {key: getattr(inner, key) for key in keys if getattr(inner, key, None) is not None}
    return {**values, "do_center_crop": bool(inner.do_center_crop)}
