"""Losses and gradient norms of every kind of stage are those that are committed; see `tests/training/golden.py`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.training.golden import FILE, STEPS, Numbers, run_chain

TOLERANCE = 1e-5  # relative; on the CPU that made the numbers they are equal to the last bit
STAGES = (
    "pretrain",
    "sft",
    "moe_experts_and_routers",
    "moe_all",
    "prefinetune",
    "moe_tower_and_projector",
    "anyres",
    "video",
)


def moved(found: Numbers, golden: Numbers) -> list[str]:
    """What differs, for people: stage, quantity, step, both numbers."""
    lines = []
    for stage, wanted in golden.items():
        for key, values in wanted.items():
            for step, (value, other) in enumerate(zip(found[stage][key], values, strict=True), start=1):
                if abs(value - other) > TOLERANCE * abs(other):
                    lines.append(f"{stage}: {key} of step {step} is {value!r}, golden {other!r}")
    return lines


@pytest.fixture(scope="module")
def golden() -> Numbers:
    found: Numbers = json.loads(FILE.read_text())["stages"]
    return found


def test_every_stage_trains_as_it_did(golden: Numbers, tmp_path: Path) -> None:
    found = run_chain(tmp_path)
    assert tuple(found) == tuple(golden) == STAGES
    assert moved(found, golden) == []


def test_the_numbers_say_something(golden: Numbers) -> None:
    """Each stage has steps of its own, and learns; no two have the same numbers."""
    for stage, numbers in golden.items():
        assert set(numbers) == {"loss", "grad_norm"}
        for values in numbers.values():
            assert len(values) == len(set(values)) == STEPS, stage
        assert min(numbers["grad_norm"]) > 1e-3, stage
    assert len({tuple(numbers["loss"]) for numbers in golden.values()}) == len(STAGES)


def test_a_small_change_is_seen(golden: Numbers) -> None:
    changed = copy.deepcopy(golden)
    changed["video"]["grad_norm"][4] *= 1 + 2e-5
    changed["pretrain"]["loss"][0] *= 1 + 0.5e-5
    assert [line.split(":")[0] for line in moved(changed, golden)] == ["video"]
