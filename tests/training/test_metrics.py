"""What a run writes into metrics.jsonl: right numbers, whole after a crash, and none of it makes a device wait."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llava_moe.config import RunConfig
from llava_moe.data.packing import PADDING
from llava_moe.training import runner
from llava_moe.training.metrics import FILE, SiteLosses, _cut_back, _finite, flat, read_metrics, spent_seconds
from llava_moe.training.throughput import Counts, StepCounts, count
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, make_config, make_trainer, stopping_trainer, unequal_data

BALANCE = {"losses": {"switch": 0.1, "z": 0.01}}
IMAGE = 7


def moe_config(folder: Path, checkpoint: Path, data: tuple[Path, Path], **train: Any) -> RunConfig:
    return make_config(folder, checkpoint, data, stage={"learning_rates": MOE_PARTS}, balance=BALANCE, train=train)


class Spy(TrainerCallback):  # type: ignore[misc]
    """Collects what the optimiser applies and what the loggers are given."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.logs: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_a_row_tells_what_the_steps_worked_on(moe_checkpoint: Path, tmp_path: Path) -> None:
    """An epoch of three steps of two micro-batches, and the same again."""
    data = unequal_data(tmp_path / "data", 12)
    made = make_trainer(
        moe_config(tmp_path, moe_checkpoint, data, max_steps=6, logging_steps=3, gradient_accumulation_steps=2)
    )
    items = [made.train_dataset[index] for index in range(12)]
    made.train()
    rows = read_metrics(tmp_path / "out")
    tokens = sum(len(item["input_ids"]) for item in items)
    labels = sum(int((item["labels"][1:] != -100).sum()) for item in items)
    assert [row["step"] for row in rows] == [3, 6]
    assert [row["epoch"] for row in rows] == [1.0, 2.0]
    assert [row["label_tokens"] for row in rows] == [labels, labels]
    assert [row["samples"] for row in rows] == [12, 24]
    assert [row["tokens"] for row in rows] == [tokens, 2 * tokens]
    for row in rows:
        assert 0.3 < row["useful_tokens"] < 1  # answers of very different lengths side by side
        assert row["tokens_per_second"] * row["seconds_per_step"] * 3 == pytest.approx(tokens, rel=2e-3)
        assert 0 < row["data_wait"] < row["seconds_per_step"]
        assert row["data_wait_share"] == pytest.approx(row["data_wait"] / row["seconds_per_step"], rel=2e-3)
        assert row["mfu"] is None
        assert row["tflops"] is None  # a CPU
        assert 0.1 < row["peak_memory_gib"] < 100
        assert row["grad_norm"] > 0


def test_balance_losses_by_layer_have_their_mean_in_the_row(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 8)
    make_trainer(moe_config(tmp_path, moe_checkpoint, data, max_steps=4, logging_steps=2)).train()
    for row in read_metrics(tmp_path / "out"):
        for name in ("switch", "z"):
            by_layer = [layer["losses"][name] for layer in row["layers"].values()]
            assert len(by_layer) == 2
            assert by_layer[0] != by_layer[1]
            assert sum(by_layer) / 2 == pytest.approx(row[name], rel=1e-5)


def test_losses_of_sites_are_means_over_micro_batches() -> None:
    losses = SiteLosses()
    for value in (1.0, 2.0, 6.0):
        sites = {("decoder", 1): torch.tensor(value), ("vision", 0): torch.tensor(-value)}
        losses.update({"z": sites})
    assert losses.flush() == {"1": {"z": 3.0}, "vision.0": {"z": -3.0}}
    assert losses.flush() == {}


