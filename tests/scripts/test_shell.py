"""The shell scripts: syntax, size, dry runs, and one clear line for what a newcomer gets wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPTS = sorted([*(REPO / "scripts").rglob("*.sh"), REPO / ".ci/run"])
TRAIN = sorted((REPO / "scripts/train").glob("*.sh"))


def run(*command: str, cwd: Path = REPO, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", **env}, capture_output=True, text=True
    )


def test_found_them_all() -> None:
    assert len(SCRIPTS) >= 10
    assert len(TRAIN) == 3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_syntax_and_size(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0
    code = [line for line in script.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAIN, ids=lambda p: p.stem)
def test_dry_run_from_any_directory(script: Path, tmp_path: Path) -> None:
    recipe = f"scripts/recipes/siglip_vicuna_7b/{script.stem}.yaml"
    done = run("bash", str(script), recipe, "train.save_steps=7", cwd=tmp_path, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert "(dry run)" in done.stdout
    assert "save_steps: 7" in done.stdout
    assert "parameters: " in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_dry_run_refuses_a_wrong_key_in_one_line() -> None:
    done = run("bash", "scripts/train/sft.sh", "scripts/recipes/quickstart/sft.yaml", "trian.x=1", DRY_RUN="1")
    assert done.returncode == 2
    assert "unknown key trian; did you mean 'train'" in done.stderr
    assert "Traceback" not in done.stderr


def test_quickstart_refuses_an_unknown_profile() -> None:
    done = run("bash", "scripts/quickstart.sh", QUICKSTART="huge")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: QUICKSTART=huge: must be default, smoke or full"


@pytest.fixture
def bare_repo(tmp_path: Path) -> Path:
    """What install.sh reads, without a virtual environment."""
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    shutil.copytree(REPO / "requirements", tmp_path / "requirements")
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    return tmp_path


def test_install_needs_a_python(bare_repo: Path) -> None:
    done = run("bash", "scripts/install.sh", cwd=bare_repo, PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: no Python found")


def test_install_refuses_an_old_python(bare_repo: Path) -> None:
    old = bare_repo / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1"\nexit 1\n')
    old.chmod(0o755)
    done = run("bash", "scripts/install.sh", cwd=bare_repo, PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr.strip() == "error: Python 3.8.1 is too old: Python 3.11 or newer is needed (set PYTHON to one)"
    assert not (bare_repo / ".venv").exists()


@pytest.mark.slow
def test_install_without_network_is_one_clear_error(bare_repo: Path) -> None:
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(bare_repo / "nothing"), "PIP_EXTRA_INDEX_URL": ""}
    done = run("bash", "scripts/install.sh", cwd=bare_repo, PYTHON=sys.executable, **nowhere)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: installation failed (see above): no network, or the disk is full?"
    )
    assert not (bare_repo / ".venv/.installed").exists()
