"""Whole runs on small files in upstream's layout: how tests start one, and what they look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.cli import main
from llava_moe.data.check import check_sources
from tests.data_prep.upstream import mix_files, pretrain_files

FILES = {**pretrain_files(), **mix_files()}


def run(manifest: Path, data: Path, *arguments: str, mixture: str = "llava_mix665k", dropped: str = "0.5") -> int:
    places = ["--manifest", str(manifest), "--data", str(data), "--workers", "1", "--max-dropped", dropped]
    return main([mixture, *places, *arguments])


def report_of(data: Path, path: str = "LLaVA-Instruct/llava_v1_5_mix665k.report.json") -> dict[str, Any]:
    return json.loads((data / path).read_text())


def trained_on(data: Path) -> int:
    """What training would read: every record and picture must be fine."""
    source = (data / "LLaVA-Instruct/llava_v1_5_mix665k.json", data / "LLaVA-Instruct")
    found = check_sources([source], num_workers=1)
    assert found.problems == []
    return found.num_records
