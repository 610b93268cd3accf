"""Samples that break while a run trains: refused with one line, or left out, in step, and counted to the end."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import load_recipe
from llava_moe.data.broken import KEY
from llava_moe.data.checking import Limits, check_mixture
from llava_moe.data.mixture import Mixture, SourceSpec
from llava_moe.data.processing import load_processor
from llava_moe.data.schema import DataError
from llava_moe.training import runner
from llava_moe.training.rank_zero import on_first_rank
from llava_moe.training.skipping import Skips
from tests.tiny import write_llava_json
from tests.training.runs import (
    MOE_PARTS,
    losses,
    make_config,
    make_trainer,
    start_ranks,
    step_gradients,
    torchrun,
    write_recipe,
)
from tests.training.test_resume import elsewhere, interrupt

# those that any router can have
BALANCE = dict.fromkeys(("switch", "gshard", "sequence", "global_batch", "z", "max_z", "entropy"), 0.1)


def indexed_data(folder: Path, checkpoint: Path, n: int, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The image folder of `n` records that were checked, and the `data` section that trains on their index."""
    path, images = write_llava_json(folder, n, **options)
    mixture = Mixture((SourceSpec(str(path), str(images)),))
    index = folder / "index"
    check_mixture(mixture, processor=load_processor(checkpoint), limits=Limits(max_length=128), index=index)
    return images, {"sources": [], "index": str(index), "on_problem": "skip"}


def done(config: Any) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "done.json").read_text())["data"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_breaks_stops_the_run_with_one_line(
    dense_checkpoint: Path, tmp_path: Path, workers: int
) -> None:
    images, section = indexed_data(tmp_path / "data", dense_checkpoint, 4)
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    config = make_config(
        tmp_path,
        dense_checkpoint,
        ("", ""),  # type: ignore[arg-type]
        data={**section, "on_problem": "refuse"},
        train={"dataloader_num_workers": workers},
    )
    with pytest.raises(DataError, match=r"^\S*data\.json: record 'sample-2': \S*2\.png cannot be decoded") as caught:
        runner.train(config)
    assert "\n" not in str(caught.value)
    assert "start the run again" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_broken_samples_are_counted_over_workers_and_restarts(
    moe_checkpoint: Path, tmp_path: Path, packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight samples, of which two break and two more are text alone; two epochs."""
    images, section = indexed_data(tmp_path / "data", moe_checkpoint, 8, text_only_every=4)
    (images / "1.png").unlink()
    (images / "4.png").write_text("no image")
    section |= {"packing": packing}
    train = {"num_train_epochs": 2, "max_steps": -1, "save_steps": 2, "dataloader_num_workers": 2}
    train["per_device_train_batch_size"] = 1 if packing else 2
    whole = make_config(
        tmp_path,
        moe_checkpoint,
        ("", ""),  # type: ignore[arg-type]
        data=section,
        train=train,
        stage={"learning_rates": MOE_PARTS},
    )
    runner.train(whole)
    assert done(whole)["skipped_in_training"] == 4
    assert (done(whole)["records"], done(whole)["used"]) == (8, 8)
    said = json.loads((Path(whole.output_dir) / "skipped.json").read_text())
    assert sorted(said.values()) == [2, 2]
    assert any("1.png does not exist" in message for message in said)
    assert capsys.readouterr().out.count("train: left out: ") == 2
    stopped = elsewhere(whole, "stopped")
    interrupt(stopped, 4 if packing else 7)
    runner.train(stopped)
    assert done(stopped) == done(whole)
    assert losses(stopped.output_dir) == losses(whole.output_dir)


def test_no_other_sample_takes_the_place_of_a_broken_one(dense_checkpoint: Path, tmp_path: Path) -> None:
    """A step of two micro-batches, one of which is empty, has the gradient of the other one alone."""
    images, section = indexed_data(tmp_path / "data", dense_checkpoint, 2)
    _, alone = indexed_data(tmp_path / "alone", dense_checkpoint, 1)
    (images / "1.png").unlink()
    train = {"max_steps": 1, "per_device_train_batch_size": 1}
    found = step_gradients(
        make_config(
            tmp_path / "a",
            dense_checkpoint,
            ("", ""),  # type: ignore[arg-type]
            data=section,
            train={**train, "gradient_accumulation_steps": 2},
        )
    )
    wanted = step_gradients(
        make_config(tmp_path / "b", dense_checkpoint, ("", ""), data=alone, train=train)  # type: ignore[arg-type]
    )
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
    assert any(gradient.abs().sum() > 0 for gradient in wanted.values())


def test_an_empty_micro_batch_has_no_loss_and_no_gradient(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 2)
    stage, balance = {"learning_rates": MOE_PARTS}, {"losses": BALANCE}
    made = make_trainer(make_config(tmp_path, moe_checkpoint, data, stage=stage, balance=balance))
    broken = {KEY: "gone"}
    made.skips.policy = "skip"
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    loss = made.compute_loss(made.model, made.data_collator([broken]), num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)
    loss = made.compute_loss(made.model, made.data_collator([made.train_dataset[0]]), num_items_in_batch=3)
    assert loss.item() > 0


def test_nothing_is_reported_where_nothing_broke(tmp_path: Path) -> None:
    skips = Skips("skip")
    skips.take({"input_ids": 1})
    skips._gather()
    skips.save(tmp_path)
    assert skips.report() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_ranks_stay_in_step_and_add_up_their_counts(moe_checkpoint: Path, tmp_path: Path) -> None:
    """One start of two ranks: rank 0 works long enough for several signs of life; then all samples of three steps of
    either rank are broken at one time or another, so that a rank has nothing while the other one trains."""
    images, section = indexed_data(tmp_path / "data", moe_checkpoint, 8)
    for index in (0, 3, 4, 7):
        (images / f"{index}.png").unlink()
    train = {"max_steps": 4, "per_device_train_batch_size": 1}
    stage = {"learning_rates": MOE_PARTS}
    recipe = write_recipe(
        tmp_path,
        moe_checkpoint,
        ("", ""),  # type: ignore[arg-type]
        data=section,
        train=train,
        stage=stage,
        balance={"losses": {"switch": 0.1}},
    )
    found = start_ranks(torchrun(2), ["tests.training.test_skipping", str(recipe), str(tmp_path)])
    assert found.returncode != 0  # what fails on rank 0 ends both
    assert "only rank 0 says this" in found.stdout, found.stdout[-3000:]
    assert "rank      : 0 (local_rank: 0)\n  exitcode  : 2 " in found.stdout
    config = load_recipe(recipe)
    assert done(config)["skipped_in_training"] == 4
    rows = losses(config.output_dir)
    assert list(rows) == [1, 2, 3, 4]
    assert (tmp_path / "waited").read_text() == "1"


def _two_ranks(recipe: str, folder: str) -> None:
    """What each of the two ranks of the test above does."""
    config = load_recipe(recipe)
    runner.training_arguments(config).world_size  # noqa: B018  starts the process group
    began = time.monotonic()
    on_first_rank(lambda: time.sleep(1.2), beat=0.3)
    assert time.monotonic() - began > 1.1
    if os.environ["RANK"] == "1":
        Path(folder, "waited").write_text("1")
    runner.train(config)

    def fail() -> None:
        print("only rank 0 says this", flush=True)
        sys.exit(2)

    on_first_rank(fail, beat=0.3)
    raise AssertionError("went on after rank 0 had failed")


if __name__ == "__main__":
    _two_ranks(*sys.argv[1:])
