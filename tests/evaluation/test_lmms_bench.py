"""Our adapter beside lmms-eval's own `llava_hf`: the same weights, the same prompts, the same answers."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from scripts.bench import eval as bench
from tests.evaluation import fakes
from tests.evaluation.trained import checkpoint
from tests.tiny_families import write_family_checkpoint


def test_all_batch_sizes_say_what_the_stock_adapter_says(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        checkpoint=checkpoint("llava", "dense"),
        data=fakes.write_records(tmp_path),
        task="local_gqa",
        limit=9,
        rounds=1,
        batch_sizes=[1, 4],
    )
    found = bench.measure(arguments)
    assert list(found["rows"]) == ["llava_hf", "ours, batch 1", "ours, batch 4", "ours, batch 4, pictures not kept"]
    for row in found["rows"].values():
        assert row["questions"] == row["same_as_llava_hf"] == row["same_as_first_batch_size"] == 9
    assert found["rows"]["ours, batch 4"]["batches"] == 3
    assert found["rows"]["llava_hf"]["times_llava_hf"] == 1
    assert found["rows"]["llava_hf"]["distinct_answers"] > 2
    assert found["hardware"]["cpu"] in bench.table(found)


def test_ratios_are_those_of_the_fastest_rounds() -> None:
    said = {name: {0: "red", 1: word} for name, word in (("llava_hf", "a"), ("ours, batch 1", "b"), ("x", "b"))}
    seconds = {"llava_hf": [9.0, 8.0], "ours, batch 1": [8.0, 9.0], "x": [5.0, 2.0]}
    rows = bench.summary(seconds, said, {name: {} for name in said}, "ours, batch 1")
    assert [row["times_llava_hf"] for row in rows.values()] == [1.0, 1.0, 4.0]
    assert [row["questions_per_second"] for row in rows.values()] == [0.25, 0.25, 1.0]
    assert [row["same_as_llava_hf"] for row in rows.values()] == [2, 1, 1]
    assert [row["same_as_first_batch_size"] for row in rows.values()] == [1, 2, 2]


def test_what_has_no_stock_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give a dense checkpoint of ours"):
        bench.write_stock(checkpoint("llava", "moe"), tmp_path / "stock")
    tiled = write_family_checkpoint(tmp_path / "tiled", "llava_next")
    with pytest.raises(SystemExit, match="without tiles"):
        bench.write_stock(tiled, tmp_path / "stock")
