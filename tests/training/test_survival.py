"""Stops that were asked for, checkpoints that were cut, losses that are no number, disks that are full; one process."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llava_moe import stop
from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.data.broken import broken_item
from llava_moe.training import checkpoints, preflight, runner, stopping
from llava_moe.training.checkpoints import PARTIAL, Layout, SaveError, last_whole_checkpoint
from llava_moe.training.health import Health, NotFiniteError, any_not_finite
from llava_moe.training.metrics import read_metrics
from llava_moe.training.objective import Objective
from llava_moe.training.reshard import reshard
from llava_moe.training.stopping import Interrupted, Peer, StopRequest
from llava_moe.training.survival import SAMPLE_IDS, Identified
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.tiny import write_llava_json
from tests.training.runs import losses, make_config, make_trainer, stopping_trainer
from tests.training.survivors import poisoned

PROJECTOR: dict[str, Any] = {"stage": {"learning_rates": {"projector": 1e-2, "decoder": 1e-2}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_llava_json(tmp_path_factory.mktemp("survival") / "data", 6)


@pytest.fixture(scope="module")
def whole(dense_checkpoint: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of five steps that nothing has disturbed; three steps are an epoch."""
    config = run_of(tmp_path_factory.mktemp("whole"), dense_checkpoint, data)
    torch.manual_seed(0)
    runner.train(config)
    return config


