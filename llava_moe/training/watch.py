"""Hangs what shows a run onto its Trainer: metrics, alarms, progress, loggers."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from llava_moe.config import RunConfig
from llava_moe.training import loggers
from llava_moe.training.alarms import AlarmCallback
from llava_moe.training.metrics import MetricsCallback
from llava_moe.training.progress import ProgressCallback
from llava_moe.training.throughput import WaitWarning


def watch(trainer: Any, config: RunConfig) -> None:
    """Sets `trainer.metrics`, shows progress in the place of transformers' own bar, and readies the loggers."""
    tower = trainer.model.get_submodule("model.vision_tower")
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    tiled = (config.data.image_mode or "").startswith("anyres") or config.data.tiling is not None
    warning = WaitWarning(
        trainer.args.dataloader_num_workers, may_cache=frozen and not tiled and config.data.feature_cache is None
    )
    trainer.metrics = MetricsCallback(trainer, config.output_dir, warning)
    trainer.metrics.watchers.append(trainer.alarms.watch)
    # Before the loggers, which are given the logs that it has added to.
    trainer.callback_handler.callbacks.insert(0, trainer.metrics)
    for stock in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.pop_callback(stock)
    loggers.install(trainer)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressCallback(trainer.metrics))
    trainer.add_callback(AlarmCallback(trainer.alarms))
