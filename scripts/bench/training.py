"""Times a training step under every way to run it, and says how much each costs beside plain DDP.

    python -m scripts.bench.training --out benchmarks/results/training --docs docs/training.md

A sparse model of a few million values is trained on a CPU that should do nothing else; under 6 minutes. All cases with
two ranks run in one launch, one after the other and the whole `--rounds` times, so a machine that changes its speed
does little harm; what is reported is the median over the rounds of the ratio to plain DDP in the same round. All cases
take the same samples in a step, by accumulation where one process does the work of two. Packing has another number of
tokens in a step, so its ratio is that of seconds for a real token.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
import transformers  # isort: skip
from transformers import TrainerCallback  # isort: skip

from llava_moe.config import load_recipe
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.training import distributed
from tests.tiny_model import tiny_config, tiny_moe, tiny_processor, tiny_text_config
from tests.training.agreement import leave
from tests.training.runs import make_trainer, start_ranks, torchrun, unequal_data, write_recipe

WARM_UP, RANKS = 2, 2
PLAIN = "DDP x 2"
RATES = dict.fromkeys(("projector", "decoder", "embeddings", "router", "experts"), 1e-4)
_MARK = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": f"scripts/deepspeed/zero{stage}.json"}


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"train": {"gradient_accumulation_steps": RANKS}}),
    PLAIN: (RANKS, {}),
    **{f"ZeRO-{stage} x 2": (RANKS, zero(stage)) for stage in range(4)},
    "DDP x 2, bfloat16": (RANKS, {"train": {"bf16": True}}),
    "DDP x 2, checkpointing": (RANKS, {"train": {"activation_checkpointing": True}}),
    "ZeRO-2 x 2, checkpointing": (RANKS, {**zero(2), "train": {"activation_checkpointing": True}}),
    "ZeRO-3 x 2, checkpointing": (RANKS, {**zero(3), "train": {"activation_checkpointing": True}}),
    "DDP x 2, grouped by length": (RANKS, {"train": {"train_sampling_strategy": "group_by_length"}}),
    "DDP x 2, packing": (RANKS, {"data": {"packing": True}, "train": {"per_device_train_batch_size": 1}}),
    "DDP x 2, no routing telemetry": (RANKS, {"telemetry": {"every": 0}}),
    "DDP x 2, LoRA on decoder and experts": (
        RANKS,
        {"lora": {"rank": 8, "alpha": 16.0}, "stage": {"learning_rates": {"lora": 1e-4, "projector": 1e-4}}},
    ),
    "ZeRO-2 x 2, experts spread over both": (RANKS, {**zero(2), "expert_parallel": RANKS}),
}
"""Name: ranks, and what differs from the plain recipe."""


def write_checkpoint(folder: Path, width: int) -> Path:
    """A sparse model of 6 layers with 8 experts in half of them; 192 wide, a step is more than its overhead."""
    text = tiny_text_config()
    for key, value in {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": width // 8,
    }.items():
        setattr(text, key, value)
    torch.manual_seed(0)
    moe = tiny_moe(layers=[0, 2, 4], num_experts=8)
    model = LlavaMoeForConditionalGeneration(tiny_config(moe, text_config=text))
    model.save_pretrained(folder, save_original_format=True)
    tiny_processor().save_pretrained(folder)
    return folder


def write_cases(folder: Path, steps: int, width: int) -> dict[str, Path]:
    """A recipe for each case."""
    checkpoint, data = write_checkpoint(folder / "checkpoint", width), unequal_data(folder / "data", 16)
    recipes = {}
    for number, (name, (_, changes)) in enumerate(CASES.items()):
        sections: dict[str, Any] = {
            "stage": {"learning_rates": RATES},
            "balance": {"losses": {"switch": 0.01, "z": 0.001}},
            "data": {"max_length": 256},
            "train": {
                "max_steps": WARM_UP + steps,
                "per_device_train_batch_size": 4,
                "logging_steps": WARM_UP + steps,
                "save_strategy": "no",
                "report_to": "none",
            },
        }
        for key, value in changes.items():
            sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) else value
        recipes[name] = write_recipe(folder / f"case{number}", checkpoint, data, **sections)
    return recipes


class _Timer(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of a step to the end of the next, logging and all that is done between them included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def time_case(recipe: Path) -> dict[str, float]:
    """Trains once in this process; median seconds of a step, and real tokens of a step on all ranks."""
    config = load_recipe(recipe)
    made, timer = make_trainer(config), _Timer()
    made.add_callback(timer)
    made.train()
    seconds = [after - before for before, after in zip(timer.ends, timer.ends[1:], strict=False)][WARM_UP - 1 :]
    tokens = made.metrics.row["tokens"] / made.state.global_step
    leave(made)
    return {"seconds": statistics.median(seconds), "tokens": tokens}


def worker(out: str, recipes: Sequence[str]) -> None:
    """In every rank; rank 0 writes one entry for each recipe."""
    distributed.prepare(True)
    gc.freeze()  # otherwise the garbage collection after each run searches all that was imported
    found = [time_case(Path(recipe)) for recipe in recipes]
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))
    distributed.finish()


def measure(folder: Path, recipes: dict[str, Path], rounds: int) -> dict[str, list[dict[str, float]]]:
    """All rounds of all cases, one launch for each number of ranks."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    for ranks in sorted({ranks for ranks, _ in CASES.values()}):
        names = [name for name, (wanted, _) in CASES.items() if wanted == ranks] * rounds
        out = folder / f"ranks{ranks}.json"
        arguments = ["scripts.bench.training", "--worker", str(out), *(str(recipes[name]) for name in names)]
        done = start_ranks(torchrun(ranks), arguments, timeout=600)
        if done.returncode != 0:
            raise SystemExit(done.stdout[-6000:])
        for name, entry in zip(names, json.loads(out.read_text()), strict=True):
            found[name].append(entry)
    return found


