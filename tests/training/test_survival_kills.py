"""Runs that are killed, stopped and broken from outside, as processes; slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import load_recipe
from llava_moe.model.assemble import load_model
from llava_moe.moe import BALANCE_LOSSES
from llava_moe.training import runner
from llava_moe.training.checkpoints import MANIFEST, PARTIAL, is_whole, last_whole_checkpoint, recorded_layout
from llava_moe.training.metrics import read_metrics
from tests.tiny import write_llava_json
from tests.training.controlled import EVERYTHING
from tests.training.runs import MOE_PARTS, REPO, losses, make_config, start_ranks, torchrun, write_recipe
from tests.training.survivors import moments

pytestmark = pytest.mark.slow
ZERO2 = "scripts/deepspeed/zero2.json"
SEED = 5
# What the clock and the process say is not the run's.
_TRAINED = {"step", "epoch", "loss", "cross_entropy", "grad_norm", "learning_rate", "label_tokens", "samples", "tokens"}


def numbers(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run as far as they are the same on every machine: with all losses, loads and controllers."""
    kept = {*_TRAINED, "layers", "losses", "controllers", *BALANCE_LOSSES.names()}
    return [{key: value for key, value in row.items() if key in kept} for row in read_metrics(output_dir)]


def test_killed_at_random_moments_every_stage_goes_on_bit_equal(
    dense_checkpoint: Path, capped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five steps in an epoch and eight in all: the last step does not end an epoch."""
    data = write_llava_json(tmp_path / "data", 10, text_only_every=4)
    train = {"max_steps": 8, "save_steps": 2, "save_total_limit": 1}
    stages: dict[str, tuple[Path, dict[str, Any]]] = {
        "projector": (dense_checkpoint, {"stage": {"name": "pretrain", "learning_rates": {"projector": 1e-2}}}),
        "dense": (dense_checkpoint, {}),
        "moe": (capped, {"stage": {"learning_rates": MOE_PARTS}, "balance": EVERYTHING["capped"]}),
    }
    plan = []
    for number, (name, (checkpoint, sections)) in enumerate(stages.items()):
        case: dict[str, Any] = {"moments": moments(SEED + number, train["max_steps"], train["save_steps"])}
        for run in ("whole", "killed"):
            case[run] = str(write_recipe(tmp_path / name / run, checkpoint, data, **sections, train=train))
        plan.append(case)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = start_ranks([sys.executable, "-m"], ["tests.training.survivors", "kills", str(tmp_path / "plan.json")])
    assert done.returncode == 0, done.stdout[-4000:]
    told = json.loads((tmp_path / "told.json").read_text())
    half_written = 0
    for name, row in zip(stages, told, strict=True):
        with capsys.disabled():
            print(f"\n{name}: " + "; ".join(kill["moment"] for kill in row["kills"]), end="")
        assert (row["whole"], row["last"]) == (0, 0), done.stdout[-4000:]
        assert [kill["code"] for kill in row["kills"]] == [-signal.SIGKILL] * 5
        half_written += sum(PARTIAL in kill["left"] for kill in row["kills"])
        whole, killed = (tmp_path / name / run / "out" for run in ("whole", "killed"))
        assert numbers(killed) == numbers(whole)
        assert list(losses(killed)) == list(range(1, 9))
        one, other = (load_model(out / "model").state_dict() for out in (whole, killed))
        assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
        assert not list(killed.glob("*.partial")) + list(killed.glob("checkpoint*"))
    assert half_written >= 3  # the kills did fall into the writing


class Script:
    """scripts/train/sft.sh on the CPU, in a session of its own."""

    def __init__(self, recipe: Path, *overrides: str, ranks: int = 2) -> None:
        self.mark = f"{recipe}{time.monotonic_ns()}"
        self.out = recipe.parent / "out"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", "scripts/train/sft.sh", str(recipe), *overrides],
            cwd=REPO,
            env={**os.environ, "PATH": path, "NPROC": str(ranks), "OMP_NUM_THREADS": "1", "LLAVA_MOE_TEST": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                values = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                command = (folder / "cmdline").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if values.get("LLAVA_MOE_TEST") == self.mark and "RANK" in values and "llava_moe.train" in command:
                found[int(values["RANK"])] = int(folder.name)
        return found

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        until = time.monotonic() + timeout
        while time.monotonic() < until and self.process.poll() is None:
            if (self.out / "metrics.jsonl").is_file() and max(losses(self.out), default=0) >= step:
                return
            time.sleep(0.05)
        self.kill()
        pytest.fail(f"no step {step} in {timeout} s:\n{self.process.communicate()[0][-4000:]}")

    def end(self, timeout: float) -> tuple[int, str]:
        """Exit code and output."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end within {timeout} s:\n{self.process.communicate()[0][-4000:]}")
        return self.process.returncode, output

    def kill(self) -> None:
        for pid in [*self.ranks().values(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def test_two_ranks_under_zero2_lose_one_and_are_stopped(moe_checkpoint: Path, tmp_path: Path) -> None:
    """A rank dies; then SIGTERM, as a cluster sends it; then the run goes on to its end. The judge is one process."""
    data = write_llava_json(tmp_path / "data", 12, text_only_every=3)
    rates = {**MOE_PARTS, "projector": 2e-3, "router": 5e-3}  # a conversion must give each its own back
    stage = {"learning_rates": rates, "weight_decay": 0.1}
    sections: dict[str, Any] = {"stage": stage, "balance": {"losses": {"switch": 0.1}}}
    train = {"max_steps": 20, "save_steps": 6, "save_total_limit": 2}
    whole = make_config(
        tmp_path / "whole", moe_checkpoint, data, **sections, train={**train, "gradient_accumulation_steps": 2}
    )
    runner.train(whole)
    recipe = write_recipe(tmp_path / "broken", moe_checkpoint, data, **sections, train=train, deepspeed=ZERO2)
    out = tmp_path / "broken" / "out"

    dying = Script(recipe)
    dying.wait_for_step(7)
    os.kill(dying.ranks()[1], signal.SIGKILL)
    began = time.monotonic()
    code, output = dying.end(timeout=60)
    assert code not in (0, 2, 75), output[-4000:]
    assert "error: rank 1 (process " in output, output[-4000:]
    assert "a rank was ended by signal 9 (KILL)" in output, output[-4000:]
    assert time.monotonic() - began < 60
    assert last_whole_checkpoint(out) == out / "checkpoint-6"

    stopped = Script(recipe)
    stopped.wait_for_step(8)
    stopped.process.send_signal(signal.SIGTERM)
    code, output = stopped.end(timeout=60)
    assert code == 75, output[-4000:]
    assert "going on from" in output
    last = last_whole_checkpoint(out)
    assert last is not None
    step = int(last.name.rsplit("-", 1)[1])
    assert f"train: stopped at step {step}; the last whole checkpoint is {last}" in output
    assert step >= 8
    layout = recorded_layout(last)
    assert layout is not None
    assert (layout.world_size, layout.sharded) == (2, True)
    for shard in last.rglob("*optim_states.pt"):  # of both ranks; without one the checkpoint is not whole
        kept = shard.read_bytes()
        shard.unlink()
        assert not is_whole(last)
        shard.write_bytes(kept)
    assert len(list(last.rglob("*optim_states.pt"))) == 2
    assert is_whole(last)

    # One rank takes both micro-batches of a step; the optimiser's state was divided between two.
    code, output = Script(recipe, "train.gradient_accumulation_steps=2", ranks=1).end(timeout=150)
    assert code == 0, output[-4000:]
    assert f"{last} of 2 ranks was converted for 1" in output
    assert f"going on from {last}" in output
    assert losses(out) == pytest.approx(losses(whole.output_dir), rel=5e-4)
    assert list(losses(out)) == list(range(1, 21))


def test_two_ranks_meet_a_nan_and_one_process_goes_on(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Under DDP: what two ranks have written, one goes on from with the same samples in each step."""
    data = write_llava_json(tmp_path / "data", 12)
    sections: dict[str, Any] = {"stage": {"learning_rates": MOE_PARTS}, "balance": {"losses": {"switch": 0.1}}}
    train = {"max_steps": 3, "save_steps": 1, "train_sampling_strategy": "sequential"}
    alone = {**train, "gradient_accumulation_steps": 2}
    whole = make_config(tmp_path / "whole", moe_checkpoint, data, **sections, train=alone)
    runner.train(whole)
    recipe = write_recipe(tmp_path / "broken", moe_checkpoint, data, **sections, train=train)
    bad = json.loads(data[0].read_text())[10]["id"]  # the first of rank 1 in the last step
    met = start_ranks(torchrun(2), ["tests.training.survivors", "poisoned", bad, str(recipe)])
    out = tmp_path / "broken" / "out"
    assert met.returncode != 0
    assert met.stdout.count("error: step 3: the loss or its gradient is not finite") == 1, met.stdout[-4000:]
    assert "Traceback" not in met.stdout.split("error: step 3")[0]
    told = json.loads((out / "nan.json").read_text())
    steps = [rank["steps"][-1]["micro_batches"][0] for rank in told["ranks"]]
    assert [bad in step["sample_ids"] for step in steps] == [False, True]
    assert [step["not_finite"] for step in steps] == [[], ["cross_entropy", "switch"]]
    assert last_whole_checkpoint(out) == out / "checkpoint-2"
    assert (out / "checkpoint-2" / MANIFEST).is_file()

    runner.train(load_recipe(recipe, ["train.gradient_accumulation_steps=2"]))
    assert losses(out) == pytest.approx(losses(whole.output_dir), rel=1e-4)
