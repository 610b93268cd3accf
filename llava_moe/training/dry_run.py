"""What a recipe would do, without data, weights or GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModel
from transformers import logging as transformers_logging

from llava_moe.config import RunConfig
from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.layout import empty_model
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.model.upcycling import count_parameters
from llava_moe.model.upcycling_plan import build_upcycler, sparse_config
from llava_moe.training.arguments import check_deepspeed_file, training_arguments
from llava_moe.training.controllers import Controllers, check_options, moe_layers
from llava_moe.training.objective import Balance
from llava_moe.training.stage import apply_stage, count_trainable


def describe(source: str, config: RunConfig) -> str:
    """The resolved recipe and, where the configs of its parts are at hand, the parameter counts.

    Raises:
        RecipeError, RegistryError, ValueError: the recipe would be refused.
    """
    check_deepspeed_file(config)
    # DeepSpeed would ask for a launcher; everything else about the arguments is checked as in a real run.
    arguments = training_arguments(dataclasses.replace(config, deepspeed=None))
    Balance.build(config.balance)
    check_options(config.balance)
    for name, part in () if config.upcycle is None else config.upcycle.parts().items():
        build_upcycler(part, name)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    lines = [
        f"# {source} (dry run)",
        yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip(),
        f"# samples per step and device: {batch}",
        f"# {_parameters(config)}",
    ]
    return "\n".join(lines)


def _parameters(config: RunConfig) -> str:
    transformers_logging.set_verbosity_error()
    try:
        shape = _shape(config)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return f"parameters: unknown here, a config of the parts is not on this machine ({reason[:160]})"
    with torch.device("meta"):
        model = LlavaMoeForConditionalGeneration(shape)
    apply_stage(model, config.stage)
    balance, layers = Balance.build(config.balance), moe_layers(model)
    balance.check(layers)
    Controllers.build(config.balance, layers, balance.losses)
    counts = count_parameters(model)
    return (
        f"parameters: {counts['total']:,} total, {counts['active']:,} active per token, "
        f"{count_trainable(model):,} trainable in stage {config.stage.name}"
    )


def _shape(config: RunConfig) -> LlavaMoeConfig:
    """The config of the model that the run would train."""
    if config.upcycle is not None:
        return sparse_config(config.upcycle, empty_model(_read(config.upcycle.parent)))
    if config.model.checkpoint is not None:
        return _read(config.model.checkpoint)
    return _assembled_shape(config)


def _read(checkpoint: str) -> LlavaMoeConfig:
    """The config of a checkpoint of ours or of a stock one."""
    found: Any = AutoConfig.from_pretrained(checkpoint)
    return LlavaMoeConfig.from_dict({k: v for k, v in found.to_dict().items() if k != "model_type"})


def _assembled_shape(config: RunConfig) -> LlavaMoeConfig:
    section = config.model
    tower = str(section.vision_tower)
    if tower.startswith("timm:"):
        from llava_moe.model.vision import timm_tower_config

        vision: Any = timm_tower_config(tower.removeprefix("timm:"), section.image_size or 224)
    else:
        found: Any = AutoConfig.from_pretrained(tower)
        vision = getattr(found, "vision_config", found)
    text = AutoConfig.from_pretrained(str(section.language_model))
    if type(vision) not in AutoModel._model_mapping:  # type: ignore[attr-defined]
        raise ValueError(f"model.vision_tower={tower}: transformers has no tower for {vision.model_type}")
    return LlavaMoeConfig(
        vision_config=vision,
        text_config=text,
        projector=section.projector,
        vision_feature_layer=section.vision_feature_layer,
        vision_feature_select_strategy=section.vision_feature_select_strategy,
    )
