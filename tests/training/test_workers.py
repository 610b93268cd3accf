"""How many processes read the data, and that the losses do not depend on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import RunConfig
from llava_moe.training import runner, workers
from llava_moe.training.arguments import training_arguments
from llava_moe.training.workers import default_workers, ranks_here
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_moe, write_tiny_checkpoint
from tests.training.runs import MOE_PARTS, losses, make_config


@pytest.mark.parametrize(
    ("cores", "ranks", "wanted"), [(16, "1", 8), (96, "8", 8), (32, "8", 4), (4, "8", 1), (12, "5", 2)]
)
def test_a_rank_on_a_gpu_has_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str, wanted: int
) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    config = RunConfig(output_dir="x")
    assert default_workers(config, use_cpu=False) == wanted
    assert default_workers(config, use_cpu=True) == 0
    config.data.feature_cache = "features"
    assert default_workers(config, use_cpu=False) == 0


def test_the_ranks_of_a_machine_are_those_that_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks_here() == 4
    monkeypatch.setenv("LOCAL_SIZE", "2")  # deepspeed's launcher
    assert ranks_here() == 2
    assert os.environ["LOCAL_SIZE"] == "2"


def test_the_recipe_wins(dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    data = write_llava_json(tmp_path / "data", 2)
    found = {}
    for name, train in {"default": {}, "named": {"dataloader_num_workers": 3}}.items():
        arguments = training_arguments(make_config(tmp_path / name, dense_checkpoint, data, train=train))
        found[name] = arguments.dataloader_num_workers
    assert found == {"default": 0, "named": 3}  # on a CPU, as in every test


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """Over two epochs, with a router that draws random numbers, which the loader must not do before it."""
    noisy = tiny_moe(router={"name": "noisy_top_k", "args": {"k": 2}})
    checkpoint = write_tiny_checkpoint(tmp_path / "noisy", noisy)
    data = write_llava_json(tmp_path / "data", 6, text_only_every=3)
    found: dict[int, Any] = {}
    for number in (0, 2):
        config = make_config(
            tmp_path / str(number),
            checkpoint,
            data,
            stage={"learning_rates": MOE_PARTS},
            train={"max_steps": 6, "dataloader_num_workers": number},
        )
        runner.train(config)
        found[number] = losses(config.output_dir)
    assert len(found[0]) == 6
    assert found[0] == found[2]
