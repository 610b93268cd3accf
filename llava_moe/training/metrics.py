"""The numbers of a run: one JSON line for each log step in `<output_dir>/metrics.jsonl`, and the same to every logger.

    step, epoch              where the run stands
    loss                     what was minimised, mean over the steps since the line before
    cross_entropy, <name>    its parts: cross-entropy, and each balance loss without its coefficient, mean over layers
    grad_norm                before clipping, of the last step; null where DeepSpeed computes none
    learning_rate            of each part of the model, in the last step
    seconds_per_step         of training; `pause` are the seconds spent on checkpoints and scoring since the line before
    tokens_per_second        real ones, on all ranks
    useful_tokens            the share of real tokens; the rest is padding
    label_tokens             tokens in the loss since the line before
    samples, tokens          seen since the run began
    data_wait                seconds that the slowest rank waited for data in a step, data_wait_share of the step
    tflops, mfu              of each device, see `hardware.py`; null on a CPU, mfu also on a GPU that is not known
    peak_memory_gib          on the fullest device, or of the largest process on a CPU
    controllers              what each controller said of the last step
    alarms                   what begins to go wrong with the routing, see `alarms.py`
    layers                   for each MoE layer its routing and the balance losses there, see `telemetry.py`
    not_finite               names of values that were infinite or not a number, and are null in this line

Values are means or sums over all ranks. Nothing is read from a device between two lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from llava_moe.moe import SiteKey
from llava_moe.training.expert_parallel import learning_names
from llava_moe.training.hardware import TrainingWork, peak_flops, peak_memory_gib, product_dtype, training_work
from llava_moe.training.stage import part_of
from llava_moe.training.telemetry import site_name
from llava_moe.training.throughput import Counts, Lap, WaitWarning, largest

FILE = "metrics.jsonl"
_OLD_FILE = "telemetry.jsonl"  # its name until version 0.2; a run that began under it goes on under the new one
_TOTALS = "progress.json"  # samples and tokens up to the last checkpoint


class SiteLosses:
    """Sums each balance loss at each MoE layer on the device, between two log lines."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, tuple[SiteKey, ...]], Tensor] = {}
        self._updates = 0

    @torch.no_grad()
    def update(self, losses: Mapping[str, Mapping[SiteKey, Tensor]]) -> None:
        """Takes one micro-batch: the value of each loss at each layer."""
        self._updates += 1
        for name, by_site in losses.items():
            value, key = torch.stack([v.detach() for v in by_site.values()]), (name, tuple(by_site))
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def flush(self) -> dict[str, dict[str, float]]:
        """By layer and loss, means over updates and ranks since the last call; every rank must call it."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        found: dict[str, dict[str, float]] = {}
        for (name, sites), sums in self._sums.items():
            if dist.is_initialized():
                dist.all_reduce(sums)
            for site, value in zip(sites, (sums / (self._updates * world)).tolist(), strict=True):
                found.setdefault(site_name(site), {})[name] = round(value, 7)
        self._sums, self._updates = {}, 0
        return found


class MetricsCallback(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Makes a row at every log step, writes it to the file, and hands its numbers to the loggers.

    It must come before the loggers in the Trainer's list of callbacks, as it adds to the logs that they are given.

    Attributes:
        row: the last one.
        watchers: called with each new row on every rank, before it is written; they may add to it.
    """

    def __init__(self, trainer: Any, output_dir: str | Path, wait_warning: WaitWarning) -> None:
        self.trainer = trainer
        self.path = Path(output_dir) / FILE
        self.row: dict[str, Any] = {}
        self.watchers: list[Callable[[dict[str, Any]], None]] = []
        # Parts by the optimiser's groups, whose order DeepSpeed and accelerate keep; a part has up to two of them.
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        self._parts = [part_of(names[id(group["params"][0])]) for group in trainer.parameter_groups]
        self._rates: dict[str, float] = {}
        self._told: dict[str, Any] = {}
        self._interval, self._total = Counts(), Counts()
        self._wait_warning = wait_warning
        self._work: TrainingWork | None = None
        self._peak: float | None = None

    def tell(self, **values: Any) -> None:
        """Adds values to the next row; numbers in them, also in mappings, go to the loggers too."""
        self._told.update(values)

    def measure_work(self) -> None:
        """Counts the operations of a step and asks for the device's peak."""
        model = self.trainer.model
        self._work = training_work(model.config, learning_names(model))
        device = torch.cuda.get_device_name(self.trainer.args.device)
        self._peak = peak_flops(device, product_dtype(self.trainer.args, model))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _cut_back(self.path, state.global_step)
        self._total = _seen(self.path, args, state.global_step)
        if args.device.type == "cuda":
            self.measure_work()
        self.trainer.stopwatch.start(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The scheduler has moved on by the time a step is logged, under DeepSpeed even before the step ends.
        groups = self.trainer.optimizer.param_groups
        self._rates = {part: float(group["lr"]) for part, group in zip(self._parts, groups, strict=True)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.stopwatch.mark()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._drain()
        if state.is_world_process_zero:
            totals = {"step": state.global_step, "samples": self._total.samples, "tokens": self._total.tokens}
            _write_whole(self.path.with_name(_TOTALS), json.dumps(totals))
        self.trainer.stopwatch.paused()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.stopwatch.paused()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            self.trainer.stopwatch.paused()  # somebody has scored the model, or the run is over
            (logs or {}).pop("total_flos", None)  # counts padding and all experts as if a token met them
            return
        self.row = self._make_row(args, state, logs)
        for watcher in self.watchers:
            watcher(self.row)
        logs.update((key, value) for key, value in flat(self.row) if key not in logs)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(_finite(self.row)) + "\n")
        self.trainer.stopwatch.mark()

    def _make_row(self, args: Any, state: Any, logs: Mapping[str, Any]) -> dict[str, Any]:
        routing = self.trainer.meter.flush()
        for layer, losses in self.trainer.site_losses.flush().items():
            routing.setdefault("layers", {}).setdefault(layer, {})["losses"] = losses
        self._drain()
        counts, self._interval = self._interval, Counts()
        lap = self.trainer.stopwatch.lap(state.global_step)
        wait, memory = largest([lap.wait, peak_memory_gib(args.device)], args.device)
        told, self._told = self._told, {}
        controllers = self.trainer.controllers.logged()
        row = {
            "step": state.global_step,
            "epoch": None if state.epoch is None else round(state.epoch, 4),
            "loss": logs["loss"],
            "cross_entropy": routing.pop("cross_entropy"),
            **{name: value for name, value in routing.items() if name != "layers"},
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": self._rates,
            "seconds_per_step": _short(lap.seconds / lap.steps),
            "pause": _short(lap.pause),
            "tokens_per_second": _short(counts.tokens / lap.seconds),
            "useful_tokens": _short(counts.tokens / max(counts.places, 1)),
            "label_tokens": counts.labels,
            "samples": self._total.samples,
            "tokens": self._total.tokens,
            "data_wait": _short(wait / lap.steps),
            "data_wait_share": _short(wait / lap.seconds),
            **self._utilisation(counts, lap, args.world_size),
            "peak_memory_gib": _short(memory),
            **({"controllers": controllers} if controllers else {}),
            **told,
            **({"layers": routing["layers"]} if "layers" in routing else {}),
        }
        warning = self._wait_warning.add(lap.steps, lap.seconds, wait)
        if warning is not None and state.is_world_process_zero:
            print(warning, flush=True)
        return row

    def _utilisation(self, counts: Counts, lap: Lap, world_size: int) -> dict[str, float | None]:
        if self._work is None:
            return {"tflops": None, "mfu": None}
        rate = self._work.total(counts) / lap.seconds / world_size
        return {"tflops": _short(rate / 1e12), "mfu": None if self._peak is None else _short(rate / self._peak)}

    def _drain(self) -> None:
        counts = self.trainer.counts.drain()
        self._interval, self._total = self._interval + counts, self._total + counts


def flat(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row under names such as `routing/0/max_violation`, as loggers take them; lists are left out."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            prefix = "routing" if key == "layers" else key
            yield from ((f"{prefix}/{name}", number) for name, number in flat(value))
        elif isinstance(value, int | float) and key != "step":
            yield key, value


def _short(value: float) -> float:
    """Four digits: what a clock measures is no more exact, and the file stays readable."""
    return float(f"{value:.4g}")


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row in strict JSON, which has no word for infinity and NaN."""
    bad: list[str] = []

    def clean(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item, f"{name}/{key}" if name else key) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, name) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            bad.append(name)
            return None
        return value

    cleaned = clean(row, "")
    return {**cleaned, "not_finite": list(dict.fromkeys(bad))} if bad else cleaned


def _cut_back(path: Path, step: int) -> None:
    """After a crash the file may be ahead of the checkpoint; the steps behind it will run again."""
    old = path.with_name(_OLD_FILE)
    if old.is_file() and not path.is_file():
        old.rename(path)
    if not path.is_file():
        return
    _write_whole(path, "".join(f"{line}\n" for line in path.read_text().splitlines() if _step(line) <= step))


def _write_whole(path: Path, text: str) -> None:
    """A kill leaves the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _seen(path: Path, args: Any, step: int) -> Counts:
    """What a run had seen when it was interrupted after this step."""
    totals = path.with_name(_TOTALS)
    if totals.is_file():
        found = json.loads(totals.read_text())
        if found["step"] == step:
            return Counts(samples=found["samples"], tokens=found["tokens"])
    # Killed between the checkpoint and this file, or begun by an older version: as many as the batches had places for,
    # and the tokens of the last line.
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step] if path.is_file() else []
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return Counts(samples=step * batch, tokens=rows[-1].get("tokens", 0) if rows else 0)


def _step(line: str) -> int:
    """The step of one line; a line cut off by a crash counts as never written."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 2**62


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """All rows of a run, finished or not."""
    path = Path(output_dir) / FILE
    if not path.is_file():
        path = path.with_name(_OLD_FILE)
    return [json.loads(line) for line in path.read_text().splitlines()]


def spent_seconds(output_dir: str | Path, step: int) -> float:
    """Seconds that a run has spent up to a step, by its metrics; 0 where it has written none."""
    folder = Path(output_dir)
    if not (folder / FILE).is_file() and not (folder / _OLD_FILE).is_file():
        return 0.0
    total, previous = 0.0, 0
    for row in read_metrics(folder):
        if row["step"] <= step:
            total += row["seconds_per_step"] * (row["step"] - previous) + row.get("pause", 0.0)
            previous = row["step"]
    return total
