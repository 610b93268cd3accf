"""Checkpoints that were cut, disks that are full, steps that are divided otherwise; one process."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.training import checkpoints, preflight, runner
from llava_moe.training.checkpoints import PARTIAL, Layout, SaveError, last_whole_checkpoint
from llava_moe.training.reshard import reshard
from llava_moe.training.stopping import Interrupted
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.tiny import write_llava_json
from tests.training.runs import losses, make_config, make_trainer
from tests.training.undisturbed import at_end_of, rows, run_of


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


class TestRecordsWithoutAFolder:
    """Whether a missing image folder matters is read off the records, which may be gigabytes."""

    ROOM = 8 * 2**20

    def check(self, path: Path, tmp_path: Path, dense_checkpoint: Path) -> int:
        """The most memory that Python held meanwhile."""
        config = make_config(tmp_path, dense_checkpoint, (path, tmp_path / "nowhere"))
        tracemalloc.start()
        try:
            preflight.check_image_folders(config)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def write(self, path: Path, num_records: int, **last: Any) -> None:
        """Records of 100 kB; `last` is in the last one alone."""
        turns = [{"from": "human", "value": "why " * 25_000}, {"from": "gpt", "value": "so"}]
        records = [{"id": str(i), "image": None, "conversations": turns} for i in range(num_records)]
        records[-1].update(last)
        lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]")

    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    def test_text_is_walked_over(self, suffix: str, tmp_path: Path, dense_checkpoint: Path) -> None:
        path = tmp_path / f"text.{suffix}"
        self.write(path, 300)
        assert path.stat().st_size > 3 * self.ROOM
        assert self.check(path, tmp_path, dense_checkpoint) < self.ROOM

    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    def test_an_image_at_the_end_is_found(self, suffix: str, tmp_path: Path, dense_checkpoint: Path) -> None:
        path = tmp_path / f"last.{suffix}"
        self.write(path, 30, image="a.png")
        with pytest.raises(RecipeError, match=r"image_folder: .*nowhere does not exist"):
            self.check(path, tmp_path, dense_checkpoint)

    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    def test_nothing_is_read_behind_the_first_image(self, suffix: str, tmp_path: Path, dense_checkpoint: Path) -> None:
        """What follows is no JSON: read, it would make the file a broken one, about which nothing is said here."""
        path = tmp_path / f"first.{suffix}"
        record = json.dumps({"id": "0", "video": "a.mp4", "conversations": []})
        path.write_text(f"[{record}, ?" if suffix == "json" else f"{record}\n?\n")
        with pytest.raises(RecipeError, match=r"image_folder: .*nowhere does not exist"):
            self.check(path, tmp_path, dense_checkpoint)


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
