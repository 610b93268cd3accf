"""Main of `llava-moe grow RECIPE [key=value ...]`: a small dense checkpoint becomes a larger dense one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llava_moe.config import GrowSection, RecipeError, load_recipe
from llava_moe.model.assemble import fingerprint
from llava_moe.model.growing import PROVENANCE, grow
from llava_moe.model_card import Origin, start_facts, write_card


def grown_path(output_dir: str) -> Path:
    """Where the grown checkpoint lies."""
    return Path(output_dir) / "grown"


def run(recipe: str, overrides: Sequence[str] = (), parent: str | None = None, to: str | None = None) -> Path:
    """Writes `to`, or `<output_dir>/grown`, unless it is there already from the same section and parent."""
    given = ["stage.name=grow", "upcycle=null"]  # what else is in the recipe need not be complete
    given += [f"grow.parent={json.dumps(parent)}"] if parent is not None else []
    given += [f"output_dir={json.dumps(to)}"] if to is not None else []
    config = load_recipe(recipe, [*overrides, *given])
    if config.grow is None:
        raise RecipeError(f"{recipe}: has no section `grow`")
    section = config.grow
    out = grown_path(config.output_dir) if to is None else Path(to)
    provenance = out / PROVENANCE
    if provenance.is_file() and (Path(section.parent) / "config.json").is_file():
        known = json.loads(provenance.read_text())
        if known["parent_fingerprint"] == fingerprint(section.parent) and known["section"] == asdict(section):
            print(f"grow: {out} is there already")
            return out
    facts = grow(section, out, finish=partial(_card, out.name, section))
    sizes = [
        f"{key} {facts['source'][key]} -> {value}"
        for key, value in facts["target"].items()
        if value != facts["source"][key]
    ]
    promised = "exact" if facts["exact"] else "not exact"
    print(
        f"grow: {section.parent} -> {out}\n"
        f"  {', '.join(sizes)}\n"
        f"  parameters: {facts['parameters']['parent']:,} -> {facts['parameters']['grown']:,}\n"
        f"  {promised}: largest logit difference to the parent {facts['max_abs_logit_error']:.2e} "
        f"(logits up to {facts['max_abs_logit']:.1f}, float32); "
        f"{facts['greedy_agreement']:.1%} of {facts['num_tokens']} next tokens are the same"
    )
    return out


def _card(name: str, section: GrowSection, folder: Path, facts: dict[str, Any]) -> None:
    done = {"contract": facts["contract"], "largest logit difference to the parent": facts["max_abs_logit_error"]}
    recipe = yaml.safe_dump({"grow": asdict(section)}, sort_keys=False)
    origin = Origin(name, "llava-moe grow", [section.parent], recipe=recipe, facts=done | start_facts(section.parent))
    write_card(folder, origin)


if __name__ == "__main__":
    from llava_moe.cli import exit_on_user_error, making_parser

    with exit_on_user_error():
        if len(sys.argv) < 2:
            raise RecipeError("name a recipe: python -m llava_moe.grow RECIPE [key=value ...]")
        found = making_parser("grow").parse_intermixed_args(sys.argv[1:])
        run(found.recipe, found.overrides, found.parent, found.to)
