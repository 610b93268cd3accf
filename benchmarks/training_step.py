"""Times training steps of a recipe's model with random weights and made-up samples: no data, weights or network.

    python benchmarks/training_step.py scripts/recipes/siglip2_qwen3_0_6b/moe.yaml
    python benchmarks/training_step.py RECIPE --cases plain,packed,packed+liger --json results.json

A case is a base and options, joined by +:

    plain      rows padded to the longest sample of their batch
    packed     as many samples in a row as fit, which never see each other
    liger, chunked            a fused loss in the place of plain logits
    flash                     FlashAttention in the place of SDPA
    compile                   the decoder's layers compiled one by one
    checkpoint                activations computed again in the backward pass

Every case trains the parts that the recipe's stage trains, on the same samples, in bfloat16 with a fused AdamW, on one
device without DeepSpeed. Tokens per second count real tokens; model FLOPs utilisation is that of
`llava_moe.training.hardware`: nothing that is padding or computed twice counts. What the machine lacks is skipped and
said.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
from rich.console import Console  # isort: skip
from rich.table import Table  # isort: skip
from transformers import LlamaConfig  # isort: skip

from llava_moe.config import RunConfig, load_recipe
from llava_moe.data.collator import Collator
from llava_moe.data.conversation import IGNORE_INDEX
from llava_moe.data.packing import PackedDataset, PackingCollator
from llava_moe.model.attention import attention_of, resolve_attention
from llava_moe.model.families import build_model
from llava_moe.model.head import choose_fused_loss
from llava_moe.model.loss import resolve_fused_loss
from llava_moe.planning import Library, shape_of
from llava_moe.training.compiling import compile_layers
from llava_moe.training.hardware import peak_flops, training_work
from llava_moe.training.objective import Balance, balance_terms, combine
from llava_moe.training.stage import apply_stage
from llava_moe.training.throughput import Counts, count

CASES = "plain,plain+flash,packed,packed+flash,packed+liger,packed+chunked,packed+flash+liger,packed+compile"
_BASES, _LOSSES = ("plain", "packed"), ("liger", "chunked")
_OPTIONS = (*_LOSSES, "flash", "compile", "checkpoint")


class MadeUp:
    """Samples of one picture, a question and an answer, with lengths as varied as those of instruction data."""

    def __init__(self, config: Any, number: int, max_length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        text = torch.empty(number).log_normal_(mean=4.8, std=0.8, generator=generator).long() + 16
        self.tokens = int(config.image_seq_length)
        self.sizes = text.clamp(max=max_length - self.tokens).tolist()
        self.lengths = [self.tokens + size for size in self.sizes]
        self.side, self.image_token = int(config.vision_config.image_size), int(config.image_token_id)
        self.words = min(int(config.text_config.vocab_size), self.image_token)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        size = self.sizes[index]
        text = torch.randint(self.words, (size,), generator=generator)
        ids = torch.cat([torch.full((self.tokens,), self.image_token), text])
        labels = ids.clone()
        labels[: self.tokens + size // 3] = IGNORE_INDEX
        pixels = torch.randn(1, 3, self.side, self.side, generator=generator)
        return {"sample_id": str(index), "input_ids": ids, "labels": labels, "pixel_values": pixels}

    def report(self) -> dict[str, Any]:
        return {}


def batches(samples: MadeUp, packed: bool, flat: bool, rows: int, length: int) -> Iterator[dict[str, Any]]:
    """The same samples over and over, in batches of so many rows."""
    shape = (3, samples.side, samples.side)
    collator: Any = Collator(0, samples.image_token, samples.tokens, image_shape=shape)
    items: Any = samples
    if packed:
        items = PackedDataset(samples, samples.lengths, length)
        collator = PackingCollator(collator, 0, flat=flat, varlen=flat)
    while True:
        for start in range(0, len(items) - rows + 1, rows):
            yield collator([items[start + i] for i in range(rows)])


def skipped(case: str, device: torch.device) -> str | None:
    """Why a case cannot run here; None where it can."""
    base, *options = case.split("+")
    unknown = [name for name in options if name not in _OPTIONS]
    if base not in _BASES or unknown:
        raise SystemExit(f"case {case}: {unknown[0] if unknown else base} is unknown; see --help")
    try:
        if "flash" in options and resolve_attention("auto", LlamaConfig(), torch.bfloat16, device.type) is None:
            return "no FlashAttention here: pip install flash-attn --no-build-isolation"
        for name in options:
            if name in _LOSSES:
                resolve_fused_loss(name, device.type)
    except ValueError as error:
        return str(error)
    return None


def build(config: RunConfig, recipe: str, case: str, device: torch.device) -> tuple[Any, list[dict[str, Any]]]:
    """The recipe's model with random weights as the case wants it, and its parameter groups."""
    options = case.split("+")[1:]
    shape = shape_of(config, Library(recipe))
    asked = resolve_attention("auto" if "flash" in options else "sdpa", shape.text_config, torch.bfloat16, device.type)
    shape._attn_implementation = asked
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = build_model(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    groups = apply_stage(model.train(), config.stage)
    choose_fused_loss(model, next((name for name in options if name in _LOSSES), "off"), device.type)
    if "checkpoint" in options:
        model.gradient_checkpointing_enable()
    if "compile" in options:
        compile_layers(model)
    return model, groups


def measure(config: RunConfig, recipe: str, case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step and what follows from them."""
    device = torch.device(arguments.device)
    model, groups = build(config, recipe, case, device)
    optimiser = torch.optim.AdamW(groups, fused=device.type == "cuda")
    balance = Balance.build(config.balance)
    samples = MadeUp(model.config, arguments.samples, arguments.length)
    packed = case.startswith("packed")
    flat = packed and "flash" in attention_of(model)
    source = batches(samples, packed, flat, arguments.rows, arguments.length)
    seconds, counted = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(arguments.warmup + arguments.steps):
        raw = next(source)
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in raw.items()}
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
        _wait(device)
        began = time.perf_counter()
        output = model(**batch, loss_only=True, use_cache=False)
        terms = balance_terms(output.routings or {}, model.model.scope, balance.losses)
        combine(output.loss, terms, balance.coefficients, accumulation_steps=1, world_size=1).total.backward()
        optimiser.step()
        optimiser.zero_grad()
        _wait(device)
        if step >= arguments.warmup:
            seconds.append(time.perf_counter() - began)
            counted.append(count(batch, model.config.image_token_id))
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    work = training_work(model.config, learning)
    return _row(case, model, seconds, torch.stack(counted), work, device)


def _row(
    case: str, model: Any, seconds: list[float], counted: torch.Tensor, work: Any, device: torch.device
) -> dict[str, Any]:
    total = Counts(*counted.sum(0).tolist())
    spent = sum(seconds)
    rate = work.total(total) / spent
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if device.type == "cuda" else None
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "case": case,
        "attention": attention_of(model),
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": total.tokens / spent,
        "samples_per_second": total.samples / spent,
        "useful_share": total.tokens / total.places,
        "tflops": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
        "peak_memory_gib": memory,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def show(rows: list[dict[str, Any]], absent: dict[str, str]) -> None:
    """A table, and a line for each case that was left out."""
    table = Table("case", "attention", "s/step", "tokens/s", "samples/s", "useful", "TFLOP/s", "MFU", "GiB")
    for row in rows:
        mfu, memory = row["mfu"], row["peak_memory_gib"]
        table.add_row(
            row["case"],
            row["attention"],
            f"{row['seconds_per_step']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['samples_per_second']:.1f}",
            f"{row['useful_share']:.1%}",
            f"{row['tflops']:.3g}",
            "?" if mfu is None else f"{mfu:.1%}",
            "?" if memory is None else f"{memory:.1f}",
        )
    console = Console(width=140)
    console.print(table)
    for case, reason in absent.items():
        console.print(f"skipped {case}: {reason}", highlight=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row, at the most")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    given = parse(arguments)
    config = load_recipe(given.recipe)
    device = torch.device(given.device)
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for case in given.cases.split(","):
        reason = skipped(case, device)
        if reason is not None:
            absent[case] = reason
            continue
        try:
            rows.append(measure(config, given.recipe, case, given))
            print(json.dumps(rows[-1]), flush=True)
        except torch.OutOfMemoryError as error:
            absent[case] = f"out of memory with --rows {given.rows}: {str(error).splitlines()[0]}"
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(rows, absent)
    if given.json is not None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        facts = {"recipe": given.recipe, "device": name, "torch": torch.__version__, "skipped": absent}
        shape = {key: getattr(given, key) for key in ("rows", "length", "samples", "steps", "warmup")}
        given.json.write_text(json.dumps({**facts, **shape, "rows_measured": rows}, indent=2))
    return rows


if __name__ == "__main__":
    main()
