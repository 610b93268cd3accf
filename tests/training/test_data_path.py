"""Mixtures, indexes, packing and grouping through the whole training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from llava_moe.config import RecipeError
from llava_moe.data import record_check
from llava_moe.data.checking import Limits, check_mixture
from llava_moe.data.index import RecordIndex
from llava_moe.data.mixture import Mixture, SourceSpec
from llava_moe.data.processing import load_processor
from llava_moe.data.sampler import modality_grouped_order
from llava_moe.data.schema import DataError
from llava_moe.training import data as training_data_module
from llava_moe.training import runner
from llava_moe.training.data import plain_sources, prepare_index, training_data
from llava_moe.training.metrics import read_metrics
from llava_moe.training.sampler import EpochSampler
from tests.data.test_sources import rows, shard_members, write_parquet, write_tar
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, losses, make_config, make_trainer, step_gradients, unequal_data
from tests.training.test_resume import elsewhere, interrupt

MOE: dict[str, Any] = {
    "stage": {"learning_rates": MOE_PARTS},
    "balance": {"losses": {"switch": 0.1, "sequence": 0.1, "z": 0.01}},
}


def done(config: Any) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "done.json").read_text())


def test_a_packed_step_has_the_gradients_of_the_unpacked_one(moe_checkpoint: Path, tmp_path: Path) -> None:
    """All six samples in one step: in a batch of six rows, in packs, and in packs over two micro-batches."""
    data = unequal_data(tmp_path / "data", 6)
    train = {"max_steps": 1, "per_device_train_batch_size": 6}
    plain = step_gradients(make_config(tmp_path / "plain", moe_checkpoint, data, **MOE, train=train))
    config = make_config(
        tmp_path / "packed", moe_checkpoint, data, **MOE, train=train, data={"packing": True, "max_length": 128}
    )
    packs = make_trainer(config).train_dataset
    assert 1 < len(packs) < 6
    packed = step_gradients(config)
    assert plain.keys() == packed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_packed_run_reports_its_useful_tokens_and_resumes_exactly(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = unequal_data(tmp_path / "data", 9)
    train = {"max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 1}
    section = {"packing": True, "max_length": 160}
    whole = make_config(tmp_path, moe_checkpoint, data, **MOE, train=train, data=section)
    runner.train(whole)
    row = read_metrics(whole.output_dir)[-1]
    assert row["useful_tokens"] == pytest.approx(1)  # one row in a batch: no padding at all
    report = done(whole)["data"]
    assert report["used"] == 9
    assert report["packs"] < 9
    assert 0.5 < report["pack_fill"] <= 1
    stopped = elsewhere(whole, "stopped")
    interrupt(stopped, 3)
    runner.train(stopped)
    assert losses(stopped.output_dir) == losses(whole.output_dir)


def test_packing_counts_tokens_once_for_a_run(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index is made at the start; a run that goes on neither checks nor tokenises again, and packs alike."""
    data = unequal_data(tmp_path / "data", 9)
    section = {"packing": True, "max_length": 160}
    train = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1}
    config = make_config(tmp_path, moe_checkpoint, data, **MOE, train=train, data=section)
    assert plain_sources(config) is None
    made = make_trainer(config).train_dataset  # of the files themselves
    interrupt(config, 3)
    processor = load_processor(moe_checkpoint)
    index = prepare_index(config, processor)
    packed, _ = training_data(config, processor, index, None, "sdpa")
    assert packed.plan == made.plan
    monkeypatch.setattr(training_data_module, "check_mixture", lambda *_, **__: pytest.fail("checked again"))
    monkeypatch.setattr(record_check, "encode", lambda *_: pytest.fail("tokenised again"))
    runner.train(config)
    assert done(config)["data"]["packs"] == len(made)


def test_pictures_are_decoded_once_for_a_run(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_llava_json(tmp_path / "data", 6)
    config = make_config(tmp_path, moe_checkpoint, data, train={"max_steps": 3, "save_steps": 1}, **MOE)
    interrupt(config, 3)
    monkeypatch.setattr(training_data_module, "check_sources", lambda *_, **__: pytest.fail("decoded again"))
    runner.train(config)
    (data[1] / "2.png").unlink()  # whether they are there is looked at in every start
    again = elsewhere(config, "again")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"2\.png does not exist"):
        runner.train(again)


