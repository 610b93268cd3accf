"""What `scripts/bench/training.py` makes of its measurements; the measuring itself takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_moe.config import load_recipe
from scripts.bench import training as bench

FACTS = {"cpu": "a CPU", "cores": 2, "torch": "2", "deepspeed": "0", "rounds": 2, "steps": 8}


def rounds(*seconds: float, tokens: float = 100.0) -> list[dict[str, float]]:
    return [{"seconds": value, "tokens": tokens} for value in seconds]


def test_ratios_are_those_of_each_round() -> None:
    """The machine is twice as slow in the second round, which changes no ratio."""
    found = {bench.PLAIN: rounds(1, 2), "ZeRO-2 x 2": rounds(1.5, 3.0), "DDP x 2, packing": rounds(2, 4, tokens=400.0)}
    rows = {row["case"]: row for row in bench.summarise(found)}
    assert rows[bench.PLAIN]["ratio"] == 1
    assert [rows["ZeRO-2 x 2"][key] for key in ("ratio", "lowest", "highest")] == [1.5, 1.5, 1.5]
    assert rows["DDP x 2, packing"]["ratio"] == 0.5  # twice the time for four times the tokens
    table = bench.as_table(list(rows.values()), FACTS)
    assert "| ZeRO-2 x 2 | 2.250 | 1.50 (1.50 to 1.50) |" in table
    assert "| DDP x 2, packing | 3.000 | 0.50 (0.50 to 0.50) a token |" in table
    assert "a CPU, 2 cores" in table


def test_the_documentation_has_a_place_for_the_table() -> None:
    assert bench._MARK.search((Path(__file__).parents[2] / "docs" / "training.md").read_text())


def test_every_case_is_a_recipe_with_the_same_samples_in_a_step(tmp_path: Path) -> None:
    recipes = bench.write_cases(tmp_path, steps=2, width=32)
    assert recipes.keys() == bench.CASES.keys()
    for name, (ranks, _) in bench.CASES.items():
        config = load_recipe(recipes[name])
        batch = config.train["per_device_train_batch_size"] * config.train.get("gradient_accumulation_steps", 1)
        assert config.data.packing or ranks * batch == 8
        assert config.deepspeed is None or Path(config.deepspeed).name.startswith("zero")
    assert pytest.approx(1) == bench.summarise({bench.PLAIN: rounds(1.0)})[0]["ratio"]
