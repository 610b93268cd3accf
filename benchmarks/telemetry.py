"""What watching the routing costs: `RoutingMeter` beside a training step, in one process.

    step    a whole training step at the size of the quickstart's MoE stage (or other sizes by option), with and without
            the meter in turns; every `--log-every` steps the meter is read, as a log line does
    micro   `--layers` layers of T tokens and E experts: the meter beside forward and backward of as many MoE blocks
            (one is timed and counted that often; attention and everything else are left out, so a real step is longer)

"meter" is the time of the meter's own calls, divided by the time of the step without it; that is the number to go by.
The ratio of the steps with and without it says the same, but on a shared machine its noise is larger than the cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, SiglipVisionConfig

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.moe import LayerPlan, MlpSpec, Routing, RoutingContext, RoutingScope, build_layer
from llava_moe.moe.losses import BALANCE_LOSSES
from llava_moe.training.objective import balance_terms, combine
from llava_moe.training.telemetry import RoutingMeter

IMAGE = 1  # id of the placeholder
GRID, CHANNELS = 16, 320  # features of a picture
COEFFICIENTS = {"switch": 0.01, "z": 0.001}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "hardware": hardware(torch.device(options.device)),
        "threads": options.threads,
        "torch": torch.__version__,
        "options": {key: value for key, value in vars(options).items() if key != "json"},
        "rows": [],
    }
    if options.only in ("", "step"):
        report["rows"].append(whole_step(options))
    for experts, k in ((8, 2), (64, 8)) if options.only in ("", "micro") else ():
        report["rows"].append(blocks(options, experts, k))
    report["load_average"] = os.getloadavg()[0]
    show(report)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="counted pairs of steps, after one that is not")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=80, help="tokens of a row of the batch")
    parser.add_argument("--width", type=int, default=576, help="of the decoder, a multiple of 64")
    parser.add_argument("--decoder-layers", type=int, default=6, help="every second one has experts")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8192, help="micro: T")
    parser.add_argument("--layers", type=int, default=24, help="micro: layers with experts")
    parser.add_argument("--block-width", type=int, default=512, help="micro: D")
    parser.add_argument("--only", choices=("", "step", "micro"), default="")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds, for a machine that does other work; needs --threads 1",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", default="", help="write the results to this file")
    options = parser.parse_args()
    if options.cpu_time and (options.device != "cpu" or options.threads != 1):
        parser.error("--cpu-time needs --device cpu --threads 1")
    return options


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def clock(options: argparse.Namespace) -> float:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if options.cpu_time else time.perf_counter()


def timed(options: argparse.Namespace, call: Callable[[], Any]) -> float:
    start = clock(options)
    call()
    return clock(options) - start


def whole_step(options: argparse.Namespace) -> dict[str, Any]:
    """Forward, objective, backward and AdamW in bfloat16; the meter on in every second step."""
    model = quickstart_model(options).to(options.device).train()
    inputs = batch(options)
    losses = {name: BALANCE_LOSSES.get(name).build({}) for name in COEFFICIENTS}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    meter, number = RoutingMeter(), itertools.count(1)
    spent: list[float] = []

    def watch(*args: Any) -> None:
        meter.update(*args)
        if next(number) % options.log_every == 0:
            meter.flush()

    def train_step(watched: bool) -> None:
        with torch.autocast(torch.device(options.device).type, torch.bfloat16):
            output = model(**inputs, loss_only=True, use_cache=False)
        routings, scope = output.routings, model.model.scope
        terms = balance_terms(routings, scope, losses)
        objective = combine(output.loss, terms, COEFFICIENTS, accumulation_steps=1, world_size=1)
        if watched:
            spent.append(timed(options, lambda: watch(objective.parts, routings, scope, terms)))
        objective.total.backward()
        optimizer.step()
        optimizer.zero_grad()

    off: list[float] = []
    on: list[float] = []
    for round_ in range(options.rounds + 1):
        # In turns, so that what else the machine does falls on both; which comes first changes too.
        for watched in (round_ % 2 == 0, round_ % 2 == 1):
            seconds = timed(options, lambda watched=watched: train_step(watched))  # type: ignore[misc]
            if round_:
                (on if watched else off).append(seconds)
    layers = options.decoder_layers // 2
    name = f"step: {layers} MoE layers of {options.experts}, {options.batch} x {options.length} tokens"
    # A mean, for only every tenth call reads the sums.
    return row(
        name, statistics.median(off), statistics.fmean(spent[1:]), statistics.median(on) / statistics.median(off)
    )


def quickstart_model(options: argparse.Namespace) -> LlavaMoeForConditionalGeneration:
    """Random weights in the shape of the quickstart's; the tower is frozen and never runs."""
    part = {"layers": list(range(0, options.decoder_layers, 2)), "num_experts": options.experts}
    heads = options.width // 64
    config = LlavaMoeConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=CHANNELS, intermediate_size=CHANNELS, num_hidden_layers=1, num_attention_heads=4, image_size=32,
            patch_size=8, vision_use_head=False,
        ),
        text_config=LlamaConfig(
            hidden_size=options.width, intermediate_size=options.width * 8 // 3, num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else heads, num_hidden_layers=options.decoder_layers,
            vocab_size=options.vocabulary, tie_word_embeddings=True,
        ),
        image_token_index=IMAGE,
        image_seq_length=GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        moe={"decoder": {**part, "router": {"name": "top_k", "args": {"k": 2}}}},
    )  # fmt: skip
    model = LlavaMoeForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    return model


