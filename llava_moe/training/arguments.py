"""From a recipe's `train` section to transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llava_moe.config import RecipeError, RunConfig
from llava_moe.registry import near_misses
from llava_moe.training.loggers import PROJECT, report_to
from llava_moe.training.stage import resolve_bf16
from llava_moe.training.workers import default_workers

# Set by other keys of the recipe, or fixed because another value would be wrong.
_OWNED = {
    "output_dir": "output_dir",
    "seed": "seed",
    "deepspeed": "deepspeed",
    "learning_rate": "stage.learning_rates",
    "weight_decay": "stage.weight_decay",
    "remove_unused_columns": None,
    "average_tokens_across_devices": None,
    "label_smoothing_factor": None,  # our loss would ignore it without a word
}
_STRATEGIES = ("random", "sequential", "group_by_length")
_CHECKPOINTING = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps")


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Checks the section and builds the arguments.

    Raises:
        RecipeError: a key is no field of TrainingArguments, belongs elsewhere in the recipe, or has a refused value.
    """
    fields = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    values = _checkpointing_as_installed(dict(config.train), fields)
    for key in values:
        if key in _OWNED:
            place = _OWNED[key]
            raise RecipeError(f"train.{key} cannot be set; " + (f"set {place}" if place else "the trainer fixes it"))
        if key not in fields:
            raise RecipeError(f"train.{key} is no field of TrainingArguments; {near_misses(key, sorted(fields))}")
        _check_value(key, values[key], fields[key])
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (values.get(key) or {}).get("use_reentrant"):
            raise RecipeError(f"train.{key}.use_reentrant=true loses the balance loss's gradient")
    check_deepspeed_file(config)
    values["bf16"] = resolve_bf16(values.get("bf16", False))
    # Without use_cpu two CPU ranks would train two models that never meet, and exit with success.
    use_cpu = values.pop("use_cpu", not torch.cuda.is_available())
    values["report_to"] = report_to(values.get("report_to"))
    named = {"run_name": Path(config.output_dir).name, "project": PROJECT}  # for wandb, trackio, ...
    defaults: dict[str, Any] = {"logging_steps": 10, "lr_scheduler_type": "cosine"}
    defaults |= {key: value for key, value in named.items() if key in fields}
    # The filter would write the mean of earlier losses in the place of a NaN; health.py stops the run instead.
    defaults["logging_nan_inf_filter"] = False
    defaults["dataloader_num_workers"] = default_workers(config, use_cpu)
    try:
        return TrainingArguments(
            output_dir=config.output_dir,
            seed=config.seed,
            deepspeed=config.deepspeed,
            use_cpu=use_cpu,
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            learning_rate=max(config.stage.learning_rates.values(), default=0.0),
            **{**defaults, **values},
        )
    except (TypeError, ValueError) as error:  # what transformers says of a value that it refuses
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error


def _checkpointing_as_installed(values: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """`gradient_checkpointing` and its newer name `activation_checkpointing` (transformers 5.23) mean the same.

    Raises:
        RecipeError: both are given.
    """
    for old, new in _CHECKPOINTING.items():
        if old in values and new in values:
            raise RecipeError(f"train.{old} and train.{new} are the same; give one of them")
        given, known = (old, new) if new in fields else (new, old)
        if given in values:
            values[known] = values.pop(given)
    return values


def check_deepspeed_file(config: RunConfig) -> None:
    """Raises RecipeError when the recipe names a DeepSpeed JSON that is not there."""
    if config.deepspeed is not None and not Path(config.deepspeed).is_file():
        raise RecipeError(f"deepspeed: {config.deepspeed}: no such file")


def _check_value(key: str, value: Any, default: Any) -> None:
    """TrainingArguments itself takes "abc" for a number and fails, or goes on, much later."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, int | float) and not isinstance(default, bool) and not number:
        raise RecipeError(f"train.{key}={value!r} must be a number")
    if key in _AT_LEAST_ONE and (not isinstance(value, int) or value < 1):
        raise RecipeError(f"train.{key}={value!r} must be a whole number of at least 1")
    if key == "train_sampling_strategy" and value not in _STRATEGIES:
        raise RecipeError(f"train.{key}={value!r} must be one of {', '.join(_STRATEGIES)}")