def summarise(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Rows of the table."""
    rows = []
    for name, entries in found.items():
        per_token = "packing" in name
        ratios = []
        for entry, plain in zip(entries, found[PLAIN], strict=True):
            ratio = entry["seconds"] / plain["seconds"]
            ratios.append(ratio * plain["tokens"] / entry["tokens"] if per_token else ratio)
        rows.append(
            {
                "case": name,
                "seconds_per_step": statistics.median(entry["seconds"] for entry in entries),
                "tokens_per_step": entries[0]["tokens"],
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "per": "token" if per_token else "step",
            }
        )
    return rows


def as_table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, deepspeed {facts['deepspeed']}; median of "
        f"{facts['rounds']} rounds of {facts['steps']} steps (lowest and highest round).",
        "",
        "| run | seconds a step | beside plain DDP |",
        "| --- | ---: | ---: |",
    ]
    for row in rows:
        spread = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        lines.append(
            f"| {row['case']} | {row['seconds_per_step']:.3f} | {spread}{' a token' * (row['per'] == 'token')} |"
        )
    return "\n".join(lines) + "\n"


def describe_machine(steps: int, rounds: int) -> dict[str, Any]:
    import deepspeed

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
        "steps": steps,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training"), help="folder of the results")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose part between the bench marks is renewed")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed in each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=192, help="hidden width of the model, a multiple of 16")
    parser.add_argument("--worker", nargs="+", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], args.worker[1:])
        return
    if args.docs is not None and not _MARK.search(args.docs.read_text()):
        raise SystemExit(f"{args.docs}: has no part between <!-- bench --> and <!-- /bench -->")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), write_cases(Path(folder), args.steps, args.width), args.rounds)
    rows, facts = summarise(found), describe_machine(args.steps, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    (args.out / "results.md").write_text(as_table(rows, facts))
    if args.docs is not None:
        text = args.docs.read_text()
        args.docs.write_text(_MARK.sub(lambda match: match[1] + as_table(rows, facts) + match[2], text))
    print(as_table(rows, facts))


if __name__ == "__main__":
    main()
