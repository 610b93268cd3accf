"""What a dry run says of packed rows and of the memory of the loss."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llava_moe.config import load_recipe
from llava_moe.data import index as record_index
from llava_moe.data.packing import plan_packs
from llava_moe.data.schema import DataError
from llava_moe.training import packing_plan
from llava_moe.training.dry_run import describe, outlook

REPO = Path(__file__).parents[2]
RECIPE = "scripts/recipes/llava_1_5_7b/sft.yaml"
LENGTHS = np.asarray([700, 900, 1100, 1300, 600, 2048, 40] * 100, np.int32)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.delenv("NPROC", raising=False)


def said(*overrides: str) -> str:
    return describe(RECIPE, load_recipe(RECIPE, overrides))


def test_unpacked_samples_have_at_most_their_length() -> None:
    text = said()
    assert "# samples per step and device: 16" in text
    assert "# tokens per step: at most 262,144 (128 samples of up to 2,048 tokens)" in text
    assert "with a sample of full length everywhere" in text


def test_packed_rows_are_full() -> None:
    text = said("data.packing=true", "train.per_device_train_batch_size=8")
    assert "# rows per step and device: 8, each of as many samples as fit" in text
    assert "# tokens per step: about 131,072 (64 rows of 2,048 tokens)" in text
    assert "# useful share of the rows: unknown here, the recipe names no data.index" in text
    assert "with a full row everywhere" in text


def test_with_an_index_the_rows_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run would plan them: same lengths, same length of a row, same seed."""

    class Index:
        def __init__(self, folder: Path) -> None:
            assert Path(folder) == tmp_path
            self.lengths = LENGTHS

    monkeypatch.setattr(packing_plan, "RecordIndex", Index)
    packed = ("data.packing=true", f"data.index={tmp_path}", "data.sources=[]", "train.per_device_train_batch_size=8")
    plan = plan_packs(LENGTHS, 2048)
    text = said(*packed)
    share = re.search(r"^# useful share of the rows: ([\d.]+) %; 700 samples make (\d+) rows, (\d+) steps", text, re.M)
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * plan.share, abs=0.05)
    assert (int(share[2]), int(share[3])) == (len(plan.packs), -(-len(plan.packs) // 64))
    tokens = re.search(r"^# tokens per step: about ([\d,]+) \(64 rows of 2,048 places\)", text, re.M)
    assert tokens is not None
    assert int(tokens[1].replace(",", "")) == round(64 * 2048 * plan.share)
    assert f"as fit: {700 / len(plan.packs):.2f} in the mean" in text


def test_an_index_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    text = said("data.packing=true", f"data.index={tmp_path / 'none'}", "data.sources=[]")
    assert f"unknown here, {tmp_path / 'none'} is not there yet" in text
    assert f"unknown here, {tmp_path} is not a readable index" in said(
        "data.packing=true", f"data.index={tmp_path}", "data.sources=[]"
    )
    assert record_index.DataError is DataError


def test_a_row_holds_as_many_pictures_as_fit() -> None:
    """With 576 tokens for a picture, 2,048 tokens hold three of them and no fourth."""
    alone = outlook(RECIPE, load_recipe(RECIPE))
    packed = outlook(RECIPE, load_recipe(RECIPE, ["data.packing=true"]))
    assert (alone.setup.images, packed.setup.images) == (1, 3)
    assert alone.memory is not None
    assert packed.memory is not None
    assert packed.memory.activations >= alone.memory.activations


def test_a_fused_loss_takes_the_logits_out_of_the_memory() -> None:
    plain = outlook(RECIPE, load_recipe(RECIPE))
    fused = outlook(RECIPE, load_recipe(RECIPE, ["speed.fused_loss=chunked"]))
    assert plain.memory is not None
    assert fused.memory is not None
    assert fused.memory.logits == plain.fused_logits == fused.fused_logits
    assert fused.memory.logits < plain.memory.logits / 4
    assert f"# logits would take {plain.fused_logits / 2**30:.2f} GiB with speed.fused_loss" in said()
    assert "# logits would take" not in said("speed.fused_loss=chunked")


@pytest.mark.parametrize(("stage", "zero"), [("2", "zero2_offload"), ("3", "zero3_offload")])
def test_offload_moves_memory_to_the_host(stage: str, zero: str) -> None:
    near, far = (
        outlook(RECIPE, load_recipe(RECIPE, [f"deepspeed=scripts/deepspeed/{name}.json"]))
        for name in (f"zero{stage}", zero)
    )
    assert near.memory is not None
    assert far.memory is not None
    assert near.memory.host == 0
    assert far.memory.host >= near.memory.optimiser
    assert far.memory.total < near.memory.total
    assert (far.memory.optimiser, far.memory.gradients) == (0, 0)
    assert (far.memory.weights == 0) == (stage == "3")
    assert re.search(r"; host [\d.]+\)", said(f"deepspeed=scripts/deepspeed/{zero}.json"))
