"""What TensorBoard, Weights & Biases and trackio are given, and what is refused before compute is spent."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from llava_moe.config import RecipeError, RunConfig
from llava_moe.training import loggers, runner
from llava_moe.training.arguments import training_arguments
from llava_moe.training.loggers import report_to, wandb_defaults
from llava_moe.training.metrics import read_metrics
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, make_config, make_trainer, stopping_trainer


def moe_config(folder: Path, checkpoint: Path, **train: Any) -> RunConfig:
    data = write_llava_json(folder / "data", 6)
    balance = {"losses": {"switch": 0.1}}
    return make_config(folder, checkpoint, data, stage={"learning_rates": MOE_PARTS}, balance=balance, train=train)


def without(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    """As if these packages were not installed, and all others were."""
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name in absent else object())


def test_tensorboard_is_the_default_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    assert report_to(None) == ["tensorboard"]
    assert report_to("none") == report_to([]) == []
    assert report_to(["tensorboard", "wandb", "tensorboard"]) == ["tensorboard", "wandb"]
    without(monkeypatch, "tensorboard")
    assert report_to(None) == ["tensorboard"]  # tensorboardX writes the same files
    without(monkeypatch, "tensorboard", "tensorboardX")
    assert report_to(None) == []
    assert "tensorboard" not in report_to("all")
    assert {"wandb", "trackio"} <= set(report_to("all"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("wandb", "train.report_to names wandb, whose package is not installed: pip install wandb"),
        (["tensorboard", "trackio"], "pip install trackio"),
        ("azure_ml", "pip install azureml-core"),
        ("tensorbord", "'tensorbord' is none of .*did you mean 'tensorboard'"),
        ({"wandb": True}, "must be a name or a list of names"),
        ([1], "must be a name or a list of names"),
    ],
)
def test_what_is_refused(asked: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "wandb", "trackio", "azureml")
    with pytest.raises(RecipeError, match=message):
        report_to(asked)


def test_a_missing_package_is_refused_before_anything_is_loaded(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "wandb")
    monkeypatch.setattr(runner, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(RecipeError, match="pip install wandb"):
        runner.train(moe_config(tmp_path, moe_checkpoint, report_to=["wandb"]))


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def _stop() -> None:
    raise StoppedError


@pytest.mark.slow
def test_tensorboard_shows_every_number_once_also_after_a_resume(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Stopped at the end of step 4, two steps behind the checkpoint: step 3 was written and runs again."""
    config = moe_config(tmp_path, moe_checkpoint, report_to="tensorboard", max_steps=5, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LlavaMoeTrainer", stopping_trainer(4, _stop))
        with pytest.raises(StoppedError):
            runner.train(config)
    out = Path(config.output_dir)
    written_before = {path.name for path in (out / "tensorboard").iterdir()}
    runner.train(config)
    rows, found = read_metrics(out), events(out / "tensorboard")
    assert {path.name for path in (out / "tensorboard").iterdir()} > written_before
    assert not (out / "runs").exists()  # where transformers would put them
    wanted = {
        "train/loss": [row["loss"] for row in rows],
        "train/cross_entropy": [row["cross_entropy"] for row in rows],
        "train/switch": [row["switch"] for row in rows],
        "train/learning_rate/router": [row["learning_rate"]["router"] for row in rows],
        "train/routing/0/max_violation": [row["layers"]["0"]["max_violation"] for row in rows],
        "train/routing/2/losses/switch": [row["layers"]["2"]["losses"]["switch"] for row in rows],
        "train/tokens_per_second": [row["tokens_per_second"] for row in rows],
    }
    for tag, values in wanted.items():
        scalars = found.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5], tag
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6), tag


def test_the_environment_may_choose_another_folder(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    made = make_trainer(moe_config(tmp_path, moe_checkpoint, report_to=["tensorboard"]))
    made.train()
    assert len(events(tmp_path / "elsewhere").Scalars("train/loss")) == 2
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_names_of_a_run(moe_checkpoint: Path, tmp_path: Path) -> None:
    found = training_arguments(moe_config(tmp_path, moe_checkpoint))
    assert (found.run_name, found.project) == ("out", "llava_moe")
    named = training_arguments(moe_config(tmp_path / "b", moe_checkpoint, run_name="mine", project="ours"))
    assert (named.run_name, named.project) == ("mine", "ours")


def test_wandb_writes_to_disk_where_nobody_has_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_defaults("out") == {"WANDB_PROJECT": "llava_moe", "WANDB_DIR": "out", "WANDB_MODE": "offline"}
    netrc.write_text("machine api.wandb.ai login user password nothing\n")
    netrc.chmod(0o600)
    assert "WANDB_MODE" not in wandb_defaults("out")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_defaults("out")["WANDB_MODE"] == "offline"
    netrc.write_text("machine\n")
    assert wandb_defaults("out")["WANDB_MODE"] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert "WANDB_MODE" not in wandb_defaults("out")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["WANDB_PROJECT", "WANDB_DIR", "WANDB_MODE", "WANDB_API_KEY"]
    for name in {*known, *(key for key in os.environ if key.startswith("WANDB_"))}:
        monkeypatch.setenv(name, "")  # so that what the run sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    made = make_trainer(moe_config(tmp_path, moe_checkpoint, report_to=["wandb"]))
    made.train()
    import wandb

    found = dict(wandb.run.summary)
    wandb.finish()
    row = read_metrics(tmp_path / "out")[-1]
    assert found["train/global_step"] == 2
    assert found["train/routing/0/max_violation"] == row["layers"]["0"]["max_violation"]
    assert found["train/routing/2/losses/switch"] == row["layers"]["2"]["losses"]["switch"]
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_runs_on_this_machine(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    made = make_trainer(moe_config(tmp_path, moe_checkpoint, report_to=["trackio"]))
    given: list[dict[str, Any]] = []
    import trackio

    log = trackio.log
    monkeypatch.setattr(trackio, "log", lambda values, *a, **k: (given.append(values), log(values, *a, **k))[1])
    made.train()
    assert given[0]["train/routing/0/max_violation"] >= 0
