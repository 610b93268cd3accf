"""A loss or gradient that is not finite stops the run, with the ids of the samples, before anything of it is saved.

Nothing here makes the device wait in a step: the loss of every micro-batch leaves a flag on the device, the flags of a
step are joined over the ranks, and the host reads them at the end of the next step, when they have long arrived. Before
a checkpoint is written they are read at once, and the weights themselves are looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llava_moe.training import distributed
from llava_moe.training.checkpoints import describe_last
from llava_moe.training.objective import Objective

FILE = "nan.json"
_SHOWN = 8


class NotFiniteError(ValueError):
    """The loss, its gradient or the weights are not finite; the message names the file with the samples."""


@dataclass
class StepRecord:
    """What a step leaves behind until it is known to be sound; the numbers stay on the device.

    Attributes:
        step: counted from 1.
        micro_batches: ids of the samples, the objective, and its parts.
        grad_norm: before clipping; None until it is known.
    """

    step: int
    micro_batches: list[tuple[Sequence[str], Tensor, dict[str, Tensor]]] = field(default_factory=list)
    grad_norm: Tensor | float | None = None

    def flag(self, device: torch.device) -> Tensor:
        """1 on the device if anything of this rank is not finite, else 0: int32, shape ()."""
        found = torch.zeros((), dtype=torch.bool, device=device)
        for _, total, _ in self.micro_batches:
            found = found | ~torch.isfinite(total)
        if isinstance(self.grad_norm, Tensor):
            found = found | ~torch.isfinite(self.grad_norm).to(device)
        elif self.grad_norm is not None and not 0 <= self.grad_norm < math.inf:  # DeepSpeed says -1 in places
            found = torch.ones_like(found)
        return found.to(torch.int32)

    def told(self) -> dict[str, Any]:
        """For nan.json; waits for the device."""
        batches = []
        for ids, total, parts in self.micro_batches:
            values = {name: float(value) for name, value in parts.items()}
            batches.append(
                {
                    "sample_ids": list(ids),
                    "loss": _plain(float(total)),
                    "parts": {name: _plain(value) for name, value in values.items()},
                    "not_finite": [name for name, value in values.items() if not math.isfinite(value)],
                }
            )
        norm = None if self.grad_norm is None else _plain(float(self.grad_norm))
        return {"step": self.step, "grad_norm": norm, "micro_batches": batches}


def _plain(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class _Pending:
    """The joined flags of a step on their way to the host."""

    flags: Tensor
    arrived: Any  # a CUDA event, or None where they are there

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return [int(value) for value in self.flags.tolist()]


class Health:
    """Keeps the record of this step and of the one before, and joins the flags of all ranks.

    Args:
        output_dir: where `nan.json` goes.
        device: of the training.

    Attributes:
        lags: whether the flags of a step are read at the end of the next one.
    """

    def __init__(self, output_dir: str | Path, device: torch.device) -> None:
        self.out = Path(output_dir)
        self.device = device
        self.lags = device.type == "cuda"
        self.record = StepRecord(1)
        self.previous: StepRecord | None = None
        self._pending: _Pending | None = None

    def observe(self, sample_ids: Sequence[str] | None, objective: Objective) -> None:
        """Takes one micro-batch of training."""
        self.record.micro_batches.append((sample_ids or [], objective.total.detach(), objective.parts))

    def start(self, step: int) -> None:
        """At the beginning of a step."""
        self.record = StepRecord(step)

    def finish(self, asked_to_stop: bool, at_once: bool) -> bool:
        """At the end of a step, on every rank; whether any rank was asked to stop.

        Args:
            asked_to_stop: what this rank knows.
            at_once: also reads what this very step has left, and waits for it.

        Raises:
            NotFiniteError: on every rank, where any has met something that is not finite.
        """
        stop = False
        if self._pending is not None:
            stop = self._judge(self._pending.read())
        bad = self.record.flag(self.device)
        flags = torch.stack([bad, torch.full_like(bad, int(asked_to_stop))])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.previous, self._pending = self.record, self._sent(flags)
        if at_once or stop or not self.lags:
            stop = self.settle() or stop
        return stop

    def settle(self) -> bool:
        """Reads what is still on its way; every rank must call it. Returns and raises as `finish` does."""
        pending, self._pending = self._pending, None
        return pending is not None and self._judge(pending.read())

    def _sent(self, flags: Tensor) -> _Pending:
        if flags.device.type != "cuda":
            return _Pending(flags, None)
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Pending(host, arrived)

    def _judge(self, flags: list[int]) -> bool:
        if flags[0]:
            self.fail("the loss or its gradient")
        return bool(flags[1])

    def check_weights(self, model: nn.Module) -> None:
        """Before they are saved; every rank must call it.

        Raises:
            NotFiniteError: a parameter that learns is not finite on some rank.
        """
        # ds_tensor is what ZeRO-3 leaves of a parameter on this rank
        mine = any_not_finite(getattr(p, "ds_tensor", p) for p in model.parameters() if p.requires_grad)
        if any(distributed.gather(mine)):
            self.fail("a weight")

    def fail(self, what: str) -> None:
        """Writes `nan.json` and raises; every rank must call it.

        Raises:
            NotFiniteError: always.
        """
        kept = {record.step: record for record in (self.previous, self.record) if record is not None}
        steps = [record.told() for record in kept.values() if record.micro_batches]
        ranks = [{"rank": rank, "steps": told} for rank, told in enumerate(distributed.gather(steps))]
        last = describe_last(self.out)
        file = self.out / FILE
        if distributed.rank() == 0:
            file.write_text(json.dumps({"not_finite": what, "checkpoint": last, "ranks": ranks}, indent=2))
        raise NotFiniteError(f"{_summary(what, ranks)}; all samples of the step are in {file}; {last}, {_ADVICE}")


_ADVICE = (
    "and starting again goes on from there. The same samples will come again: mend or leave out those that are wrong, "
    "or train with lower rates or bfloat16 off in another output_dir"
)


def _summary(what: str, ranks: list[dict[str, Any]]) -> str:
    """The first step in which something was not finite, the parts that were not, and some of the samples."""
    steps = [(step["step"], rank["rank"], step) for rank in ranks for step in rank["steps"]]
    culprits = [s for s in steps if any(isinstance(b["loss"], str) for b in s[2]["micro_batches"])]
    first = min((number for number, *_ in culprits), default=max((number for number, *_ in steps), default=0))
    ids: list[str] = []
    parts: list[str] = []
    for number, _, step in culprits or steps:
        for batch in step["micro_batches"] if number == first else ():
            if not culprits or isinstance(batch["loss"], str):
                ids += batch["sample_ids"]
                parts += [part for part in batch["not_finite"] if part not in parts]
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    shown = ", ".join(repr(name) for name in ids[:_SHOWN]) + more
    said = f" ({', '.join(parts)})" if parts else ""
    return f"step {first}: {what} is not finite{said}; the samples were {shown or 'not named'}"


@torch.no_grad()
def any_not_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether any value of these tensors is not finite; waits for each device once and copies nothing."""
    found: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            smallest, largest = torch.aminmax(tensor.detach())  # NaN if any value is
            bad = ~(torch.isfinite(smallest) & torch.isfinite(largest))
            found[tensor.device] = found[tensor.device] | bad if tensor.device in found else bad
    return any(bool(bad) for bad in found.values())
