"""Small runs that a test disturbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llava_moe.config import RunConfig
from llava_moe.training import runner
from llava_moe.training.metrics import read_metrics
from tests.training.runs import make_config, stopping_trainer

PROJECTOR: dict[str, Any] = {"stage": {"learning_rates": {"projector": 1e-2, "decoder": 1e-2}}}


def run_of(folder: Path, checkpoint: Path, data: tuple[Path, Path], **train: Any) -> RunConfig:
    defaults = {"max_steps": 5, "save_steps": 2, "train_sampling_strategy": "sequential"}
    return make_config(folder, checkpoint, data, **PROJECTOR, train={**defaults, **train})


@contextmanager
def at_end_of(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Within it every run does something when that step ends, before it is logged or saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LlavaMoeTrainer", stopping_trainer(step, act))
        yield


def rows(config: RunConfig) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "cross_entropy", "grad_norm", "learning_rate")
    return [tuple(str(row.get(key)) for key in keys) for row in read_metrics(config.output_dir)]
