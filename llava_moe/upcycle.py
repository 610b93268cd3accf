"""Main of `llava-moe upcycle RECIPE [key=value ...]`: a dense checkpoint becomes an MoE one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llava_moe.config import RecipeError, load_recipe
from llava_moe.model.assemble import check_checkpoint, fingerprint
from llava_moe.model.upcycling import PROVENANCE, upcycle


def upcycled_path(output_dir: str) -> Path:
    """Where the start point of an MoE run lies."""
    return Path(output_dir) / "upcycled"


def run(recipe: str, overrides: Sequence[str] = ()) -> Path:
    """Writes `<output_dir>/upcycled`, unless it is there already from the same section."""
    config = load_recipe(recipe, overrides)
    if config.upcycle is None:
        raise RecipeError(f"{recipe}: has no section `upcycle`")
    check_checkpoint(config.upcycle.parent)
    out = upcycled_path(config.output_dir)
    provenance = out / PROVENANCE
    if provenance.is_file():
        known = json.loads(provenance.read_text())
        same_parent = known.get("parent_fingerprint") == fingerprint(config.upcycle.parent)
        if same_parent and known["section"] == asdict(config.upcycle):
            print(f"upcycle: {out} is there already")
            return out
    facts = upcycle(config.upcycle, out)
    dense, moe = facts["parameters"]["dense"], facts["parameters"]["moe"]
    print(
        f"upcycle: {config.upcycle.parent} -> {out}\n"
        f"  layers {facts['layers']}, {config.upcycle.num_experts} experts, {config.upcycle.upcycler.name}\n"
        f"  parameters: dense {dense['total']:,}; MoE {moe['total']:,} total, {moe['active']:,} active\n"
        f"  largest logit difference to the dense parent: {facts['max_abs_logit_error']:.2e} "
        f"(logits up to {facts['max_abs_logit']:.1f}, float32)"
    )
    return out


if __name__ == "__main__":
    from llava_moe.cli import exit_on_user_error

    with exit_on_user_error():
        if len(sys.argv) < 2:
            raise RecipeError("name a recipe: python -m llava_moe.upcycle RECIPE [key=value ...]")
        run(sys.argv[1], sys.argv[2:])