def test_learning_rates_are_those_of_the_step_and_loggers_get_all_numbers(moe_checkpoint: Path, tmp_path: Path) -> None:
    rates = {"router": 1e-2, "projector": 2e-3, "experts": 5e-3}
    data = write_llava_json(tmp_path / "data", 8)
    train = {"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    made = make_trainer(
        make_config(tmp_path, moe_checkpoint, data, stage={"learning_rates": rates}, balance=BALANCE, train=train)
    )
    spy = Spy()
    made.add_callback(spy)
    made.train()
    rows, logged = read_metrics(tmp_path / "out"), [logs for logs in spy.logs if "loss" in logs]
    assert len(rows) == len(logged) == 4
    for row, logs, applied in zip(rows, logged, spy.rates, strict=True):
        assert row["learning_rate"].keys() == rates.keys()
        assert set(row["learning_rate"].values()) == set(applied)
        for part, rate in rates.items():
            assert row["learning_rate"][part] / rate == pytest.approx(row["learning_rate"]["router"] / rates["router"])
            assert logs[f"learning_rate/{part}"] == row["learning_rate"][part]
        assert logs["learning_rate"] == next(iter(row["learning_rate"].values()))  # of the first group
        assert logs["routing/0/max_violation"] == row["layers"]["0"]["max_violation"]
        assert logs["routing/2/losses/z"] == row["layers"]["2"]["losses"]["z"]
        assert logs["cross_entropy"] == row["cross_entropy"]
        assert all(isinstance(value, int | float) for value in logs.values())
    assert rows[0]["learning_rate"]["router"] < rows[2]["learning_rate"]["router"]
    assert "total_flos" not in spy.logs[-1]


def unpacked(**changes: Any) -> dict[str, Any]:
    """Two samples of 3 and 5 tokens, the second with a picture."""
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 0, 0], [IMAGE, IMAGE, 4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 2, 3, -100, -100], [9, -100, -100, 5, 6]]),
        "pixel_values": torch.zeros(2, 3, 4, 4),
    }
    return {**batch, **changes}


def packed() -> dict[str, Any]:
    """The same two samples in one row, and two places of padding."""
    whole = unpacked()
    ids = torch.cat([whole["input_ids"][0, :3], whole["input_ids"][1], torch.zeros(2, dtype=torch.int64)])
    labels = torch.tensor([-100, 2, 3, -100, -100, -100, 5, 6, -100, -100])
    sequence = torch.tensor([0] * 3 + [1] * 5 + [PADDING] * 2)
    position = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1])
    rows = {"input_ids": ids, "labels": labels, "sequence_ids": sequence, "position_ids": position}
    return {key: value.unsqueeze(0) for key, value in rows.items()} | {"pixel_values": whole["pixel_values"]}


@pytest.mark.parametrize(("batch", "places"), [(unpacked(), 10), (packed(), 10)], ids=["unpacked", "packed"])
def test_counts_of_a_batch(batch: dict[str, Any], places: int) -> None:
    found = Counts(*count(batch, IMAGE).tolist())
    assert found == Counts(tokens=8, places=places, pairs=6 + 15, labels=4, samples=2, pictures=2, features=0)


def test_counts_know_cached_features_and_blank_pictures() -> None:
    cached = unpacked(pixel_values=None, vision_features=torch.zeros(1, 4, 8))
    assert Counts(*count(cached, IMAGE).tolist()).features == 1
    text_only = unpacked(input_ids=torch.tensor([[1, 2, 3, 0, 0], [8, 9, 4, 5, 6]]))
    assert Counts(*count(text_only, IMAGE).tolist()).pictures == 0
    counts = StepCounts(IMAGE)
    for _ in range(3):
        counts.update(unpacked())
    assert counts.drain() == Counts(24, 30, 63, 12, 6, 6, 0)
    assert counts.drain() == Counts()


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def _stop() -> None:
    raise StoppedError


