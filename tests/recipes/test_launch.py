"""Several nodes: a hostfile for DeepSpeed's launcher, and a SLURM script; dry runs, and what they would start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SLURM = REPO / "scripts/train/slurm.sbatch"
HOSTFILE = "scripts/train/hostfile.example"
RECIPE = "scripts/recipes/llava_1_5_7b/sft.yaml"


def run(*command: str, path: Path | None = None, cwd: Path = REPO, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in ("NPROC", "HOSTFILE")}
    folders = [*([] if path is None else [str(path)]), str(Path(sys.executable).parent), clean["PATH"]]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**clean, "PATH": ":".join(folders), "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def stub(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


def test_the_script_is_short() -> None:
    assert run("bash", "-n", str(SLURM)).returncode == 0
    code = [line for line in SLURM.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) < 25
    asked = [line for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(asked) == 8


@pytest.mark.slow
def test_a_hostfile_counts_the_devices_of_all_nodes() -> None:
    done = run("bash", "scripts/train/sft.sh", RECIPE, DRY_RUN="1", HOSTFILE=HOSTFILE)
    assert done.returncode == 0, done.stderr
    assert "# devices: 16" in done.stdout
    assert "256 samples of up to 2,048 tokens" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("# nothing\n", "no line of the form NAME slots=GPUS")],
)
def test_a_wrong_hostfile_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "hosts"
    if content is not None:
        file.write_text(content)
    done = run("bash", "scripts/train/sft.sh", RECIPE, DRY_RUN="1", HOSTFILE=str(file))
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: HOSTFILE={file}: {message}"


def test_the_launcher_is_given_the_hostfile(tmp_path: Path) -> None:
    stub(tmp_path, "deepspeed", 'echo "deepspeed $*"')
    # the project's own environment stands first on the path of the scripts, so the stub is a function
    command = (
        f'deepspeed() {{ "{tmp_path}/deepspeed" "$@"; }}; export -f deepspeed; bash scripts/train/sft.sh {RECIPE} x.y=1'
    )
    done = run("bash", "-c", command, HOSTFILE=HOSTFILE, MASTER_PORT="29511")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    assert said == (
        f"deepspeed --hostfile {HOSTFILE} --no_local_rank --master_port 29511 --module llava_moe.train {RECIPE} x.y=1"
    )


@pytest.mark.slow
def test_slurm_dry_run(tmp_path: Path) -> None:
    done = run("bash", str(SLURM), RECIPE, "train.save_steps=7", DRY_RUN="1", SLURM_NTASKS="32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"# + srun python -m llava_moe.train {RECIPE} train.save_steps=7" in done.stdout
    assert "# devices: 32" in done.stdout
    assert "512 samples of up to 2,048 tokens" in done.stdout
    assert "save_steps: 7" in done.stdout
    assert not list(tmp_path.iterdir())


def test_slurm_needs_a_recipe_and_a_job() -> None:
    done = run("bash", str(SLURM))
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["error: name a recipe: sbatch scripts/train/slurm.sbatch RECIPE [key=value ...]"],
    )
    done = run("bash", str(SLURM), RECIPE)
    assert (done.returncode, done.stderr.splitlines()) == (2, ["error: not a SLURM job: start it with sbatch"])


@pytest.mark.parametrize(("recipe", "upcycles"), [("sft", False), ("moe", True)])
def test_slurm_starts_a_rank_for_each_task(tmp_path: Path, recipe: str, upcycles: bool) -> None:
    """SLURM's commands are stubs: `srun` runs its command once for each task, as SLURM would on the nodes."""
    stub(tmp_path, "scontrol", "printf 'node-a\\nnode-b\\n'")
    tell = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >> "$LOG"'
    functions = (
        f"python() {{ {tell}; }}; export -f python; "
        'llava-moe() { echo "llava-moe $*" >> "$LOG"; }; export -f llava-moe; '
        'srun() { if [ "$1" = --nodes=1 ]; then shift 2; "$@"; return; fi; '
        'for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "${@:1:2}" "${3/exec /}" "${@:4}"; done; }; '
        "export -f srun; "
    )
    path = f"scripts/recipes/siglip_vicuna_7b/{recipe}.yaml"
    log = tmp_path / "log"
    done = run(
        "bash",
        "-c",
        f"{functions} bash {SLURM} {path} train.max_steps=1",
        path=tmp_path,
        LOG=str(log),
        SLURM_SUBMIT_DIR=str(REPO),
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_JOB_ID="20007",
        SLURM_NTASKS="4",
    )
    assert done.returncode == 0, done.stderr
    said = log.read_text().splitlines()
    assert (said.pop(0) == f"llava-moe upcycle {path} train.max_steps=1") if upcycles else True
    command = f"-m llava_moe.train {path} train.max_steps=1"
    assert said == [f"{i} {i % 2} 4 node-a 20007: {command}" for i in range(4)]