def test_without_check_images_an_index_opens_none(moe_checkpoint: Path, tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path / "data", 4)
    (images / "1.png").write_bytes(b"no image")
    section = {"packing": True, "check_images": False}
    config = make_config(tmp_path, moe_checkpoint, (path, images), data=section, **MOE)
    index = prepare_index(config, load_processor(moe_checkpoint))
    assert len(RecordIndex(index)) == 4
    checked = make_config(tmp_path / "b", moe_checkpoint, (path, images), data={"packing": True}, **MOE)
    with pytest.raises(DataError, match=r"1 problem\(s\) in 4 record\(s\):\n.*1\.png is not an image"):
        prepare_index(checked, load_processor(moe_checkpoint))


def test_a_model_that_mixes_packed_samples_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    made = make_trainer(make_config(tmp_path, dense_checkpoint, data, data={"packing": True}))
    stock = made.model.model.language_model.forward
    made.model.model.language_model.forward = lambda *args, **kwargs: stock(*args, **{**kwargs, "position_ids": None})
    with pytest.raises(ValueError, match="does not keep packed samples apart"):
        made.train()


def mixed_sources(folder: Path) -> list[dict[str, Any]]:
    path, images = write_llava_json(folder, 6, text_only_every=3)
    write_tar(folder / "s-0.tar", shard_members(2))
    parquet = write_parquet(folder / "d.parquet", rows(2))
    return [
        {"path": str(path), "image_folder": str(images), "limit": "first:4"},
        {"path": str(folder / "s-*.tar"), "image_folder": None, "weight": 2},
        {"path": str(parquet), "image_folder": None},
    ]


@pytest.mark.slow
def test_a_mixture_trains_through_an_index_that_is_made_once(moe_checkpoint: Path, tmp_path: Path) -> None:
    sources = mixed_sources(tmp_path)
    config = make_config(tmp_path, moe_checkpoint, ("", ""), data={"sources": sources})  # type: ignore[arg-type]
    assert plain_sources(config) is None
    interrupt(config, 1)
    index = Path(config.output_dir) / "data_index" / "index.json"
    written = index.stat().st_mtime_ns
    runner.train(config)
    assert index.stat().st_mtime_ns == written
    assert done(config)["data"] == {"records": 10, "used": 10, "skipped_overlong": 0, "truncated": 0}
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"sources": sources}))
    section = {"sources": [], "mixture": str(mixture)}
    again = make_config(tmp_path / "again", moe_checkpoint, ("", ""), data=section)  # type: ignore[arg-type]
    runner.train(again)
    assert losses(again.output_dir) == losses(config.output_dir)


def test_broken_records_stop_a_run_or_are_counted(moe_checkpoint: Path, tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path / "data", 6)
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"no image")
    refused = make_config(tmp_path / "refused", moe_checkpoint, (path, images))
    with pytest.raises(DataError, match=r"(?s)2 problem.*1\.png does not exist.*2\.png is not an image"):
        runner.train(refused)
    limited = [{"path": str(path), "image_folder": str(images), "limit": "first:3"}]
    refused = make_config(tmp_path / "limited", moe_checkpoint, (path, images), data={"sources": limited})
    with pytest.raises(DataError, match=r"(?s)2 problem.*1\.png does not exist.*2\.png is not an image"):
        runner.train(refused)
    skipping = make_config(tmp_path / "skipping", moe_checkpoint, (path, images), data={"on_problem": "skip"})
    runner.train(skipping)
    report = done(skipping)["data"]
    assert (report["records"], report["used"]) == (6, 4)
    assert (report["left_out_missing_image"], report["left_out_corrupt_image"]) == (1, 1)


def test_a_named_index_is_used(moe_checkpoint: Path, tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path / "data", 5)
    mixture = Mixture((SourceSpec(str(path), str(images)),))
    processor = load_processor(moe_checkpoint)
    check_mixture(mixture, processor=processor, limits=Limits(max_length=128), index=tmp_path / "index")
    section = {"sources": [], "index": str(tmp_path / "index")}
    config = make_config(tmp_path / "a", moe_checkpoint, (path, images), data=section)
    runner.train(config)
    plain = make_config(tmp_path / "b", moe_checkpoint, (path, images))
    runner.train(plain)
    assert losses(config.output_dir) == losses(plain.output_dir)


