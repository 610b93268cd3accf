"""Tiny checkpoints with knobs and runs that nothing has disturbed, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_moe.config import RunConfig
from llava_moe.training import runner
from tests.tiny import write_llava_json
from tests.tiny_model import write_tiny_checkpoint
from tests.training.controlled import BIASED, CAPPED, GATED
from tests.training.runs import make_trainer
from tests.training.undisturbed import run_of


@pytest.fixture(scope="session")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose routers have a selection bias; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("biased") / "checkpoint", BIASED)


@pytest.fixture(scope="session")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a capacity that always drops; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("capped") / "checkpoint", CAPPED)


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with ReLU gates; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("gated") / "checkpoint", GATED)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_llava_json(tmp_path_factory.mktemp("survival") / "data", 6)


@pytest.fixture(scope="session")
def whole(dense_checkpoint: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of five steps that nothing has disturbed; three steps are an epoch."""
    config = run_of(tmp_path_factory.mktemp("whole"), dense_checkpoint, data)
    torch.manual_seed(0)
    runner.train(config)
    return config


@pytest.fixture(scope="session")
def finished_checkpoint(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = run_of(tmp_path_factory.mktemp("finished"), dense_checkpoint, data)
    made = make_trainer(config)
    made.args.max_steps = 2
    made.run(None)
    return Path(config.output_dir) / "checkpoint-2"
