"""Losses, gradients and weights that are no numbers; one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llava_moe.data.broken import broken_item
from llava_moe.training import runner
from llava_moe.training.checkpoints import last_whole_checkpoint
from llava_moe.training.health import Health, NotFiniteError, any_not_finite
from llava_moe.training.objective import Objective
from llava_moe.training.survival import SAMPLE_IDS, Identified
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.training.runs import make_config, make_trainer
from tests.training.survivors import poisoned
from tests.training.undisturbed import PROJECTOR, run_of


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(
    packing: bool, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    train = {"max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 2 - packing}
    config = make_config(tmp_path, dense_checkpoint, data, **PROJECTOR, data={"packing": packing}, train=train)
    out = Path(config.output_dir)
    with poisoned("sample-3"), pytest.raises(NotFiniteError) as raised:
        runner.train(config)
    told = json.loads((out / "nan.json").read_text())
    [step] = told["ranks"][0]["steps"]
    [batch] = step["micro_batches"]
    assert "sample-3" in batch["sample_ids"]
    assert len(batch["sample_ids"]) >= 2
    assert (batch["loss"], batch["not_finite"]) == ("nan", ["cross_entropy"])
    message = str(raised.value)
    assert message.startswith(f"step {step['step']}: the loss or its gradient is not finite (cross_entropy)")
    assert "'sample-3'" in message
    assert str(out / "nan.json") in message
    last = last_whole_checkpoint(out)
    assert (last is None) == (step["step"] == 1)
    assert "there is no checkpoint yet" in message if last is None else str(last) in message
    assert last is None or int(last.name[11:]) == step["step"] - 1
    assert not (out / "model").exists()


def test_an_infinite_gradient_of_a_finite_loss_stops_the_run(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it meets a weight that the next losses would not show, and before the step is saved."""
    config = run_of(tmp_path, dense_checkpoint, data, save_steps=1)
    calls: list[int] = []

    class Spoils(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(state.global_step)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weight = model.model.language_model.layers[0].mlp.up_proj.weight
            weight.register_hook(lambda g: g * torch.inf if len(calls) == 2 else g)

    def make(*args: Any, callbacks: list[Any], **kwargs: Any) -> LlavaMoeTrainer:
        return LlavaMoeTrainer(*args, callbacks=[*callbacks, Spoils()], **kwargs)

    monkeypatch.setattr(runner, "LlavaMoeTrainer", make)
    with pytest.raises(NotFiniteError, match="step 3: the loss or its gradient is not finite; the samples were 'sa"):
        runner.train(config)
    [step] = json.loads((Path(config.output_dir) / "nan.json").read_text())["ranks"][0]["steps"]
    assert step["grad_norm"] in ("inf", "nan")
    assert step["micro_batches"][0]["not_finite"] == []
    assert step["micro_batches"][0]["sample_ids"] == ["sample-4", "sample-5"]
    assert sorted(p.name for p in Path(config.output_dir).glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def objective(value: float) -> Objective:
    return Objective(torch.tensor(value), {"cross_entropy": torch.tensor(value)})


@pytest.mark.parametrize("found_by", ["the next step", "settle", "a stop", "a save"])
def test_a_step_is_judged_late_with_its_own_samples(found_by: str, tmp_path: Path) -> None:
    """As on a GPU, whose flags have not arrived when the step ends; what is asked for is not late."""
    health = Health(tmp_path, torch.device("cpu"))
    health.lags = True
    for step, value in ((1, 2.0), (2, torch.nan), (3, torch.nan)):
        health.start(step)
        health.observe([f"sample-{step}"], objective(1.0))
        health.observe([f"other-{step}"], objective(value))
        if step == (2 if found_by == "a save" else 3):
            break
        assert not health.finish(asked_to_stop=False, at_once=False)
    judge: Callable[[], bool] = health.settle
    if found_by != "settle":
        judge = partial(health.finish, asked_to_stop=found_by == "a stop", at_once=found_by == "a save")
    with pytest.raises(NotFiniteError, match=r"step 2: the loss or its gradient is not finite .*were 'other-2';"):
        judge()
    [told] = json.loads((tmp_path / "nan.json").read_text())["ranks"]
    [bad] = [step for step in told["steps"] if step["step"] == 2]
    assert [(b["sample_ids"], b["not_finite"]) for b in bad["micro_batches"]] == [
        (["sample-2"], []),
        (["other-2"], ["cross_entropy"]),
    ]


def test_a_request_is_heard_of_a_step_late_and_never_lost(tmp_path: Path) -> None:
    health = Health(tmp_path, torch.device("cpu"))
    health.lags = True
    asked = [False, True, True]
    heard = []
    for step in (1, 2, 3):
        health.start(step)
        health.observe(["a"], objective(1.0))
        heard.append(health.finish(asked[step - 1], at_once=False))
    assert heard == [False, False, True]
    health.start(4)
    assert health.finish(True, at_once=True)


def test_weights_that_are_no_numbers_are_never_saved(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    made = make_trainer(run_of(tmp_path, dense_checkpoint, data))
    embeddings = made.model.get_input_embeddings().weight.requires_grad_(True)

    class Spoils(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            embeddings.data[5] = torch.nan  # a token that no sample has

    made.add_callback(Spoils())
    with pytest.raises(NotFiniteError, match="step 2: a weight is not finite"):
        made.run(None)
    assert not list((tmp_path / "out").glob("checkpoint*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((7, 5), 3e38, dtype=dtype)
    ids = torch.ones(3, dtype=torch.long)
    assert not any_not_finite([tensor, ids, torch.empty(0)])
    tensor[4, 2] = value
    assert any_not_finite([ids, tensor])


def test_batches_say_which_samples_they_hold() -> None:
    collate = Identified(lambda samples: {"n": len(samples)})
    one, other = {"sample_id": "a"}, {"sample_id": 7}
    assert collate([one, other]) == {"n": 2, SAMPLE_IDS: ["a", "7"]}
    assert collate([[one, other], [one]]) == {"n": 2, SAMPLE_IDS: ["a", "7", "a"]}
    assert collate([one, broken_item(ValueError("gone"))])[SAMPLE_IDS] == ["a"]
