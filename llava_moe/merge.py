"""Puts the LoRA adapters of a run into the checkpoint that they were trained on: a whole checkpoint, as any other.

ADAPTER is the folder `<output_dir>/adapter` of a run, wherever it lies now. The sum is made in float32 and rounded
once, tensor by tensor, in the memory of one weight; the result equals `<output_dir>/model` of that run bit for bit. A
base other than the one that the adapters were trained on is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava_moe.model.lora_merge import merge_adapter, read_adapter
from llava_moe.model.modeling import CheckpointError
from llava_moe.model_card import Origin, start_facts, write_card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-moe merge`."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter directory of a run")
    parser.add_argument(
        "--base", type=Path, metavar="CHECKPOINT", help="where the base lies now (default: where the run found it)"
    )
    parser.add_argument("--to", type=Path, metavar="DIRECTORY", help="where the result goes (default: ADAPTER-merged)")


def main(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    merge(arguments.adapter, arguments.base, arguments.to)


def merge(adapter: Path, base: Path | None = None, to: Path | None = None) -> Path:
    """Writes the whole checkpoint and returns its directory.

    Raises:
        CheckpointError: the adapter or the base are refused, or the result is there already.
    """
    adapter = adapter.absolute()
    out = adapter.with_name(f"{adapter.name}-merged") if to is None else to
    if out.exists():
        raise CheckpointError(f"{out} is there already; delete it, or name another directory with --to")
    facts = read_adapter(adapter).facts
    place = str(facts["base"] if base is None else base)
    merge_adapter(adapter, base, out, lambda folder, found: _card(folder, out.name, place, found))
    print(
        f"merge: {adapter} + {place} -> {out}\n"
        f"  {len(facts['adapted'])} weights with adapters of rank {facts['rank']}, in {facts['dtype']}"
    )
    return out


def _card(folder: Path, name: str, base: str, facts: dict[str, Any]) -> None:
    rows = {key: facts[key] for key in ("rank", "alpha", "rslora", "quantize") if facts[key] not in (None, False)}
    done = {f"LoRA: {key}": value for key, value in rows.items()}
    write_card(folder, Origin(name, "llava-moe merge", [base], facts=done | start_facts(base)))
