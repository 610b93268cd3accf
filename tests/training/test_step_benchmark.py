"""The benchmark of training steps runs on a CPU too, on a tiny model, and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import packages, training_step
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, write_recipe

SMALL = ["--device", "cpu", "--rows", "2", "--length", "64", "--samples", "6", "--steps", "2", "--warmup", "0"]


@pytest.mark.slow
def test_cases_are_measured_or_said_to_be_skipped(
    moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"learning_rates": MOE_PARTS}
    data = write_llava_json(tmp_path / "data", 2)
    recipe = write_recipe(tmp_path, moe_checkpoint, data, stage=stage, balance={"losses": {"switch": 0.01}})
    cases = "plain,packed,packed+chunked,plain+checkpoint,packed+flash,packed+liger"
    rows = training_step.main([str(recipe), *SMALL, "--cases", cases, "--json", str(tmp_path / "found.json")])
    assert [row["case"] for row in rows] == ["plain", "packed", "packed+chunked", "plain+checkpoint"]
    assert all(row["tokens_per_second"] > 0 and row["tflops"] > 0 and row["mfu"] is None for row in rows)
    assert all(0 < row["useful_share"] <= 1 for row in rows)
    said = capsys.readouterr().out
    assert "skipped packed+flash: no FlashAttention here: pip install flash-attn" in said
    assert "skipped packed+liger: speed.fused_loss=liger needs a GPU" in said
    kept = json.loads((tmp_path / "found.json").read_text())
    assert set(kept["skipped"]) == {"packed+flash", "packed+liger"}
    assert len(kept["rows_measured"]) == 4
    with pytest.raises(SystemExit, match=r"case packed\+flush: flush is unknown"):
        training_step.main([str(recipe), *SMALL, "--cases", "packed+flush"])


def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert packages.main() == 2
    assert "error: missing: a CUDA device" in capsys.readouterr().err
