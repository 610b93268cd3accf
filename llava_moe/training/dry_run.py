"""What a recipe would do, without data, weights or GPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments
from transformers import logging as transformers_logging

from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.data.image_grid import parse_grid
from llava_moe.data.processor_parts import default_tiling
from llava_moe.data.visuals import is_tiled
from llava_moe.model.loss import CHUNKED, LIGER
from llava_moe.model.upcycling_plan import build_upcycler
from llava_moe.planning import Counts, Library, Memory, Setup, count, estimate, flops, model_on_meta, read_header
from llava_moe.planning.counts import Work
from llava_moe.planning.lora import AdapterPlan
from llava_moe.planning.memory import logits, zero_setup
from llava_moe.planning.shapes import ConfigNotFoundError, shape_of
from llava_moe.training import expert_parallel, lora
from llava_moe.training.alarms import check_telemetry
from llava_moe.training.arguments import check_deepspeed_file, training_arguments
from llava_moe.training.chain import check_image_mode, check_recipe
from llava_moe.training.controllers import Controllers, check_options, moe_layers
from llava_moe.training.images import DEFAULT_IMAGE_MODE, family_name, first_tiling, merging
from llava_moe.training.objective import Balance
from llava_moe.training.packing_plan import pictures, step_lines
from llava_moe.training.places import dry_lines
from llava_moe.training.scoring import check_scoring
from llava_moe.training.speed import check_names
from llava_moe.training.stage import part_of

_SAME = ("seed", "data", "train", "deepspeed")  # what a recipe and its dense control must agree on
_GIB = 2**30


@dataclass(frozen=True)
class Outlook:
    """What a run would be like.

    Attributes:
        devices: ranks that the numbers are for.
        samples: of one optimiser step on all devices.
        setup: how a device is used.
        counts, work, memory: None where a config of the parts is not on this machine.
        fused_logits: bytes of the logits with a fused loss.
        reason: why they are not there.
        model: tower, projector and tokens of a picture, in words.
    """

    devices: int
    samples: int
    setup: Setup
    counts: Counts | None = None
    work: Work | None = None
    memory: Memory | None = None
    fused_logits: int = 0
    reason: str = ""
    model: str = ""


def describe(source: str, config: RunConfig) -> str:
    """The resolved recipe, what it would train and take, and beside it its dense control.

    Raises:
        RecipeError, RegistryError, ValueError: the recipe would be refused.
    """
    found = outlook(source, config)
    stage = config.stage.name
    lines = [
        f"# {source} (dry run)",
        yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip(),
        f"# devices: {found.devices} (as the recipe's header says; NPROC=n asks for another number)",
        *dry_lines(config),
        *step_lines(config, found.samples, found.devices),
        *_model_lines(found, stage, config.data.packing),
        *_control_lines(source, config, found),
    ]
    return "\n".join(lines)


def outlook(source: str, config: RunConfig) -> Outlook:
    """Checks a recipe as far as that is possible without data and weights, and counts.

    Raises:
        RecipeError, RegistryError, ValueError: the recipe would be refused.
    """
    check_deepspeed_file(config)
    check_recipe(config)
    check_scoring(config)
    check_names(config)
    # DeepSpeed would ask for a launcher; everything else about the arguments is checked as in a real run.
    arguments = training_arguments(dataclasses.replace(config, deepspeed=None))
    Balance.build(config.balance)
    check_options(config.balance)
    check_telemetry(config.telemetry)
    for name, part in () if config.upcycle is None else config.upcycle.parts().items():
        build_upcycler(part, name)
    devices = _devices(source)
    expert_parallel.check_recipe(config, devices)
    setup = _setup(config, arguments, devices)
    samples = setup.micro_batch * arguments.gradient_accumulation_steps * devices
    transformers_logging.set_verbosity_error()
    try:
        shape = shape_of(config, Library(source), _first)
    except ConfigNotFoundError as error:
        return Outlook(devices, samples, setup, reason=str(error)[:160])
    check_image_mode(config, shape)
    model = model_on_meta(shape)
    plan = lora.plan_adapters(model, config)
    balance, layers = Balance.build(config.balance), moe_layers(model)
    balance.check(layers)
    if config.expert_parallel is not None:
        expert_parallel.spread_layers(model, config.expert_parallel)
    Controllers.build(config.balance, layers, balance.losses)
    setup = dataclasses.replace(
        setup,
        image_tokens=int(shape.image_seq_length),
        images=pictures(config, _tiles(config, int(shape.vision_config.image_size)), int(shape.image_seq_length)),
    )
    return Outlook(
        devices,
        samples,
        setup,
        **_numbers(model, setup, plan),
        fused_logits=logits(model, dataclasses.replace(setup, fused_loss=True)),
        model=f"tower {shape.vision_config.model_type} ({shape.vision_config.image_size} px), projector "
        f"{shape.projector}, {shape.image_seq_length} tokens for a picture, decoder {shape.text_config.model_type}",
    )


def _numbers(model: Any, setup: Setup, adapters: AdapterPlan | None) -> dict[str, Any]:
    """Counts, work and memory of a model that is frozen as the stage says."""
    counts, work, memory = count(model, part_of), flops(model, setup.sequence_length), estimate(model, setup)
    if adapters is not None:
        counts, work, memory = adapters.counts(counts), adapters.work(work), adapters.memory(memory, model, setup)
    return {"counts": counts, "work": work, "memory": memory}


def _first(config: RunConfig) -> tuple[str, Mapping[str, Any]]:
    """Family and config values of a first model, as `training/start.py` would have them."""
    tiling = first_tiling(config)
    mode = config.data.image_mode or DEFAULT_IMAGE_MODE
    return family_name(config), {} if tiling is None else merging(tiling, mode)


def _tiles(config: RunConfig, side: int) -> int:
    """How many pictures of a tower's size an image becomes, at the most."""
    mode = config.data.image_mode or DEFAULT_IMAGE_MODE
    if not is_tiled(mode):
        return 1
    grid = parse_grid(default_tiling(family_name(config), config.data.tiling)["grids"], side)
    return 1 + max(height * width for height, width in grid) // side**2


