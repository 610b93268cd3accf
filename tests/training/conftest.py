"""Tiny checkpoints with knobs, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_checkpoint
from tests.training.controlled import BIASED, CAPPED, GATED


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
