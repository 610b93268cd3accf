"""A tiny sparse model whose answers depend on every word and picture; plain random ones repeat one token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_moe.serve.engine import Engine
from tests.tiny_model import TINY_MOE, tiny_model, write_tiny_checkpoint


@pytest.fixture(scope="session")
def lively_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only, as the other checkpoints."""
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("lively") / "checkpoint", TINY_MOE)
    model = tiny_model(TINY_MOE)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    model.save_pretrained(path, save_original_format=True)
    return path


@pytest.fixture(scope="session")
def engine(lively_checkpoint: Path) -> Engine:
    return Engine.load(lively_checkpoint, device="cpu")
