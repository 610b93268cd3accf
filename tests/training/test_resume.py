"""An interrupted run goes on as if nothing had happened; a finished one stays; another one is refused.

Runs that are killed are in test_survival_kills.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.model.assemble import load_model
from llava_moe.training import runner
from llava_moe.training.runner import last_whole_checkpoint
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, losses, make_config, stopping_trainer

SECTIONS: dict[str, Any] = {"stage": {"learning_rates": MOE_PARTS}, "balance": {"losses": {"switch": 0.1}}}


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def _interrupt() -> None:
    raise StoppedError


def interrupt(config: RunConfig, step: int) -> None:
    """Runs until the end of a step and stops there with nothing of that step written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LlavaMoeTrainer", stopping_trainer(step, _interrupt))
        with pytest.raises(StoppedError):
            runner.train(config)


def elsewhere(config: RunConfig, name: str) -> RunConfig:
    """The same run with another output directory."""
    return dataclasses.replace(config, output_dir=str(Path(config.output_dir).with_name(name)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize(("accumulation", "stop"), [(1, 3), (1, 6), (2, 5)])
def test_losses_after_a_resume_are_those_of_the_uninterrupted_run(
    strategy: str, accumulation: int, stop: int, moe_checkpoint: Path, tmp_path: Path
) -> None:
    """An epoch has three steps and a checkpoint is written every two: resumes in the first and in later epochs."""
    data = write_llava_json(tmp_path / "data", 6 * accumulation, text_only_every=4)
    train = {
        "max_steps": 7,
        "save_steps": 2,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": strategy,
    }
    whole = make_config(tmp_path, moe_checkpoint, data, **SECTIONS, train=train)
    runner.train(whole)
    broken = elsewhere(whole, "broken")
    interrupt(broken, stop)
    assert last_whole_checkpoint(Path(broken.output_dir)).name == f"checkpoint-{(stop - 1) // 2 * 2}"
    assert max(losses(broken.output_dir)) == stop - 1
    runner.train(broken)
    assert losses(broken.output_dir) == pytest.approx(losses(whole.output_dir), rel=1e-6)
    assert list(losses(broken.output_dir)) == list(range(1, 8))
    one, other = (dict(load_model(Path(c.output_dir) / "model").named_parameters()) for c in (whole, broken))
    for name, parameter in one.items():
        torch.testing.assert_close(other[name], parameter, msg=name)


def test_a_half_written_checkpoint_is_ignored(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 6)
    config = make_config(tmp_path, moe_checkpoint, data, **SECTIONS, train={"max_steps": 4, "save_steps": 2})
    interrupt(config, 3)
    out = Path(config.output_dir)
    no_state, cut_state = out / "checkpoint-3", out / "checkpoint-10"
    no_state.mkdir()
    (no_state / "model.safetensors").write_bytes(b"cut")
    shutil.copytree(out / "checkpoint-2", cut_state)
    (cut_state / "trainer_state.json").write_text('{"epoch": 0.')
    assert last_whole_checkpoint(out) == out / "checkpoint-2"
    runner.train(config)
    assert list(losses(out)) == [1, 2, 3, 4]
    assert not list(out.glob("checkpoint-*"))


def test_a_run_stopped_before_its_first_checkpoint_starts_again(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 6)
    config = make_config(tmp_path, moe_checkpoint, data, **SECTIONS, train={"max_steps": 3})
    interrupt(config, 3)
    assert last_whole_checkpoint(Path(config.output_dir)) is None
    runner.train(config)
    assert list(losses(config.output_dir)) == [1, 2, 3]


def test_a_resume_without_telemetry_finishes(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 6)
    train = {"max_steps": 4, "save_steps": 2, "logging_steps": 100}
    config = make_config(tmp_path, moe_checkpoint, data, **SECTIONS, train=train)
    interrupt(config, 3)
    assert load_model(runner.train(config))
    assert json.loads((Path(config.output_dir) / "done.json").read_text())["steps"] == 4


def test_a_finished_run_is_left_alone(
    moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, moe_checkpoint, write_llava_json(tmp_path / "data", 4), **SECTIONS)
    final = runner.train(config)
    files = {path: path.stat().st_mtime_ns for path in Path(config.output_dir).rglob("*")}
    monkeypatch.setattr(runner, "load_model", lambda *args: pytest.fail("a finished run loaded its model"))
    assert runner.train(load_recipe(Path(config.output_dir) / "recipe.yaml")) == final
    assert "finished already" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in Path(config.output_dir).rglob("*")}


def test_a_run_that_lost_its_model_is_done_again(moe_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, moe_checkpoint, write_llava_json(tmp_path / "data", 4), **SECTIONS)
    shutil.rmtree(runner.train(config))
    assert (runner.train(config) / "config.json").is_file()


def test_another_recipe_in_the_same_directory_is_refused(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    config = make_config(tmp_path, moe_checkpoint, data, **SECTIONS, train={"max_steps": 4, "save_steps": 2})
    interrupt(config, 3)
    changed = load_recipe(tmp_path / "recipe.yaml", ["train.max_steps=9", "stage.learning_rates.router=0.5"])
    with pytest.raises(
        RecipeError, match=r"another recipe \(different: stage\.learning_rates\.router, train\.max_steps\)"
    ):
        runner.train(changed)
