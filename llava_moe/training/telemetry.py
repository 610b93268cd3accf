"""Live routing telemetry: balance of every layer, written beside the loss while training runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from llava_moe.moe import LayerStats, Routing, RoutingScope, SiteKey
from llava_moe.moe.capacity import DROPPED

FILE = "telemetry.jsonl"


def site_name(site: SiteKey) -> str:
    """The index alone for a decoder layer; "vision.3" and "projector.0" elsewhere."""
    part, layer = site
    return str(layer) if part == "decoder" else f"{part}.{layer}"


class RoutingMeter:
    """Sums loss parts and expert loads on the device between two log lines; nothing waits for the host."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}
        self._loads: dict[str, Tensor] = {}
        self._entropies: dict[str, Tensor] = {}
        self._dropped: dict[str, Tensor] = {}
        self._updates = 0

    @torch.no_grad()
    def update(
        self,
        parts: Mapping[str, Tensor],
        routings: Mapping[SiteKey, Routing],
        scope: RoutingScope,
        stats: Mapping[SiteKey, LayerStats],
    ) -> None:
        """Takes one micro-batch: the parts of its objective, its routings, and what was measured of them."""
        self._updates += 1
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(value)) + value
        for site, routing in routings.items():
            layer, mask_T = site_name(site), scope.context_of(site).token_mask_T
            load_E = stats[site].load_E
            self._loads[layer] = self._loads.get(layer, torch.zeros_like(load_E)) + load_E
            if DROPPED in routing.extras:
                dropped = stats[site].num_dropped
                self._dropped[layer] = self._dropped.get(layer, torch.zeros_like(dropped)) + dropped
            entropy_T = -(routing.probs_TE * routing.probs_TE.clamp(min=1e-9).log()).sum(-1)
            mean = (entropy_T * mask_T).sum() / mask_T.sum().clamp(min=1)
            self._entropies[layer] = self._entropies.get(layer, torch.zeros_like(mean)) + mean

    def flush(self) -> dict[str, Any]:
        """Means over updates and ranks since the last call; every rank must call it.

        Per layer: `load`, the share of slots of each expert; `max_violation`, fullest expert over the mean, minus 1;
        `entropy` of the router's probabilities in nats; `drop_rate`, the share of the slots that the capacity emptied,
        where there is one.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if dist.is_initialized():
            for sums in (self._parts, self._loads, self._entropies, self._dropped):
                for tensor in sums.values():
                    dist.all_reduce(tensor)
        count = max(self._updates * world, 1)
        row: dict[str, Any] = {name: float(value) / count for name, value in self._parts.items()}
        layers = {}
        for layer, load_E in self._loads.items():
            share = load_E / load_E.sum().clamp(min=1)
            layers[layer] = {
                "load": [round(v, 5) for v in share.tolist()],
                "max_violation": round(float(share.max() * len(share) - 1), 5),
                "entropy": round(float(self._entropies[layer]) / count, 5),
            }
            if layer in self._dropped:
                dropped = float(self._dropped[layer])
                layers[layer]["drop_rate"] = round(dropped / max(dropped + float(load_E.sum()), 1.0), 5)
        if layers:
            row["layers"] = layers
        self.__init__()  # type: ignore[misc]  # starts counting anew
        return row


class TelemetryCallback(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Appends one JSON line per log line to `<output_dir>/telemetry.jsonl`."""

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / FILE
        self.trainer: Any = None
        self._since = (0, time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = (state.global_step, time.perf_counter())
        if state.is_world_process_zero and self.path.is_file():
            # After a crash the file may be ahead of the checkpoint; those steps will be run again.
            rows = [line for line in self.path.read_text().splitlines() if _step(line) <= state.global_step]
            self.path.write_text("".join(f"{line}\n" for line in rows))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        row = self.trainer.meter.flush()
        told = self.trainer.controllers.logged()
        if told:
            row["controllers"] = told
        step, start = self._since
        now = time.perf_counter()
        self._since = (state.global_step, now)
        seconds = (now - start) / max(state.global_step - step, 1)
        row = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "seconds_per_step": round(seconds, 4),
            **row,
        }
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _step(line: str) -> int:
    """The step of one telemetry line; a line cut off by a crash counts as never written."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 2**62


def read_telemetry(output_dir: str | Path) -> list[dict[str, Any]]:
    """All rows of a run."""
    return [json.loads(line) for line in (Path(output_dir) / FILE).read_text().splitlines()]
