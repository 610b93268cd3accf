"""The script, from another folder, with the real client of the Hub against a Hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_moe.evaluation import mirror
from tests.data_prep.fake_hub import FakeHub
from tests.data_prep.hub_server import serving_hub
from tests.evaluation.imitations import mme, textvqa
from tests.evaluation.imitations_files import write

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_benchmarks.sh"
MME, TEXTVQA = "lmms-lab-encoder/MME", "lmms-lab-encoder/textvqa"


def run(folder: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=170)


@pytest.mark.slow
def test_the_real_client_fetches_what_is_read(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "hub")
    for imitation in (mme(), textvqa()):
        write(hub.root, imitation)
    (tmp_path / "known.yaml").write_text("{}\n")
    with serving_hub(hub) as endpoint:
        done = run(
            tmp_path, endpoint, "mme", "textvqa_val", "gqa", "--mirror", "here", "--known", str(tmp_path / "known.yaml")
        )
    assert done.returncode == 1, done.stderr
    assert "error: lmms-lab-encoder/GQA: the Hub has no such public data set" in done.stderr
    assert "error: 1 of 3 data sets are not ready: lmms-lab-encoder/GQA" in done.stderr
    assert [one.rows for one in mirror.check(tmp_path / "here", ["mme", "textvqa_val"])] == [8, 3]
    assert sorted(hub.fetched) == [
        f"{MME}/README.md",
        f"{MME}/data/test-00000-of-00001.parquet",
        f"{TEXTVQA}/README.md",
        f"{TEXTVQA}/data/validation-00000-of-00001.parquet",
    ]
    record = mirror.read_manifest(tmp_path / "here")[MME]
    assert record.revision == hub.commit(MME)
    assert not (tmp_path / "home" / "hub").exists()  # nothing is kept twice


def test_without_arguments_it_says_how_it_is_called() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: usage: bash scripts/prepare_benchmarks.sh")