def _devices(source: str) -> int:
    """NPROC, or what the recipe's header says."""
    asked = os.environ.get("NPROC")
    if asked is None:
        return read_header(source).devices if Path(source).is_file() else 1
    if not asked.isdecimal() or int(asked) < 1:
        raise RecipeError(f"NPROC={asked}: must be a number of devices")
    return int(asked)


def _setup(config: RunConfig, arguments: TrainingArguments, devices: int) -> Setup:
    checkpointing = arguments.gradient_checkpointing or bool(getattr(arguments, "activation_checkpointing", False))
    return Setup(
        devices=devices,
        micro_batch=arguments.per_device_train_batch_size,
        sequence_length=config.data.max_length,
        checkpointing=bool(checkpointing),
        expert_parallel=config.expert_parallel or 1,
        fused_loss=config.speed.fused_loss in (LIGER, CHUNKED),
        **zero_setup(config.deepspeed, bool(arguments.bf16), config.model.dtype),
    )


def _model_lines(found: Outlook, stage: str, packed: bool) -> list[str]:
    if found.counts is None or found.work is None or found.memory is None:
        return [f"# parameters: unknown here, a config of the parts is not on this machine ({found.reason})"]
    counts, memory, setup = found.counts, found.memory, found.setup
    full = "a full row" if packed else "a sample of full length"
    forward = found.work.sequence(setup.sequence_length, setup.labels // setup.micro_batch, setup.images)
    lines = [
        f"# model: {found.model}",
        f"# parameters: {counts.total:,} total, {counts.active:,} active per token, "
        f"{counts.trainable:,} trainable in stage {stage}",
        *(
            f"#   {name}: {part.total:,} total, {part.active:,} active, {part.trainable:,} trainable"
            for name, part in counts.parts.items()
        ),
        f"# forward: {found.work.decoder + found.work.attention:.3g} FLOPs for a token in the decoder, "
        f"{found.work.image:.3g} for a picture, {forward:.3g} for {full}",
        f"# memory per device: about {memory.total / _GIB:.1f} GiB with {full} everywhere ("
        + ", ".join(f"{kind} {number / _GIB:.2f}" for kind, number in memory.kinds().items())
        + (f"; host {memory.host / _GIB:.2f}" if memory.host else "")
        + "); an estimate without the device's context, fragmentation and communication buffers",
        *(
            []
            if setup.fused_loss
            else [f"# logits would take {found.fused_logits / _GIB:.2f} GiB with speed.fused_loss (liger, chunked)"]
        ),
    ]
    return lines


@lru_cache(maxsize=4)  # several recipes may share one
def _control(path: str, devices: int) -> tuple[RunConfig, Outlook]:
    config = load_recipe(path)
    return config, outlook(path, config)


def _control_lines(source: str, config: RunConfig, found: Outlook) -> list[str]:
    """The pair: a recipe with experts, and the dense control that its header names.

    Raises:
        RecipeError, RegistryError, ValueError: the control would be refused.
    """
    if config.upcycle is None or not Path(source).is_file():
        return []
    named = read_header(source).control or "control.yaml"
    path = next((p for p in (Path(named), Path(source).parent / Path(named).name) if p.is_file()), None)
    if path is None:
        return [f"# control: no file {named}; without a dense control a gain cannot be told from further training"]
    # Overrides of the run are not applied to the control: what was changed shows as a difference.
    control, beside = _control(str(path), found.devices)
    differing = [key for key in _SAME if getattr(control, key) != getattr(config, key)]
    lines = [f"# control: {path}"]
    rows: list[tuple[str, ...]] = [
        ("", "this", "control"),
        (f"{'rows' if config.data.packing else 'samples'} per step", f"{found.samples:,}", f"{beside.samples:,}"),
    ]
    for name in ("total", "active", "trainable"):
        rows.append((name, *(f"{getattr(o.counts, name):,}" if o.counts else "unknown" for o in (found, beside))))
    rows.append(
        ("GiB per device", *(f"{o.memory.total / _GIB:.1f}" if o.memory else "unknown" for o in (found, beside)))
    )
    lines += [f"#   {name:<16}  {one:>16}  {other:>16}" for name, one, other in rows]
    same = f"#   the same: {', '.join(key for key in _SAME if key not in differing)}"
    return [*lines, same + (f"; DIFFERENT: {', '.join(differing)}" if differing else "")]