def interrupted(config: RunConfig, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LlavaMoeTrainer", stopping_trainer(step, _stop))
        with pytest.raises(StoppedError):
            runner.train(config)


@pytest.mark.slow
def test_totals_go_on_after_an_interruption_between_two_lines(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Logged every 3 steps and saved every 2: the checkpoint of step 4 lies between two lines."""
    data = unequal_data(tmp_path / "data", 8)
    train = {"max_steps": 6, "logging_steps": 3, "save_steps": 2}
    whole = moe_config(tmp_path / "whole", moe_checkpoint, data, **train)
    broken = moe_config(tmp_path / "broken", moe_checkpoint, data, **train)
    runner.train(whole)
    interrupted(broken, 5)
    out = Path(broken.output_dir)
    assert json.loads((out / "progress.json").read_text())["step"] == 4
    (out / FILE).rename(out / "telemetry.jsonl")  # as if an older version had begun it
    runner.train(broken)
    assert not (out / "telemetry.jsonl").exists()
    one, other = read_metrics(whole.output_dir), read_metrics(broken.output_dir)
    assert [row["step"] for row in other] == [3, 6]
    for key in ("samples", "tokens"):
        assert [row[key] for row in other] == [row[key] for row in one]
    assert other[1]["label_tokens"] < one[1]["label_tokens"]  # of the two steps since the checkpoint
    done = json.loads((out / "done.json").read_text())
    assert done["seconds"] > spent_seconds(out, 3)


def test_rows_behind_the_checkpoint_go_and_so_does_half_a_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    _cut_back(tmp_path / FILE, 2)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_spent_seconds_count_pauses_and_no_later_steps(tmp_path: Path) -> None:
    rows = [
        {"step": 2, "seconds_per_step": 1.5},  # of an older version
        {"step": 5, "seconds_per_step": 1.0, "pause": 4.0},
        {"step": 9, "seconds_per_step": 9.0, "pause": 9.0},
    ]
    assert spent_seconds(tmp_path, 5) == 0
    (tmp_path / FILE).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert spent_seconds(tmp_path, 5) == pytest.approx(2 * 1.5 + 3 * 1.0 + 4.0)


def test_a_row_is_strict_json() -> None:
    row = {"step": 3, "loss": math.nan, "layers": {"0": {"load": [0.5, math.inf], "entropy": 0.1}}}
    line = json.dumps(_finite(row), allow_nan=False)
    assert json.loads(line) == {
        "step": 3,
        "loss": None,
        "layers": {"0": {"load": [0.5, None], "entropy": 0.1}},
        "not_finite": ["loss", "layers/0/load"],
    }
    assert _finite({"loss": 0.1234567890123}) == {"loss": 0.1234567890123}  # not a digit is lost


def test_flat_names() -> None:
    row = {"step": 1, "a": 0.5, "grad_norm": None, "layers": {"2": {"load": [1.0], "losses": {"z": 2}}}, "s": {"t": 3}}
    assert dict(flat(row)) == {"a": 0.5, "routing/2/losses/z": 2, "s/t": 3}


# What makes the host wait for a device, where there is one.
_SYNCS = ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "cpu", "numpy", "nonzero")
_OURS = ("metrics.py", "throughput.py", "progress.py", "watch.py", "hardware.py", "loggers.py")


def _counting(name: str, original: Callable[..., Any], found: list[tuple[str, str]]) -> Callable[..., Any]:
    """The method, which also notes whether it was called for us; what the loader does inside `timed` is its own."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame, ours = sys._getframe(1), []
        while frame is not None:
            if "/llava_moe/" in frame.f_code.co_filename:
                ours.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
            frame = frame.f_back  # type: ignore[assignment]
        if ours and ours[0][0] in _OURS and ours[0][1] != "timed":
            when = next((function for _, function in ours if function.startswith("on_")), "in a step")
            found.append((when, f"{ours[0][0]}: {name}"))
        return original(self, *args, **kwargs)

    return method


def test_nothing_is_read_from_the_device_between_two_lines(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_llava_json(tmp_path / "data", 8)
    made = make_trainer(moe_config(tmp_path, moe_checkpoint, data, max_steps=6, logging_steps=3, disable_tqdm=False))
    found: list[tuple[str, str]] = []
    for name in _SYNCS:
        monkeypatch.setattr(torch.Tensor, name, _counting(name, getattr(torch.Tensor, name), found))
    made.train()
    assert [what for when, what in found if when == "in a step"] == []
    assert {when for when, _ in found} == {"on_log"}  # there it does wait, so the count works
    assert len(read_metrics(tmp_path / "out")) == 2


def test_a_planted_wait_is_found(moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test before."""
    data = write_llava_json(tmp_path / "data", 4)
    made = make_trainer(moe_config(tmp_path, moe_checkpoint, data))
    found: list[tuple[str, str]] = []
    source = "def update(self, inputs):\n    stock(self, inputs)\n    self._sums.tolist()\n"
    space: dict[str, Any] = {"stock": StepCounts.update}
    exec(compile(source, str(Path(runner.__file__).with_name("throughput.py")), "exec"), space)
    monkeypatch.setattr(StepCounts, "update", space["update"])
    for name in _SYNCS:
        monkeypatch.setattr(torch.Tensor, name, _counting(name, getattr(torch.Tensor, name), found))
    made.train()
    assert ("in a step", "throughput.py: tolist") in found
