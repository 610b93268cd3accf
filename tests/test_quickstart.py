"""The whole path on random weights, as a newcomer runs it; and again, which must change nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_moe.serve.gradio_app import find_examples

REPO = Path(__file__).parents[1]


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "QUICKSTART": "smoke",
        "QUICKSTART_DIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # from another directory, as promised
    return subprocess.run(
        ["bash", str(REPO / "scripts/quickstart.sh")], cwd=folder.parent, env=env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_smoke_profile_ends_with_scores_and_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = quickstart(folder)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    assert {"tasks", "seconds", "upcycle", "versions"} <= set(results)
    assert next(iter(results["tasks"])) == "shapes_open"
    assert len(results["tasks"]) >= 6
    for row in results["tasks"].values():
        assert {"n", "metric", "moe", "dense", "blind", "majority", "moe_ci", "dense_ci"} <= set(row)
        assert row["n"] >= 8
    assert results["upcycle"]["max_abs_logit_error"] <= 1e-5
    assert {"pretrain", "sft", "moe", "control"} <= set(results["seconds"])
    page = (folder / "report.html").read_text()
    assert "random weights" in page  # the fallbacks are named
    assert "dense control" in page
    assert not re.findall(r"""(?:src|href)=["']https?:|url\(["']?https?:|@import""", page)  # nothing from the web
    assert len(find_examples(folder / "examples")) >= 6  # what the printed demo command shows

    weights = {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}
    assert len(weights) >= 5
    second = quickstart(folder)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stdout.count("is finished already") == 4
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")} == weights
