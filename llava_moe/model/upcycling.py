"""Dense checkpoint in, MoE checkpoint out. Training never does this surgery, so the start point can be scored.

The result is written tensor by tensor. In memory are, at a time, one MoE layer and the dense block that it comes from;
and while the result is compared with its parent, one layer in float32 of one of the two, unless they are small.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from llava_moe.config import UpcycleSection
from llava_moe.model.assemble import fingerprint, whole_directory
from llava_moe.model.calibrating import Watched, sample_labels, statistics_of
from llava_moe.model.foreign import ForeignConfigMixin
from llava_moe.model.measuring import (
    TOLERANCE,
    Agreement,
    Batch,
    Scratch,
    builtin_batches,
    compare,
    load_tools,
    logit_error,
    scratch_bytes,
)
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import WHOLE_MODEL_BYTES, open_model
from llava_moe.model.streaming import MAX_SHARD_BYTES, CheckpointWriter, check_space
from llava_moe.model.upcycling_layer import make_layer
from llava_moe.model.upcycling_plan import PartPlan, Plan, block_path, make_plan, mean_of, moe_part, select_layers
from llava_moe.moe import MoELayer
from llava_moe.moe.upcycling import Copy, NeuronStatistics

__all__ = [
    "PROVENANCE",
    "TOLERANCE",
    "block_path",
    "count_parameters",
    "logit_error",
    "moe_part",
    "select_layers",
    "upcycle",
]

PROVENANCE = "upcycle.json"
_SCRATCH = "scratch"
Samples = Callable[[], Sequence[Batch]]


def upcycle(
    section: UpcycleSection,
    out: Path,
    samples: Samples | None = None,
    whole_bytes: int = WHOLE_MODEL_BYTES,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finish: Callable[[Path, dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Writes the MoE checkpoint and returns its provenance, which is also saved beside it.

    Args:
        section: what to do.
        out: the directory to write; it appears when it is complete.
        samples: reads the batches of `section.calibration`.
        whole_bytes: models that take no more in float32 are loaded whole to be run.
        max_shard_bytes: a file of weights is at most this large.
        finish: called with the finished directory and the provenance, before the directory takes its name.

    Raises:
        CheckpointError: the parent is no dense checkpoint, the disk is full, or the result breaks an exactness that its
            parts declare; nothing is left then.
        ValueError: the section asks for something that does not exist.
    """
    plan = make_plan(section, out)
    if section.calibration is not None and samples is None:
        raise ValueError("upcycle.calibration is set, but nobody reads its samples; use llava_moe.upcycle.run")
    text_config = plan.config.get_text_config(decoder=True)
    # How to draw a prompt with a picture is known of LLaVA's processors alone.
    foreign = isinstance(plan.config, ForeignConfigMixin)
    tools = load_tools(plan.parent.path, pictures=not foreign)
    limit = int(text_config.max_position_embeddings)
    batches = builtin_batches(tools, limit) if samples is None else list(samples())
    checkpoint = sum(info.nbytes for info in plan.infos.values())
    check_space(out, checkpoint + scratch_bytes(text_config, batches))
    with whole_directory(out) as folder:
        if foreign:
            _copy_tools(plan.parent.path, folder)
        else:
            tools.save_pretrained(folder)
        _save_configs(plan, folder)
        with CheckpointWriter(folder, plan.infos, max_shard_bytes) as writer:
            exact = _write(plan, section.seed, batches, writer, whole_bytes)
        agreement = _measure(plan, folder, batches, whole_bytes)
        _check_exact(plan, exact, agreement)
        provenance = _provenance(section, plan, exact, agreement)
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2))
        if finish is not None:
            finish(folder, provenance)
    return provenance


def _copy_tools(parent: Path, folder: Path) -> None:
    """Tokenizer and processors of a class that is not ours, file by file."""
    for file in sorted(parent.iterdir()):
        ours = file.name in ("config.json", "model.safetensors.index.json", PROVENANCE, "README.md")
        if file.is_file() and not ours and file.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken"):
            shutil.copyfile(file, folder / file.name)


def _measured_on(section: UpcycleSection, plan: Plan) -> str:
    if section.calibration is not None:
        return "calibration"
    return "built-in text" if isinstance(plan.config, ForeignConfigMixin) else "built-in text and picture"


def _save_configs(plan: Plan, folder: Path) -> None:
    plan.config.save_pretrained(folder)
    generation = plan.parent.path / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    else:
        plan.model.generation_config.save_pretrained(folder)