def batch(options: argparse.Namespace) -> dict[str, Any]:
    """One picture in each row, and an answer of four tokens."""
    ids = torch.randint(2, options.vocabulary, (options.batch, options.length))
    ids[:, 4 : 4 + GRID] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    features = torch.randn(options.batch, GRID, CHANNELS)
    made = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "vision_features": features}
    return {name: tensor.to(options.device) for name, tensor in made.items()}


def blocks(options: argparse.Namespace, experts: int, k: int) -> dict[str, Any]:
    """The meter on `--layers` layers, beside forward and backward of as many blocks."""
    device = options.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    spec = MlpSpec(options.block_width, 2816 // k, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    layer = build_layer(LayerPlan(experts, "top_k", {"k": k}, "stacked"), spec).to(device, dtype).train()
    x = torch.randn(options.tokens, options.block_width, device=device, dtype=dtype, requires_grad=True)
    context = RoutingContext.trivial(options.tokens, device)
    image_T = (torch.arange(options.tokens, device=device) < options.tokens // 4).long()
    context = dataclasses.replace(context, modality_T=image_T)
    scope, routings = RoutingScope(), {}
    for number in range(options.layers):
        logits = torch.randn(options.tokens, experts, device=device)
        weight, index = logits.softmax(-1).topk(k)
        routing = Routing(logits, logits.softmax(-1), index, weight)
        site = ("decoder", number)
        scope.record(site, routing, dataclasses.replace(context, layer=number))
        routings[site] = routing
    meter = RoutingMeter()

    def watch() -> None:
        for _ in range(options.log_every):
            meter.update({}, routings, scope)
        meter.flush()

    block, spent = [], []
    for round_ in range(min(options.rounds, 5) + 1):
        seconds = (timed(options, lambda: layer(x).sum().backward()), timed(options, watch) / options.log_every)
        if round_:
            block.append(seconds[0])
            spent.append(seconds[1])
    name = f"micro: {options.layers} MoE layers of {experts} top-{k}, {options.tokens} tokens, D={options.block_width}"
    return row(name, options.layers * statistics.median(block), statistics.median(spent), None)


def row(name: str, step: float, meter: float, ratio: float | None) -> dict[str, Any]:
    return {"case": name, "step_ms": 1e3 * step, "meter_ms": 1e3 * meter, "meter_share": meter / step, "on_off": ratio}


def show(report: dict[str, Any]) -> None:
    console = Console(width=120)
    console.print(
        f"{report['hardware']}, {report['threads']} threads, torch {report['torch']}, load average "
        f"{report['load_average']:.1f} at the end"
    )
    table = Table("case", "step, ms", "meter, ms", "meter / step", "step with / without")
    for found in report["rows"]:
        ratio = "" if found["on_off"] is None else f"{found['on_off']:.3f}"
        share = f"{100 * found['meter_share']:.2f} %"
        table.add_row(found["case"], f"{found['step_ms']:.1f}", f"{found['meter_ms']:.2f}", share, ratio)
    console.print(table)


if __name__ == "__main__":
    main()
