"""Small matrices for tests: recipes of a tiny model, its questions, and the file that compares methods on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import yaml  # isort: skip

from llava_moe.compare.matrix import Matrix  # isort: skip
from tests.evaluation.fakes import write_records  # isort: skip
from tests.tiny import write_llava_json  # isort: skip
from tests.tiny_model import write_tiny_checkpoint  # isort: skip

ALL_PARTS = {"projector": 1e-2, "decoder": 1e-2}
STEPS = 4
UPCYCLE: dict[str, Any] = {
    "parent": "unused",
    "decoder": {
        "layers": "all",
        "num_experts": 4,
        "router": {"name": "top_k", "args": {"k": 2, "convention": "softmax_topk_renorm"}},
    },
}
METHODS: dict[str, Any] = {
    "top_k": {},
    "sigmoid": {
        "about": "DeepSeek-V3's router",
        "upcycle": {"decoder": {"router": {"name": "deepseek_v3", "args": {"k": 2}}}},
        "balance": {"losses": {}, "controllers": {"loss_free_bias": {"rate": 0.01}}},
    },
}


def write_matrix(folder: Path, /, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Recipes and matrix that name files of `folder` which need not be there; `base` changes the MoE recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe: dict[str, Any] = {
        "output_dir": str(folder / "unused"),
        "stage": {"name": "control", "learning_rates": ALL_PARTS},
        "model": {"checkpoint": str(folder / "parent")},
        "data": {"sources": [{"path": str(folder / "data.json"), "image_folder": str(folder)}], "max_length": 128},
        "train": {"per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1, "save_steps": 2}
        | {"report_to": "none", "disable_tqdm": True, "use_cpu": True},
    }
    moe = copy.deepcopy(recipe) | {"upcycle": copy.deepcopy(UPCYCLE), "balance": {"losses": {"switch": 0.01}}}
    moe["stage"] = {"name": "moe", "learning_rates": {**ALL_PARTS, "experts": 1e-2, "router": 1e-2}}
    for key, value in (base or {}).items():
        moe[key] = {**moe.get(key, {}), **value} if isinstance(value, dict) else value
    raw: dict[str, Any] = {
        "recipe": "moe.yaml",
        "control": "control.yaml",
        "output_dir": str(folder / "out"),
        "parent": {"checkpoint": str(folder / "parent")},
        "seeds": [1, 2],
        "methods": METHODS,
        "scoring": {"data": str(folder / "records"), "tasks": ["local_gqa"], "batch_size": 4},
        **changes,
    }
    for name, content in (("control", recipe), ("moe", moe), ("matrix", raw)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "matrix.yaml"


def write_parts(folder: Path) -> None:
    """The parent, the data and the questions that the files of `write_matrix` name."""
    write_tiny_checkpoint(folder / "parent")
    data, images = write_llava_json(folder / "made", 8)
    text = data.read_text()
    (folder / "data.json").write_text(text)
    for picture in images.iterdir():
        (folder / picture.name).write_bytes(picture.read_bytes())
    write_records(folder / "records")


def make_matrix(folder: Path, /, base: dict[str, Any] | None = None, **changes: Any) -> Matrix:
    """The matrix of `write_matrix`, read."""
    return Matrix(write_matrix(folder, base, **changes))
