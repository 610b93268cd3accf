"""Tiny training runs for tests: recipes, trainers in this process, and the same in several ranks.

As a program it runs a probe in every rank: `python -m torch.distributed.run -m tests.training.runs OUT CONFIG.json ...`
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
import yaml  # isort: skip
from transformers import TrainerCallback  # isort: skip

from llava_moe.config import RunConfig, load_recipe
from llava_moe.data.processing import load_processor
from llava_moe.training import runner, trainer
from llava_moe.training.arguments import training_arguments
from llava_moe.training.metrics import read_metrics
from llava_moe.training.objective import combine
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.tiny import write_llava_json

REPO = Path(__file__).parents[2]
ALL_PARTS = {"projector": 1e-2, "decoder": 1e-2, "embeddings": 1e-2}
MOE_PARTS = {**ALL_PARTS, "router": 1e-2, "experts": 1e-2}
_QUIET = {
    "disable_tqdm": True,
    "report_to": "none",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "use_cpu": True,
}


def write_recipe(folder: Path, checkpoint: Path, data: tuple[Path, Path], /, **sections: Any) -> Path:
    """Writes `folder/recipe.yaml`, whose run goes to `folder/out`; sections are merged over small defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "stage": {"name": "test", "learning_rates": ALL_PARTS},
        "model": {"checkpoint": str(checkpoint)},
        "data": {"sources": [{"path": str(data[0]), "image_folder": str(data[1])}], "max_length": 128},
        "train": dict(_QUIET),
    }
    for name, value in sections.items():
        raw[name] = {**raw[name], **value} if isinstance(raw.get(name), dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def make_config(folder: Path, checkpoint: Path, data: tuple[Path, Path], /, **sections: Any) -> RunConfig:
    """The recipe of `write_recipe`, loaded."""
    return load_recipe(write_recipe(folder, checkpoint, data, **sections))


def repeated_data(folder: Path, n: int, copies: int) -> tuple[Path, Path]:
    """`n` different records, one after the other, the whole `copies` times."""
    path, images = write_llava_json(folder, n)
    path.write_text(json.dumps(json.loads(path.read_text()) * copies))
    return path, images


def unequal_data(folder: Path, n: int = 4) -> tuple[Path, Path]:
    """`n` records whose answers have very different lengths."""
    path, images = write_llava_json(folder, n)
    records = json.loads(path.read_text())
    for index, record in enumerate(records):
        record["conversations"][1]["value"] = " ".join(["red green blue"] * (1 + 3 * index))
    path.write_text(json.dumps(records))
    return path, images


def make_trainer(config: RunConfig) -> LlavaMoeTrainer:
    """What `runner.train` trains with, ready and not started."""
    checkpoint = Path(str(config.model.checkpoint))
    processor = load_processor(
        checkpoint,
        template=config.data.template,
        image_mode=config.data.image_mode,
        template_options=config.data.template_options,
    )
    plain = [(Path(s.path), Path(str(s.image_folder))) for s in config.data.sources]
    sources = plain if config.data.index is None else Path(config.data.index)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return runner._make_trainer(config, training_arguments(config), checkpoint, processor, sources)


class _GradientProbe(TrainerCallback):  # type: ignore[misc]
    """Copies what the optimiser is about to apply."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {
            name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }


def step_gradients(config: RunConfig, use_cross_entropy: bool = True) -> dict[str, torch.Tensor]:
    """The gradients of the last optimiser step of a real run, as the optimiser gets them, by parameter name."""
    made = make_trainer(config)
    probe = _GradientProbe()
    made.add_callback(probe)
    scale = 1.0 if use_cross_entropy else 0.0
    trainer.combine = lambda loss, *args, **kwargs: combine(loss * scale, *args, **kwargs)
    try:
        made.train()
    finally:
        trainer.combine = combine
    return probe.gradients


def losses(output_dir: str | Path) -> dict[int, float]:
    """Step to loss, from the metrics of a run."""
    return {row["step"]: row["loss"] for row in read_metrics(output_dir)}


class _Stopper(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int, stop: Callable[[], None]) -> None:
        self.step, self.stop = step, stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.stop()


def stopping_trainer(step: int, stop: Callable[[], None]) -> Callable[..., LlavaMoeTrainer]:
    """A stand-in for `runner.LlavaMoeTrainer` that calls `stop` when a step ends, before it is logged or saved."""

    def make(*args: Any, callbacks: list[Any], **kwargs: Any) -> LlavaMoeTrainer:
        return LlavaMoeTrainer(*args, callbacks=[*callbacks, _Stopper(step, stop)], **kwargs)

    return make


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(launcher: Sequence[str], arguments: Sequence[str], timeout: int = 300) -> subprocess.CompletedProcess:
    """Runs a launcher with one thread in each rank; the whole process group dies with a timeout."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [*launcher, *arguments],
        cwd=REPO,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def torchrun(num_ranks: int) -> list[str]:
    options = [f"--nproc_per_node={num_ranks}", f"--master_port={free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m"]


def deepspeed(num_ranks: int) -> list[str]:
    """As scripts/common.sh starts it."""
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, "--num_gpus", str(num_ranks), "--no_local_rank", "--master_port", str(free_port()), "--module"]


def main(out: str, cases: Sequence[str]) -> None:
    """Each case is JSON {"recipe": path, "use_cross_entropy": bool}; rank 0 saves the list of gradients."""
    found = []
    for case in map(json.loads, cases):
        config = load_recipe(case.pop("recipe"))
        found.append(step_gradients(config, **case))
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out)


if __name__ == "__main__":
    if sys.argv[1] == "kill":  # kill STEP RECIPE: as llava_moe.train, but the process dies at the end of that step
        from llava_moe.train import run

        die = stopping_trainer(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
        runner.LlavaMoeTrainer = die  # type: ignore[misc, assignment]
        run(sys.argv[3])
    else:
        main(sys.argv[1], sys.argv[2:])
