"""How tests of benchmark preparation start a run, and the names of what they prepare."""

from __future__ import annotations

from pathlib import Path

from data_prep.benchmarks import cli

GQA, MME, MMBENCH, POPE, TEXTVQA = (f"lmms-lab-encoder/{name}" for name in ("GQA", "MME", "MMBench", "POPE", "textvqa"))
MME_FILE = "data/test-00000-of-00001.parquet"


def write_known(path: Path) -> Path:
    """A list of facts without pinned commits: those of the imitations are others."""
    splits = "{default/test: {rows: 8, size: 5000}}"
    path.write_text(f"{GQA}: {{licence: MIT}}\n{MME}: {{licence: mine, splits: {splits}}}\n")
    return path


def run(folder: Path, known: Path, *arguments: str) -> int:
    return cli.main([*arguments, "--mirror", str(folder), "--known", str(known)])
