"""Tiny runs with controllers: models that have their knobs, and the balance sections that move them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_moe.config import RunConfig
from llava_moe.model.assemble import load_model
from tests.tiny_model import tiny_moe
from tests.training.runs import MOE_PARTS

BIASED = tiny_moe(router={"name": "deepseek_v3", "args": {"k": 2}})
CAPPED = tiny_moe(router={"name": "top_k", "args": {"k": 2}}, capacity={"factor": 0.7})
GATED = tiny_moe(router={"name": "remoe", "args": {}})
SECTIONS: dict[str, Any] = {"stage": {"learning_rates": MOE_PARTS}}
# One for each of these models; the keys are the fixtures of conftest.py.
EVERYTHING: dict[str, Any] = {
    "biased": {"losses": {"global_batch": 0.1}, "controllers": {"loss_free_bias": {"rate": 0.1}}},
    "capped": {
        "losses": {"switch": 1.0},
        "controllers": {"skywork_alpha": {"decay": 0.5}, "capacity": {"largest": 1.5, "smallest": 0.5}},
    },
    "gated": {"losses": {"relu_l1": 1.0}, "controllers": {"remoe_lambda": {"initial": 0.01}}},
}


def buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """The knobs of all MoE layers by their full name."""
    names = {f"{path}.{name}" for path, m in model.named_modules() for name in getattr(m, "float32_buffers", ())}
    return {name: value for name, value in model.state_dict().items() if name in names}


def final_buffers(config: RunConfig) -> dict[str, Tensor]:
    """The knobs of the model that a run left behind."""
    return buffers(load_model(Path(config.output_dir) / "model"))
