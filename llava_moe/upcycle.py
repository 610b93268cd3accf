"""Main of `llava-moe upcycle RECIPE [key=value ...]`: a dense checkpoint becomes an MoE one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llava_moe.calibration import calibration_batches
from llava_moe.config import RecipeError, UpcycleSection, load_recipe
from llava_moe.model.assemble import check_checkpoint, fingerprint
from llava_moe.model.foreign import is_foreign
from llava_moe.model.upcycling import PROVENANCE, upcycle
from llava_moe.model_card import Origin, start_facts, write_card


def upcycled_path(output_dir: str) -> Path:
    """Where the start point of an MoE run lies."""
    return Path(output_dir) / "upcycled"


def run(recipe: str, overrides: Sequence[str] = (), parent: str | None = None, to: str | None = None) -> Path:
    """Writes `to`, or `<output_dir>/upcycled`, unless it is there already from the same section and parent."""
    given = ["stage.name=upcycle", "grow=null"]  # what else is in the recipe need not be complete
    given += [f"upcycle.parent={json.dumps(parent)}"] if parent is not None else []
    given += [f"output_dir={json.dumps(to)}"] if to is not None else []
    config = load_recipe(recipe, [*overrides, *given])
    if config.upcycle is None:
        raise RecipeError(f"{recipe}: has no section `upcycle`")
    section = config.upcycle
    check_checkpoint(section.parent, is_foreign)
    out = upcycled_path(config.output_dir) if to is None else Path(to)
    provenance = out / PROVENANCE
    if provenance.is_file():
        known = json.loads(provenance.read_text())
        if known.get("parent_fingerprint") == fingerprint(section.parent) and known["section"] == asdict(section):
            print(f"upcycle: {out} is there already")
            return out
    samples = None
    if section.calibration is not None:
        samples = partial(calibration_batches, section.calibration, section.parent)
    facts = upcycle(section, out, samples, finish=partial(_card, out.name, section))
    dense, moe = facts["parameters"]["dense"], facts["parameters"]["moe"]
    print(
        f"upcycle: {section.parent} -> {out}\n"
        f"{_parts(section, facts)}"
        f"  parameters: dense {dense['total']:,}; MoE {moe['total']:,} total, {moe['active']:,} active\n"
        f"  largest logit difference to the dense parent: {facts['max_abs_logit_error']:.2e} "
        f"(logits up to {facts['max_abs_logit']:.1f}, float32); "
        f"{facts['greedy_agreement']:.1%} of {facts['num_tokens']} next tokens are the same"
    )
    return out


def _card(name: str, section: UpcycleSection, folder: Path, facts: dict[str, Any]) -> None:
    done = {"contract": facts["contract"], "largest logit difference to the parent": facts["max_abs_logit_error"]}
    recipe = yaml.safe_dump({"upcycle": asdict(section)}, sort_keys=False)
    origin = Origin(
        name, "llava-moe upcycle", [section.parent], recipe=recipe, facts=done | start_facts(section.parent)
    )
    write_card(folder, origin)


def _parts(section: UpcycleSection, facts: dict[str, Any]) -> str:
    lines = []
    for name, part in section.parts().items():
        where = f"{name} layers {facts['layers'][name]}" if name != "projector" else name
        lines.append(f"  {where}: {part.num_experts} experts, router {part.router.name}, {part.upcycler.name}\n")
    return "".join(lines)


if __name__ == "__main__":
    from llava_moe.cli import exit_on_user_error, making_parser

    with exit_on_user_error():
        if len(sys.argv) < 2:
            raise RecipeError("name a recipe: python -m llava_moe.upcycle RECIPE [key=value ...]")
        found = making_parser("upcycle").parse_intermixed_args(sys.argv[1:])
        run(found.recipe, found.overrides, found.parent, found.to)