def test_features_are_cached_for_an_index_of_files(dense_checkpoint: Path, tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path / "data", 4)
    sources = [{"path": str(path), "image_folder": str(images), "limit": "all", "weight": 2}]
    section = {"sources": sources, "feature_cache": str(tmp_path / "features"), "packing": True}
    config = make_config(tmp_path, dense_checkpoint, (path, images), data=section)
    runner.train(config)
    assert done(config)["data"]["used"] == 8
    sources = [{"path": str(write_tar(tmp_path / "s.tar", shard_members(2))), "image_folder": None}]
    config = make_config(tmp_path / "tar", dense_checkpoint, (path, images), data={**section, "sources": sources})
    with pytest.raises(ValueError, match="feature_cache needs images as files"):
        runner.train(config)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sources": []}, "data.sources is empty"),
        ({"index": "x"}, "data.sources and data.index both name the training data"),
        ({"mixture": "x.yaml"}, "data.sources and data.mixture both name"),
        ({"on_problem": "ignore"}, "data.on_problem=ignore: must be one of refuse, skip"),
        ({"group_by_modality": True}, "needs train.train_sampling_strategy: group_by_length"),
    ],
)
def test_contradictions_are_refused(data: dict[str, Any], said: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, dense_checkpoint, write_llava_json(tmp_path / "data", 2), data=data)
    with pytest.raises(RecipeError, match=said):
        runner.train(config)


def test_groups_by_modality_do_not_mix(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 23, text_only_every=3)
    train = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}
    config = make_config(tmp_path, moe_checkpoint, data, data={"group_by_modality": True}, train=train)
    made = make_trainer(config)
    order = list(made._get_train_sampler())
    assert sorted(order) == list(range(23))
    kinds = ["pixel_values" in made.train_dataset[i] for i in order]
    steps = [kinds[start : start + 4] for start in range(0, 23, 4)]
    assert sum(len(set(step)) > 1 for step in steps[:-2]) == 0
    assert len({step[0] for step in steps[:4]}) == 2


def test_modality_grouping_keeps_lengths_together() -> None:
    generator = np.random.default_rng(0)
    lengths, has_image = generator.integers(1, 1000, 400).tolist(), (generator.random(400) < 0.7).tolist()
    order = modality_grouped_order(lengths, has_image, 8, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(400))
    batches = [order[start : start + 8] for start in range(0, 400, 8)]
    pure = [batch for batch in batches if len({has_image[i] for i in batch}) == 1]
    assert len(pure) >= len(batches) - 2
    useful = sum(sum(lengths[i] for i in batch) for batch in pure) / sum(
        8 * max(lengths[i] for i in batch) for batch in pure
    )
    assert useful > 0.85
    assert order != modality_grouped_order(lengths, has_image, 8, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("by_modality", [False, True])
def test_groups_are_those_of_a_step_over_ranks_and_accumulation(by_modality: bool) -> None:
    """Two ranks, two micro-batches of three samples: what they meet in a step is one group."""
    world, accumulation, batch = 2, 2, 3
    group = world * accumulation * batch
    generator = np.random.default_rng(0)
    lengths, has_image = generator.integers(1, 1000, 20 * group).tolist(), (generator.random(20 * group) < 0.6).tolist()
    shards = []
    for rank in range(world):
        sampler = EpochSampler(lengths, 0, group, has_image if by_modality else None)
        loader = DataLoader(range(20 * group), batch_size=batch, sampler=sampler)  # type: ignore[arg-type]
        shard = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False, rng_types=[])
        shards.append([micro.tolist() for micro in shard])
    steps = [
        [i for shard in shards for micro in shard[start : start + accumulation] for i in micro]
        for start in range(0, len(shards[0]), accumulation)
    ]
    assert sorted(i for step in steps for i in step) == list(range(20 * group))
    spread = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in steps]
    assert sum(spread) / len(spread) < 300  # of 1000 without grouping
    mixed = sum(len({has_image[i] for i in step}) > 1 for step in steps)
    assert mixed <= 2 if by_modality else mixed > 15
