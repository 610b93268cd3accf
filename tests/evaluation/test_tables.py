"""Tables of scores in three formats, the list of tasks, and the progress line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from llava_moe.evaluation import EvaluationError, progress, tables
from llava_moe.evaluation.listing import listing
from llava_moe.evaluation.suites import SUITES


def headline(metric: str, share: float, of: float, interval: list[float] | None) -> dict[str, Any]:
    return {"metric": metric, "value": share * of, "of": of, "share": share, "interval": interval}


def results(name: str, **tasks: Any) -> dict[str, Any]:
    return {
        "checkpoint": f"runs/{name}/model",
        "checkpoint_sha256": "0123456789abcdef",
        "template": "v1",
        "arguments": {"dtype": "float32", "batch_size": 8, "blank_images": False, "limit": None},
        "versions": {"torch": "2.13.0"},
        "seeds": {"random_seed": 0, "torch_random_seed": 1234},
        "hardware": "a CPU",
        "seconds": 12.3,
        "judge": None,
        "tasks": tasks,
        "families": {},
        "failed": {},
    }


GQA = {"n": 10, "official": {"exact_match": 0.9}, "headline": headline("exact_match", 0.9, 1.0, [0.596, 0.982])}
MME = {
    "n": 4,
    "official": {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0},
    "headline": headline("mme_perception_score+mme_cognition_score", 1800 / 2800, 2800.0, None),
}
OTHER = {"n": 7, "official": {"anls": 0.51234, "rouge": 0.2}}
RUNS = {"moe": results("moe", gqa=GQA, mme=MME, other=OTHER), "dense": results("dense", gqa={**GQA, "n": 9})}


def test_markdown_has_a_column_for_each_checkpoint() -> None:
    RUNS["dense"]["failed"] = {"mme": "RuntimeError: no memory"}
    text = tables.markdown(RUNS)
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    assert rows[0] == "| task | metric | n | moe | dense |"
    assert rows[2] == "| gqa | exact_match | 9 / 10 | 90.0 [59.6, 98.2] | 90.0 [59.6, 98.2] |"
    assert rows[3] == "| mme | mme_perception_score + mme_cognition_score (of 2800) | 4 | 1800.0 | - |"
    assert rows[4] == "| other | - | 7 | anls 0.5123; rouge 0.2 | - |"
    assert "- dense: mme failed: RuntimeError: no memory" in text
    assert "- mme: perception (of 2000) and cognition (of 800) together" in text
    assert "moe: runs/moe/model, sha256 0123456789ab, template v1; float32, batch size 8, seeds [0, 1234]" in text


def test_csv_and_json_hold_every_metric(tmp_path: Path) -> None:
    assert tables.write(tmp_path, RUNS) == tmp_path / "scores.md"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert [(row["checkpoint"], row["task"], row["metric"], row["headline"]) for row in rows] == [
        ("moe", "gqa", "exact_match", "True"),
        ("moe", "mme", "mme_perception_score+mme_cognition_score", "True"),
        ("moe", "mme", "mme_perception_score", "False"),
        ("moe", "mme", "mme_cognition_score", "False"),
        ("moe", "other", "anls", "False"),
        ("moe", "other", "rouge", "False"),
        ("dense", "gqa", "exact_match", "True"),
    ]
    assert (rows[0]["value"], rows[0]["percent"], rows[0]["low"], rows[0]["high"]) == ("0.9", "90.0", "59.6", "98.2")
    assert (rows[2]["value"], rows[2]["percent"], rows[2]["low"]) == ("1500.0", "", "")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert len(content["scores"]) == 7
    assert content["runs"]["dense"]["checkpoint"] == "runs/dense/model"


def test_list_names_suites_tasks_judges_and_limits(tmp_path: Path) -> None:
    text = listing([], None)
    assert all(f"  {name}: " in text for name in SUITES.names())
    lines = {line.split()[0]: line for line in text.split("\n") if line.startswith("  ") and line.split()}
    assert "lmms-lab-encoder/MME" in lines["mme"]
    assert "of 2800" in lines["mme"]
    assert "a limit must be a multiple of 2" in lines["mme"]
    assert "  judge  " in lines["mmvet"]
    assert "  judge  " not in lines["gqa"]
    assert "records in --data" in lines["local_gqa"]
    (tmp_path / "lmms-lab-encoder" / "GQA").mkdir(parents=True)
    lines = {line.split()[0]: line.split() for line in listing(["gqa", "pope"], tmp_path).split("\n") if line.split()}
    assert "yes" in lines["gqa"]
    assert "no" in lines["pope"]
    with pytest.raises(EvaluationError, match="not 'gqaa'; did you mean 'gqa'"):
        listing(["gqaa"], None)


class _Stream(io.StringIO):
    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


def test_a_log_gets_plain_lines_with_the_time_left_and_a_terminal_one_line() -> None:
    now = [0.0]
    log, terminal = _Stream(False), _Stream(True)
    for stream in (log, terminal):
        now[0] = 0.0
        with progress.Meter(100, "answers", "gqa (1 of 2)", stream, clock=lambda: now[0]) as meter:
            for _ in range(50):
                now[0] += 0.5
                meter.update(2)
    assert log.getvalue().split("\n") == [
        "gqa (1 of 2): 40/100 answers (40%, 4/s, 0:15 left)",
        "gqa (1 of 2): 80/100 answers (80%, 4/s, 0:05 left)",
        "gqa (1 of 2): 100 answers in 0:25",
        "",
    ]
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().count(progress.CLEAR) == 51
    with progress.Meter(3, "answers", "quiet", None) as meter:
        meter.update(3)
    assert (progress.as_time(59.6), progress.as_time(3723)) == ("1:00", "1:02:03")
