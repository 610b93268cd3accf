"""Times the MoE layer beside a dense block of as many active FLOPs: every kernel, and every router on the default one.

    python benchmarks/moe_layer.py --experts 8 --k 2 --intermediate 1408
    python benchmarks/moe_layer.py --experts 64 --k 8 --intermediate 352 --json results.json

Before every sparse case the dense block is timed again, in the same round; the ratio of a case is the median over the
rounds of these pairs, so a machine that changes its speed does little harm. `forward` is without gradients, `both` is a
forward and a backward with the gradients of input, router and experts.

On a shared machine `--quiet 0.03` repeats every pair during which other programs used more than 3 % of all cores.

Where the time of the default layer goes is read from profiles: matrix products with the experts' weights; what is
pointwise on the experts' hidden width (a dense block has that too); and the rest, which is the price of routing: the
router itself, sorting, gathering and summing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from llava_moe.moe import (
    EXPERTS,
    KERNELS,
    ROUTERS,
    LayerPlan,
    MlpSpec,
    MoELayer,
    Routing,
    RoutingContext,
    StackedExperts,
    build_layer,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
VOCABULARY = 1000


@dataclasses.dataclass
class Case:
    """Something to time.

    Attributes:
        call: (T, D) to (T, D).
        learns: whose gradients are taken besides the input's.
        slots: filled slots of a token, None for the dense block; some routers choose another number than k.
        note: shown in the table.
    """

    call: Callable[[Tensor], Tensor]
    learns: Sequence[Tensor]
    slots: float | None = None
    note: str = ""
    forward_s: list[float] = dataclasses.field(default_factory=list)
    both_s: list[float] = dataclasses.field(default_factory=list)
    dense_forward_s: list[float] = dataclasses.field(default_factory=list)
    dense_both_s: list[float] = dataclasses.field(default_factory=list)

    def result(self, k: int) -> dict[str, Any]:
        """Medians; `per_slot` is the ratio for as many slots as the dense block stands for."""
        forward = statistics.median(a / b for a, b in zip(self.forward_s, self.dense_forward_s, strict=True))
        both = statistics.median(a / b for a, b in zip(self.both_s, self.dense_both_s, strict=True))
        return {
            "forward_ms": 1e3 * statistics.median(self.forward_s),
            "both_ms": 1e3 * statistics.median(self.both_s),
            "forward_ratio": forward,
            "both_ratio": both,
            "slots": self.slots,
            "both_ratio_per_slot": both * k / self.slots if self.slots else None,
            "note": self.note,
        }


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    spec = MlpSpec(options.width, options.intermediate, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    x = torch.randn(options.tokens, options.width, device=device, dtype=dtype, requires_grad=True)
    dense = dense_case(options, device, dtype)
    cases = {**kernel_cases(options, spec, x), **(routers := router_cases(options, spec, x))[0]}
    left_out = routers[1]
    if options.only:
        cases = {name: case for name, case in cases.items() if any(part in name for part in options.only.split(","))}
    measure(dense, cases, x, options)
    report = {
        "hardware": hardware(device),
        "threads": options.threads,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "options": {key: value for key, value in vars(options).items() if key != "json"},
        "dense_forward_ms": 1e3 * statistics.median(dense.forward_s),
        "dense_both_ms": 1e3 * statistics.median(dense.both_s),
        "cases": {name: case.result(options.k) for name, case in cases.items()},
        "left_out": left_out,
        "shares": shares(cases["router top_k"], x, spec, options) if "router top_k" in cases else None,
    }
    show(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--intermediate", type=int, default=1408, help="F, the width of one expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", type=float, default=1.0, help="share of the machine that others may use in a pair")
    parser.add_argument("--only", default="", help="parts of names, comma-separated: 'kernel', 'router top_k'")
    parser.add_argument("--json", default="", help="write the results to this file")
    return parser.parse_args()


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and how many of its cores there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"


def dense_case(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Case:
    """One block of width k F, with the three matrices of a decoder's own."""
    width, inner = options.width, options.k * options.intermediate

    def matrix(rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(rows, columns, device=device, dtype=dtype) / columns**0.5)

    gate, up, down = matrix(inner, width), matrix(inner, width), matrix(width, inner)
    return Case(lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), [gate, up, down])