@pytest.fixture(scope="module")
def finished_checkpoint(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = run_of(tmp_path_factory.mktemp("finished"), dense_checkpoint, data)
    made = make_trainer(config)
    made.args.max_steps = 2
    made.run(None)
    return Path(config.output_dir) / "checkpoint-2"


def run_of(folder: Path, checkpoint: Path, data: tuple[Path, Path], **train: Any) -> RunConfig:
    defaults = {"max_steps": 5, "save_steps": 2, "train_sampling_strategy": "sequential"}
    return make_config(folder, checkpoint, data, **PROJECTOR, train={**defaults, **train})


@contextmanager
def at_end_of(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Within it every run does something when that step ends, before it is logged or saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LlavaMoeTrainer", stopping_trainer(step, act))
        yield


def rows(config: RunConfig) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "cross_entropy", "grad_norm", "learning_rate")
    return [tuple(str(row.get(key)) for key in keys) for row in read_metrics(config.output_dir)]


@pytest.mark.parametrize("way", ["SIGTERM", "file"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_equal(
    way: str, dense_checkpoint: Path, data: tuple[Path, Path], whole: RunConfig, tmp_path: Path
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data, save_steps=100)
    out = Path(config.output_dir)

    def ask() -> None:
        if way == "file":
            stop.run(str(tmp_path / "recipe.yaml"))
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with at_end_of(2, ask), pytest.raises(Interrupted, match="75") as stopped:
        runner.train(config)
    assert stopped.value.code == stopping.STOPPED == 75
    assert "stopped at step 2; the last whole checkpoint is" in stopped.value.message
    assert signal.getsignal(signal.SIGTERM) == before
    assert last_whole_checkpoint(out) == out / "checkpoint-2"
    assert not (out / "done.json").exists()
    assert not (out / stopping.FILE).exists()
    if way == "file":
        stop.run(str(tmp_path / "recipe.yaml"))  # nobody is there: the next run must not take it for its own
    runner.train(config)
    assert rows(config) == rows(whole)


def test_every_way_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "named"
    monkeypatch.setenv(stopping.STOP_FILE_VARIABLE, str(named))
    for way in (signal.SIGTERM, signal.SIGUSR1, named, tmp_path / stopping.FILE):
        with StopRequest(tmp_path).listening() as request:
            request.training = True
            assert not request.is_asked
            if isinstance(way, Path):
                way.touch()
                monkeypatch.setenv("RANK", "1")
                assert not request.is_asked  # one rank looks at files, and the others hear of it
                monkeypatch.setenv("RANK", "0")
            else:
                os.kill(os.getpid(), way)
            assert request.is_asked
            request.forget()
            assert not any(file.exists() for file in request.files)


def test_the_two_names_of_the_stop_file_are_one() -> None:
    assert stop.FILE == stopping.FILE


def test_a_request_while_a_checkpoint_is_written_costs_no_further_step(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data)
    commit = checkpoints.commit

    def asked_meanwhile(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        commit(*args)

    monkeypatch.setattr(checkpoints, "commit", asked_meanwhile)
    with pytest.raises(Interrupted):
        runner.train(config)
    assert list(losses(config.output_dir)) == [1, 2]
    assert [path.name for path in Path(config.output_dir).glob("checkpoint*")] == ["checkpoint-2"]


def test_a_request_in_the_last_step_lets_the_run_finish(
    dense_checkpoint: Path, data: tuple[Path, Path], whole: RunConfig, tmp_path: Path
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data)
    with at_end_of(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert (runner.train(config) / "config.json").is_file()
    assert rows(config) == rows(whole)


@pytest.mark.parametrize("way", ["SIGTERM", "file", "variable"])
def test_a_request_before_the_first_step_ends_the_run_at_once(
    way: str, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a file, which nobody looks at while the main thread reads data or weights; one of this very start too."""
    config = run_of(tmp_path, dense_checkpoint, data)
    named = tmp_path / "named"
    monkeypatch.setenv(stopping.STOP_FILE_VARIABLE, str(named))
    monkeypatch.setattr(stopping, "_LOOK_EVERY", 0.05)
    if way == "variable":
        named.touch()

    def busy(*args: Any) -> None:
        if way == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif way == "file":
            Path(config.output_dir).mkdir(exist_ok=True)
            stop.run(str(tmp_path / "recipe.yaml"))
        time.sleep(20)
        pytest.fail("nobody was told")

    monkeypatch.setattr(runner, "check_image_folders", busy)
    with pytest.raises(Interrupted) as stopped:
        runner.train(config)
    assert "before the first step" in stopped.value.message


def test_asking_a_run_that_is_not_there_is_one_line(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    run_of(tmp_path, dense_checkpoint, data)
    with pytest.raises(RecipeError, match=r"output_dir: .*/out does not exist"):
        stop.run(str(tmp_path / "recipe.yaml"))


class StoppedError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("place", ["_files", "flush", "keep_newest"])
def test_the_older_checkpoint_stays_until_the_new_one_is_whole(
    place: str, finished_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ends while it saves, with room for one checkpoint: before list, name and deletion."""
    made = tmp_path / PARTIAL / "checkpoint-4"
    for folder in (tmp_path / "checkpoint-2", made):
        shutil.copytree(finished_checkpoint, folder)
    (made / "complete.json").unlink()

    def save() -> None:
        checkpoints.commit(made, tmp_path / made.name, Layout(1, 2, 1, False))
        checkpoints.keep_newest(tmp_path, 1)

    def interrupted(*args: Any) -> Any:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, place, interrupted)
        with pytest.raises(StoppedError):
            save()
    last = "checkpoint-4" if place == "keep_newest" else "checkpoint-2"
    assert last_whole_checkpoint(tmp_path) == tmp_path / last
    assert checkpoints.is_whole(tmp_path / "checkpoint-2")
    assert (tmp_path / PARTIAL).exists() == (place != "keep_newest")
    if place != "keep_newest":
        save()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]
    checkpoints.clear(tmp_path, everything=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors", "complete.json", "trainer_state.json"])
@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_cut_checkpoint_is_not_taken(file: str, harm: str, finished_checkpoint: Path, tmp_path: Path) -> None:
    """What a power loss leaves: files that are empty, short or not there."""
    for step in (2, 4):
        shutil.copytree(finished_checkpoint, tmp_path / f"checkpoint-{step}")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    harmed = tmp_path / "checkpoint-4" / file
    if harm == "cut":
        harmed.write_bytes(harmed.read_bytes()[:-7])
    else:
        harmed.unlink()
    # a checkpoint without the list is one of an earlier version, and whole as far as anybody can tell
    tells = (file, harm) != ("complete.json", "missing")
    assert last_whole_checkpoint(tmp_path) == tmp_path / ("checkpoint-2" if tells else "checkpoint-4")


def test_a_checkpoint_keeps_what_callbacks_have_put_beside_it(tmp_path: Path) -> None:
    final, partial = tmp_path / "checkpoint-3", tmp_path / PARTIAL / "checkpoint-3"
    for folder in (final, partial):
        folder.mkdir(parents=True)
    (final / "skipped.json").write_text("{}")
    (final / "trainer_state.json").write_text("{} of a run that was killed")
    (partial / "trainer_state.json").write_text("{}")
    checkpoints.commit(partial, final, Layout(1, 2, 1, False))
    assert sorted(p.name for p in final.iterdir()) == ["complete.json", "skipped.json", "trainer_state.json"]
    assert checkpoints.is_whole(final)
    assert not (tmp_path / PARTIAL).exists()


def test_only_whole_checkpoints_count_as_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}" if step != 10 else "{")
    checkpoints.keep_newest(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 4
    checkpoints.keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4", "checkpoint-6"]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


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


def test_workers_outlive_a_signal_to_the_whole_job(
    dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """A cluster may signal every process of a job; the batches of the step must still come."""
    config = run_of(tmp_path, dense_checkpoint, data, dataloader_num_workers=1, dataloader_prefetch_factor=1)

    def everybody() -> None:
        workers = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert workers
        for pid in (*map(int, workers), os.getpid()):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)

    with at_end_of(1, everybody), pytest.raises(Interrupted):
        runner.train(config)
    assert last_whole_checkpoint(Path(config.output_dir)) == Path(config.output_dir) / "checkpoint-1"


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within it no file can grow larger: what a full disk does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [4_000, 300_000])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    size: int, finished_checkpoint: Path, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """The limit strikes the weights (safetensors), or the optimiser's state, which is larger (torch's writer)."""
    made = make_trainer(run_of(tmp_path, dense_checkpoint, data, max_steps=1))
    out = tmp_path / "out"
    shutil.copytree(finished_checkpoint, out / "checkpoint-0")
    with files_up_to(size), pytest.raises(SaveError) as raised:
        made.run(None)
    message = str(raised.value)
    assert message.startswith("checkpoint-1 could not be written: ")
    assert f"the last whole checkpoint is {out / 'checkpoint-0'}; make room and start the run again" in message
    assert "\n" not in message
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-0"]


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(
    dense_checkpoint: Path, data: tuple[Path, Path], whole: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data)
    out = Path(config.output_dir)

    def full(*args: Any) -> None:
        assert (out / "model.partial").is_dir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_card", full)
        with pytest.raises(SaveError, match=r"the final model could not be written: .*No space left on device"):
            runner.train(config)
    assert not (out / "model.partial").exists()
    assert last_whole_checkpoint(out) == out / "checkpoint-5"
    runner.train(config)
    assert rows(config) == rows(whole)
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (Path(whole.output_dir) / "model" / name).read_bytes()


def test_a_disk_too_small_for_a_checkpoint_is_refused_before_a_step(
    dense_checkpoint: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = run_of(tmp_path, dense_checkpoint, data)
    monkeypatch.setattr(preflight, "free_bytes", lambda folder: 100_000)
    monkeypatch.setattr(LlavaMoeTrainer, "training_step", lambda *args: pytest.fail("a step was made"))
    with pytest.raises(SaveError, match=r"out has 0\.00 GiB free, but a checkpoint of this run takes about"):
        runner.train(config)
    made = make_trainer(config)
    one, model = preflight.checkpoint_bytes(made), preflight.model_bytes(made)
    monkeypatch.setattr(preflight, "free_bytes", lambda folder: one + model)
    preflight.check_space(made, Path(config.output_dir))  # five steps, a checkpoint every two: three of them
    assert "3 checkpoints of about" in capsys.readouterr().out
    made.num_kept = 1
    preflight.check_space(made, Path(config.output_dir))
    assert "2 checkpoints of about" in capsys.readouterr().out
    monkeypatch.setattr(preflight, "free_bytes", lambda folder: 2 * one + model)
    preflight.check_space(made, Path(config.output_dir))
    assert capsys.readouterr().out == ""


def test_the_estimate_of_a_checkpoint_is_near_its_size(
    finished_checkpoint: Path, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    found = sum(f.stat().st_size for f in finished_checkpoint.iterdir() if f.suffix in (".pt", ".safetensors"))
    estimate = preflight.checkpoint_bytes(make_trainer(run_of(tmp_path, dense_checkpoint, data)))
    assert estimate == pytest.approx(found, rel=0.15)  # tiny files have large headers


@pytest.mark.parametrize("kind", ["file", "missing"])
def test_an_unreadable_image_folder_is_one_line(
    kind: str, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    if kind == "file":
        folder.write_text("no folder")
    sources = [{"path": str(data[0]), "image_folder": str(image)} for image in (data[1], folder)]
    config = make_config(tmp_path / "run", dense_checkpoint, data, data={"sources": sources})
    monkeypatch.setattr(runner, "load_model", lambda *args: pytest.fail("the model was loaded"))
    said = "is a file and no folder" if kind == "file" else "does not exist"
    with pytest.raises(RecipeError, match=rf"^data\.sources\[1\]\.image_folder: {folder} {said}; .* images of [^\n]*$"):
        runner.train(config)


def test_text_alone_needs_no_image_folder(tmp_path: Path, dense_checkpoint: Path) -> None:
    text = write_llava_json(tmp_path / "data", 2, text_only_every=1)[0]
    data = (text, tmp_path / "nowhere")
    preflight.check_image_folders(make_config(tmp_path, dense_checkpoint, data))


class TestAnotherDivision:
    """The same steps divided otherwise."""

    def test_a_run_goes_on_with_the_same_steps(
        self, dense_checkpoint: Path, data: tuple[Path, Path], whole: RunConfig, tmp_path: Path
    ) -> None:
        config = run_of(tmp_path, dense_checkpoint, data)
        with at_end_of(3, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Interrupted):
            runner.train(config)
        divided = ["train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=1"]
        other = load_recipe(tmp_path / "recipe.yaml", divided)
        runner.train(other)
        assert losses(config.output_dir) == pytest.approx(losses(whole.output_dir), rel=1e-5)
        with pytest.raises(RecipeError, match="another recipe"):
            runner.train(config)  # it is finished as what it has become

    def test_other_steps_are_refused(self, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
        config = run_of(tmp_path, dense_checkpoint, data)
        with at_end_of(3, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Interrupted):
            runner.train(config)
        larger = load_recipe(tmp_path / "recipe.yaml", ["train.gradient_accumulation_steps=2"])
        with pytest.raises(RecipeError, match=r"another recipe \(different: train\.gradient_accumulation_steps"):
            runner.train(larger)

    def test_another_number_of_ranks_names_both(self, finished_checkpoint: Path) -> None:
        with pytest.raises(RecipeError) as raised:
            checkpoints.check_layout(finished_checkpoint, Layout(2, 2, 1, False))
        said = str(raised.value)
        assert "steps of 2 = 2 x 1 x 1 (per device x accumulation x ranks) samples" in said
        assert "would have 4 = 2 x 1 x 2" in said
        assert "set NPROC=1, or delete" in said
        checkpoints.check_layout(finished_checkpoint, Layout(2, 1, 1, False))

    @pytest.mark.parametrize(
        ("section", "reason"),
        [
            ({"deepspeed": "scripts/deepspeed/zero3.json"}, "rates of the parts"),
            ({"deepspeed": "scripts/deepspeed/zero2.json", "expert_parallel": 2}, "with expert_parallel"),
        ],
    )
    def test_shards_that_cannot_be_converted_are_refused(
        self, section: dict[str, Any], reason: str, dense_checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = tmp_path / "out" / "checkpoint-4"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(json.dumps({"layout": vars(Layout(4, 2, 1, True)), "files": {}}))
        config = make_config(tmp_path, dense_checkpoint, data, **section)
        with pytest.raises(RecipeError, match=rf"by 4 ranks and this run has 2; .*{reason}.*: go on with NPROC=4, or"):
            reshard(folder, config, SimpleNamespace(), Layout(2, 2, 2, True))
        reshard(folder, config, SimpleNamespace(), Layout(4, 2, 1, True))  # nothing to do

    def test_the_mend_is_named_where_there_is_one(self, finished_checkpoint: Path) -> None:
        layout = json.loads((finished_checkpoint / "complete.json").read_text())["layout"]
        assert Layout(**layout) == Layout(1, 2, 1, False)
        with pytest.raises(RecipeError, match=r"set train\.gradient_accumulation_steps=2, or NPROC=1"):
            checkpoints.check_layout(finished_checkpoint, Layout(1, 1, 1, False))


def test_peers_that_have_ended_are_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peer = Peer(3, process.pid)
    request = StopRequest("nowhere")
    request._peers = [peer]
    assert request.peer_gone() is None
    process.kill()
    assert request.peer_gone(seconds=10) == peer  # a zombie: nobody has waited for it
    process.wait()
    assert peer.is_gone()


def test_an_error_of_the_transport_names_the_rank_that_is_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    monkeypatch.setattr(stopping, "_LAUNCHER_LOOKS", 0)
    request = StopRequest("nowhere")
    request._peers = [Peer(1, process.pid)]
    with pytest.raises(SystemExit) as ended, request.naming_who_is_gone():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234")
    assert ended.value.code == stopping.PEER_GONE
    assert f"error: rank 1 (process {process.pid}) is gone, and rank 0 cannot go on" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="of our own"), request.naming_who_is_gone():
        raise RuntimeError("a mistake of our own")


@pytest.mark.slow
def test_a_process_that_waits_for_a_dead_rank_is_ended(tmp_path: Path) -> None:
    """The main thread hangs where no signal handler of Python runs: in a system call that is tried again."""
    code = (
        "import os, subprocess, sys, threading\n"
        "from llava_moe.training import stopping\n"
        "stopping._LOOK_EVERY, stopping._PATIENCE = 0.1, 0.1\n"
        "child = subprocess.Popen([sys.executable, '-c', ''])\n"
        "request = stopping.StopRequest('nowhere')\n"
        "request._peers = [stopping.Peer(5, child.pid)]\n"
        "with request.listening():\n"
        "    os.read(os.pipe()[0], 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == stopping.PEER_GONE, done.stderr
    assert "error: rank 5 (process " in done.stderr
