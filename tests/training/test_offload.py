"""Optimiser and weights in the host's memory: the same steps, and a clear word where the compiler is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_moe.config import RecipeError
from llava_moe.training import offload, runner
from llava_moe.training.metrics import read_metrics
from llava_moe.training.offload import check_offload
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, deepspeed, make_config, start_ranks, write_recipe

FILES = ["scripts/deepspeed/zero2_offload.json", "scripts/deepspeed/zero3_offload.json"]


def without_compiled_adam(file: str, folder: Path) -> str:
    """The same with torch's AdamW: DeepSpeed's own is compiled for a minute at its first use."""
    raw = json.loads(Path(file).read_text())
    path = folder / Path(file).name
    path.write_text(json.dumps({**raw, "zero_force_ds_cpu_optimizer": False}))
    return str(path)


@pytest.mark.slow
def test_offloaded_steps_are_those_of_one_process(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Weights and optimiser under ZeRO-3, with rates and decays of their own for each part."""
    data = write_llava_json(tmp_path / "data", 6)
    sections: dict[str, Any] = {
        "stage": {"learning_rates": MOE_PARTS, "weight_decay": {"decoder": 0.3, "experts": 0.1}},
        "balance": {"losses": {"switch": 0.1}},
        "train": {"max_steps": 3, "train_sampling_strategy": "sequential"},
    }
    single = make_config(tmp_path / "single", moe_checkpoint, data, **sections)
    runner.train(single)
    file = without_compiled_adam(FILES[1], tmp_path)
    recipe = write_recipe(tmp_path / "offload", moe_checkpoint, data, **sections, deepspeed=file)
    done = start_ranks(deepspeed(1), ["llava_moe.train", str(recipe)])
    assert done.returncode == 0, done.stdout[-4000:]
    rows, expected = read_metrics(tmp_path / "offload" / "out"), read_metrics(single.output_dir)
    assert len(rows) == len(expected) == 3
    for row, reference in zip(rows, expected, strict=True):
        for name in ("loss", "grad_norm", "cross_entropy", "switch"):
            assert row[name] == pytest.approx(reference[name], rel=1e-4), (row["step"], name)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_compiler_is_said_before_compute(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_is_built", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/ninja" if name == "ninja" else None)
    with pytest.raises(RecipeError, match=r"c\+\+ is missing \(apt install g\+\+; pip install ninja\); or add"):
        check_offload(file)
    check_offload(without_compiled_adam(file, tmp_path))
    check_offload("scripts/deepspeed/zero3.json")
    check_offload(None)
    monkeypatch.setattr(offload, "_is_built", lambda: True)
    check_offload(file)
    monkeypatch.setattr(offload, "_is_built", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check_offload(file)


@pytest.mark.parametrize("file", FILES)
def test_the_files_differ_from_their_kin_in_offloading_alone(file: str) -> None:
    near, far = (json.loads(Path(name).read_text()) for name in (file.replace("_offload", ""), file))
    found = {key: far["zero_optimization"].pop(key)["device"] for key in list(far["zero_optimization"]) if "off" in key}
    assert far == near
    assert found == {"offload_optimizer": "cpu"} | ({"offload_param": "cpu"} if "zero3" in file else {})