def kernel_cases(options: argparse.Namespace, spec: MlpSpec, x: Tensor) -> dict[str, Case]:
    """The experts alone, under a fixed random routing with loads that differ by chance only."""
    logits = torch.randn(options.tokens, options.experts, device=x.device)
    weight, index = logits.softmax(-1).topk(options.k)
    weight.requires_grad_()
    cases = {}
    for name in KERNELS.names():
        experts = StackedExperts.build(spec, options.experts, {"kernel": name}).to(x.device, x.dtype)
        call = partial(experts, index_TK=index, weight_TK=weight)
        cases[f"kernel {name}"] = Case(call, [weight, *experts.parameters()], options.k)
    return cases


def router_cases(options: argparse.Namespace, spec: MlpSpec, x: Tensor) -> tuple[dict[str, Case], dict[str, str]]:
    """A whole layer for every router in training mode, and why a router is missing."""
    cases, left_out = {}, {}
    for name in ROUTERS.names():
        layer, note, reason = try_layer(name, options, spec)
        if layer is None:
            left_out[name] = reason
            continue
        layer = layer.to(x.device, x.dtype).train()
        layer.scope.set_context(context(options.tokens, x.device))
        try:
            with layer.scope.recording() as recorded:
                layer(x)
        except (ValueError, RuntimeError) as error:
            left_out[name] = f"its forward failed: {error}"
            continue
        routing: Routing = recorded[layer.site]
        slots = float((routing.index_TK < routing.num_experts).sum()) / options.tokens
        learns = [p for p in layer.parameters() if p.requires_grad]
        cases[f"router {name}"] = Case(layer, learns, slots, note)
    return cases, left_out


def try_layer(name: str, options: argparse.Namespace, spec: MlpSpec) -> tuple[MoELayer | None, str, str]:
    """The layer with the first kind of experts that the router accepts; or the reason of the last refusal."""
    known = {field.name for field in dataclasses.fields(ROUTERS.get(name).Config)}
    args: dict[str, Any] = {"k": options.k} if "k" in known else {}
    if name == "scored":
        args = {"selector_args": {"k": options.k}}
    reason = ""
    for experts in EXPERTS.names():
        try:
            layer = build_layer(LayerPlan(options.experts, name, args, experts), spec)
        except ValueError as error:
            reason = reason or str(error)
            continue
        if isinstance(layer, MoELayer):
            return layer, "" if experts == "stacked" else f"experts: {experts}", ""
        reason = "it brings a layer of its own, which assigns no tokens"
    return None, "", reason


