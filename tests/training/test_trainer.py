"""Odd batches, the order of the samples, and what the routing shows in the metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from llava_moe.moe import Routing, RoutingContext, RoutingScope
from llava_moe.training import runner
from llava_moe.training.metrics import read_metrics
from llava_moe.training.sampler import EpochSampler
from llava_moe.training.telemetry import RoutingMeter
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.tiny import write_llava_json
from tests.tiny_model import TINY_MOE
from tests.training.runs import MOE_PARTS, losses, make_config, make_trainer

BALANCE = {"losses": {"switch": 0.1, "z": 0.01}}


def moe_trainer(folder: Path, checkpoint: Path, num_records: int = 4, **train: Any) -> LlavaMoeTrainer:
    data = write_llava_json(folder / "data", num_records)
    stage = {"learning_rates": MOE_PARTS}
    return make_trainer(make_config(folder, checkpoint, data, stage=stage, balance=BALANCE, train=train))


def test_text_only_batches_train(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4, text_only_every=1)
    config = make_config(tmp_path, moe_checkpoint, data, stage={"learning_rates": MOE_PARTS}, balance=BALANCE)
    made = make_trainer(config)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    for name, parameter in made.model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if "multi_modal_projector" in name:  # only the dummy picture went through it
            assert torch.equal(parameter, before[name]), name
    assert all(math.isfinite(loss) for loss in losses(config.output_dir).values())


class _WithoutAnswers(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.lengths = inner.lengths

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.inner[index]
        return {**item, "labels": torch.full_like(item["labels"], -100)}


def test_a_step_without_any_answer_token_trains_without_nan(moe_checkpoint: Path, tmp_path: Path) -> None:
    made = moe_trainer(tmp_path, moe_checkpoint, logging_nan_inf_filter=False)
    made.train_dataset = _WithoutAnswers(made.train_dataset)
    made.train()
    for name, parameter in made.model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    rows = read_metrics(tmp_path / "out")
    assert [row["cross_entropy"] for row in rows] == [0.0, 0.0]
    assert all(row["loss"] > 0 for row in rows)  # the balance losses are still there


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    found = []
    for bf16 in (False, True):
        config = make_config(
            tmp_path / str(bf16), moe_checkpoint, data, stage={"learning_rates": MOE_PARTS}, train={"bf16": bf16}
        )
        runner.train(config)
        found.append(losses(config.output_dir))
    assert found[0] == pytest.approx(found[1], rel=2e-2)
    assert found[0] != found[1]


def test_group_by_length_decodes_no_image(moe_checkpoint: Path, tmp_path: Path) -> None:
    made = moe_trainer(tmp_path, moe_checkpoint, train_sampling_strategy="group_by_length")

    class Undecodable:
        lengths = tuple((7 * i) % 64 for i in range(64))

        def __getitem__(self, index: int) -> dict[str, Any]:
            raise AssertionError("an image was decoded to learn a length")

    order = list(made._get_train_sampler(Undecodable()))
    assert sorted(order) == list(range(64))
    pairs = [[Undecodable.lengths[i] for i in order[start : start + 2]] for start in range(0, 64, 2)]
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 8  # 21 for random pairs of 0..63


@pytest.mark.parametrize("group_size", [0, 2])
def test_the_order_is_a_function_of_seed_and_epoch(group_size: int) -> None:
    lengths = [(5 * i) % 13 for i in range(13)]
    one, same, other = (EpochSampler(lengths, seed, group_size) for seed in (3, 3, 4))
    first = list(one)
    assert list(one) == first == list(same) != list(other)
    same.set_epoch(1)
    assert list(same) != first
    assert sorted(same) == list(range(13))


def test_data_seed_zero_is_a_seed(moe_checkpoint: Path, tmp_path: Path) -> None:
    made = moe_trainer(tmp_path, moe_checkpoint, data_seed=0)
    made.args.seed = 5
    assert made._get_train_sampler().seed == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_resume_in_the_middle_of_a_later_epoch(rank: int) -> None:
    """accelerate does not pass the epoch on through both a shard and a skipped start; our callback does."""
    sampler = EpochSampler([1] * 12, seed=0)
    loader = DataLoader(list(range(12)), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False, rng_types=[])
    shard.set_epoch(1)
    whole = [batch.tolist() for batch in shard]
    resumed = skip_first_batches(shard, 2)
    sampler.set_epoch(0)
    resumed.set_epoch(1)
    sampler.set_epoch(1)  # what EpochCallback does
    assert len(whole) == 3
    assert [batch.tolist() for batch in resumed] == whole[2:]


def test_the_callback_tells_the_sampler_the_epoch(moe_checkpoint: Path, tmp_path: Path) -> None:
    made = moe_trainer(tmp_path, moe_checkpoint, max_steps=5)  # two steps in an epoch
    epochs = []
    original = EpochSampler.__iter__

    def spy(self: EpochSampler) -> Any:
        epochs.append(self.epoch)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochSampler, "__iter__", spy)
        made.train()
    assert epochs == [0, 1, 2]


def test_rows_of_metrics(moe_checkpoint: Path, tmp_path: Path) -> None:
    made = moe_trainer(tmp_path, moe_checkpoint, num_records=8, max_steps=4, logging_steps=2)
    made.train()
    rows = read_metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert {"loss", "grad_norm", "learning_rate", "seconds_per_step", "cross_entropy", "switch", "z"} <= row.keys()
        assert row["seconds_per_step"] > 0
        assert set(row["layers"]) == {"0", "2"}
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.1 * row["switch"] + 0.01 * row["z"], rel=1e-4)
        for layer in row["layers"].values():
            assert len(layer["load"]) == TINY_MOE["decoder"]["num_experts"]
            assert sum(layer["load"]) == pytest.approx(1, abs=1e-4)
            assert layer["max_violation"] == pytest.approx(max(layer["load"]) * 4 - 1, abs=1e-3)
            assert 0 < layer["entropy"] <= math.log(4) + 1e-5


def test_the_largest_violation_of_the_worked_example() -> None:
    """Loads of 10, 20, 30 and 40: the fullest expert has 1.6 times the mean."""
    index = torch.arange(4).repeat_interleave(torch.tensor([10, 20, 30, 40])).unsqueeze(1)
    probs = torch.full((100, 4), 0.25)
    routing, site = Routing(probs, probs, index, torch.ones(100, 1)), ("decoder", 0)
    scope, meter = RoutingScope(), RoutingMeter()
    context = RoutingContext.trivial(100)
    scope.record(site, routing, context)
    meter.update({}, {site: routing}, scope)
    row = meter.flush()["layers"]["0"]
    assert row["load"] == [0.1, 0.2, 0.3, 0.4]
    assert row["max_violation"] == pytest.approx(0.6, abs=1e-6)
    assert row["entropy"] == pytest.approx(math.log(4), abs=1e-5)


def test_a_dense_model_has_metrics_without_layers(dense_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, dense_checkpoint, write_llava_json(tmp_path / "data", 4))
    make_trainer(config).train()
    rows = read_metrics(config.output_dir)
    assert len(rows) == 2
    assert all("layers" not in row and row["cross_entropy"] == pytest.approx(row["loss"]) for row in rows)
