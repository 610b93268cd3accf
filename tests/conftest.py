"""Fixtures for all tests: determinism, and tiny checkpoints that are written once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would ask a hub fails at once, and not after its retries

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from tests.tiny_model import TINY_MOE, write_tiny_checkpoint


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on which one ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama + SigLIP checkpoint with its processor; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("dense") / "checkpoint")


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse one with random, unequal experts in layers 0 and 2; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("moe") / "checkpoint", TINY_MOE)


@pytest.fixture(scope="session")
def timm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint with a small CNN of timm as its tower; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("timm") / "checkpoint", vision="timm")