def context(num_tokens: int, device: torch.device) -> RoutingContext:
    """One sequence of random token ids, its first quarter an image."""
    ids = torch.randint(VOCABULARY, (num_tokens,), device=device)
    image = (torch.arange(num_tokens, device=device) < num_tokens // 4).long()
    return dataclasses.replace(RoutingContext.trivial(num_tokens, device), token_ids_T=ids, modality_T=image)


def measure(dense: Case, cases: dict[str, Case], x: Tensor, options: argparse.Namespace) -> None:
    """Fills in the seconds; the first round is left out."""
    grad = torch.randn_like(x)
    for round_ in range(options.rounds + 1):
        for case in cases.values():
            pair = quiet_pair(dense, case, x, grad, options.quiet)
            if round_:
                (dense_forward, dense_both), (case_forward, case_both) = pair
                case.dense_forward_s.append(dense_forward)
                case.dense_both_s.append(dense_both)
                case.forward_s.append(case_forward)
                case.both_s.append(case_both)
                dense.forward_s.append(dense_forward)
                dense.both_s.append(dense_both)


def quiet_pair(dense: Case, case: Case, x: Tensor, grad: Tensor, allowed: float) -> list[tuple[float, float]]:
    """(forward, both) of the dense block and of the case, while others use no more of the machine than allowed."""
    while True:
        before, start = busy_elsewhere(), time.perf_counter()
        if allowed < 1:
            time.sleep(1)  # a look at the machine costs less than a pair in vain
            if share_of_machine(before, start) > allowed:
                continue
        pair = [(forward(c, x), both(c, x, grad)) for c in (dense, case)]
        if share_of_machine(before, start) <= allowed:
            return pair


def share_of_machine(busy_before: float, start: float) -> float:
    """What others have used of all cores since then."""
    return (busy_elsewhere() - busy_before) / (time.perf_counter() - start) / (os.cpu_count() or 1)


def busy_elsewhere() -> float:
    """Seconds that other programs, or other machines of the host, have had the cores; 0 where the system hides it."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(field) for field in stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def forward(case: Case, x: Tensor) -> float:
    start = clock(x.device)
    case.call(x)
    return clock(x.device) - start


def both(case: Case, x: Tensor, grad: Tensor) -> float:
    for leaf in (x, *case.learns):
        leaf.grad = None
    start = clock(x.device)
    case.call(x).backward(grad)
    return clock(x.device) - start


def shares(case: Case, x: Tensor, spec: MlpSpec, options: argparse.Namespace) -> dict[str, float] | str:
    """Shares of the operations of one forward and backward: products, pointwise on the hidden width, and routing.

    Python between the operations is left out, for a profile stretches it; medians of the rounds.
    """
    hidden = {spec.intermediate, 2 * spec.intermediate}
    if hidden & {spec.hidden, options.experts, options.k, options.tokens}:
        return "not measured: the expert width must differ from all other sizes to be told apart in a profile"
    grad = torch.randn_like(x)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if x.is_cuda else [])]
    rounds: list[dict[str, float]] = []
    while len(rounds) < options.rounds + 1:
        before, start = busy_elsewhere(), time.perf_counter()
        with profile(activities=activities, record_shapes=True) as recorded:
            both(case, x, grad)
        if share_of_machine(before, start) <= options.quiet:
            rounds.append(by_kind(recorded, hidden, x.is_cuda))
    return {kind: statistics.median(each[kind] for each in rounds[1:]) for kind in rounds[0]}


def by_kind(recorded: profile, hidden: set[int], on_gpu: bool) -> dict[str, float]:
    totals = {"products": 0.0, "pointwise": 0.0, "routing": 0.0}
    for event in recorded.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::"):
            wide = any(size in hidden for shape in event.input_shapes if shape for size in shape)
            kind = ("products" if event.key in PRODUCTS else "pointwise") if wide else "routing"
            totals[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {kind: spent / sum(totals.values()) for kind, spent in totals.items()}


def show(report: dict[str, Any]) -> None:
    options, console = report["options"], Console(width=120)
    console.print(f"{report['hardware']}, {report['threads']} threads, torch {report['torch']}, {options['dtype']}")
    console.print(
        f"T={options['tokens']} D={options['width']} F={options['intermediate']} E={options['experts']} "
        f"k={options['k']}, {options['rounds']} rounds, load average {report['load_average']:.1f} at the end"
    )
    table = Table("case", "slots", "forward ms", "x dense", "both ms", "x dense", "per slot", "note")
    table.add_row("dense", "", f"{report['dense_forward_ms']:.1f}", "", f"{report['dense_both_ms']:.1f}", "", "", "")
    for name, r in report["cases"].items():
        per_slot = "" if r["both_ratio_per_slot"] is None else f"{r['both_ratio_per_slot']:.2f}"
        table.add_row(
            name, f"{r['slots']:.2f}", f"{r['forward_ms']:.1f}", f"{r['forward_ratio']:.2f}",
            f"{r['both_ms']:.1f}", f"{r['both_ratio']:.2f}", per_slot, r["note"],
        )  # fmt: skip
    console.print(table)
    for name, reason in report["left_out"].items():
        console.print(f"left out: router {name}: {reason}", markup=False)
    if isinstance(report["shares"], dict):
        parts = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in report["shares"].items())
        console.print(f"default layer, forward and backward, by profile: {parts}")
    elif report["shares"]:
        console.print(report["shares"])


if __name__ == "__main__":
    main()