def _write(plan: Plan, seed: int, batches: Sequence[Batch], writer: CheckpointWriter, whole_bytes: int) -> bool:
    """Writes every tensor; whether all layers equal their dense blocks, except for rounding."""
    # One generator for everything, so no two layers start alike; in the order of the parts and layers and not of the
    # files, so the same parent in other shards gives the same result.
    generator = torch.Generator().manual_seed(seed)
    exact = True
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("upcycling", total=sum(len(part.blocks) for part in plan.parts) + 1)
        for part in plan.parts:
            for block, found in zip(part.blocks, _statistics(plan, part, seed, batches, whole_bytes), strict=True):
                parents = partial(plan.dense, block, part.upcycler)
                made = make_layer(block, part.moe, part.upcycler, parents, generator, found)
                exact &= made.exact
                for name in list(made.tensors):
                    _write_pieces(plan, f"{block.path}.{name}", made.tensors.pop(name), writer)
                progress.update(bar, advance=1, description=f"upcycling {block.site}")
        progress.update(bar, description="copying the rest")
        for name in plan.kept:
            if plan.sources == (plan.parent,):
                writer.copy(name, plan.parent.reader)
            else:
                writer.write(name, mean_of(plan.parent.keys[name], plan.sources).to(plan.infos[name].dtype))
        progress.update(bar, advance=1, description="written")
    return exact


def _write_pieces(plan: Plan, key: str, tensor: Tensor, writer: CheckpointWriter) -> None:
    for piece in plan.pieces[key]:
        writer.write(piece.name, piece.of(tensor).to(plan.infos[piece.name].dtype))


def _statistics(
    plan: Plan, part: PartPlan, seed: int, batches: Sequence[Batch], whole_bytes: int
) -> Iterator[NeuronStatistics | None]:
    """What the upcycler of a part wants to know of each of its blocks."""
    if part.upcycler.needs == "nothing":
        yield from [None] * len(part.blocks)
        return
    numbers = [block.num_experts for block in part.blocks]
    labels = sample_labels(plan.parent, part.upcycler, numbers, batches, seed)
    watched = [Watched(block.path, block.spec, block.num_experts) for block in part.blocks]
    model = open_model(plan.parent.path, whole_bytes)
    yield from statistics_of(model, part.name, watched, part.upcycler, batches, labels)


def _measure(plan: Plan, made: Path, batches: Sequence[Batch], whole_bytes: int) -> Agreement:
    sites = {block.site: block.path for part in plan.parts for block in part.blocks}
    scratch = Scratch(made / _SCRATCH)
    try:
        return compare(
            lambda: open_model(plan.parent.path, whole_bytes),
            lambda: open_model(made, whole_bytes),
            batches,
            scratch,
            sites,
        )
    finally:
        shutil.rmtree(scratch.folder)


def _check_exact(plan: Plan, exact: bool, agreement: Agreement) -> None:
    """Raises CheckpointError where rounding does not explain how far an exact result is from its parent."""
    tolerance = TOLERANCE
    for part in plan.parts:
        dtypes = {
            plan.infos[piece.name].dtype for block in part.blocks for piece in plan.pieces[_down(plan, block.path)]
        }
        if not isinstance(part.upcycler, Copy):
            # Scaled weights are rounded to the dtype they are stored in; copies are the parent's own numbers.
            tolerance = max([tolerance, *(torch.finfo(d).eps for d in dtypes if d.itemsize < 4)])
    if exact and not agreement.within(tolerance):
        raise CheckpointError(
            f"upcycling {plan.parent.path} is not exact: logits of up to {agreement.max_abs_logit:.1f} differ by "
            f"{agreement.max_abs_logit_error:.2e}, more than the {tolerance} of them that rounding explains, and the "
            f"layers by up to {max(agreement.layer_errors.values(), default=0.0):.2e} of their norm"
        )


def _down(plan: Plan, path: str) -> str:
    """The down projections of a layer's experts, or the block that they share."""
    return next(key for key in plan.pieces if key.startswith(f"{path}.experts.") and key.endswith("down_proj"))


def _provenance(section: UpcycleSection, plan: Plan, exact: bool, agreement: Agreement) -> dict[str, Any]:
    names = ("llava-moe", "torch", "transformers")
    return {
        "parent": str(section.parent),
        "parent_fingerprint": fingerprint(section.parent),
        "section": dataclasses.asdict(section),
        "seed": section.seed,
        "versions": {name: version(name) for name in names},
        "layers": {part.name: list(part.moe.layers) for part in plan.parts},
        "method": {name: part.upcycler.name for name, part in section.parts().items()},
        "contract": {part.name: part.upcycler.contract.value for part in plan.parts},
        "sources": [str(source.path) for source in plan.sources],
        "left_out": plan.parent.strays,
        "exact": exact,
        "measured_on": _measured_on(section, plan),
        "num_tokens": agreement.num_tokens,
        "max_abs_logit_error": agreement.max_abs_logit_error,
        "max_abs_logit": agreement.max_abs_logit,
        "greedy_agreement": agreement.greedy_agreement,
        "layer_errors": agreement.layer_errors,
        "rounding_error": agreement.rounding_error,
        "parameters": {"dense": count_parameters(plan.parent.model), "moe": count_parameters(plan.model)},
    }


def count_parameters(model: Any) -> dict[str, int]:
    """Total, and active for one token: of E feed-forward experts only as many as the router uses.

    A block that all experts share is always active, as are side branches and shared experts.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            idle += layer.experts.idle_parameters(layer.router.active_experts)
        for native in getattr(layer, "native_layers", {}).values():
            idle += native.idle_parameters()
    return {"total": total, "active": total - round(idle)}
