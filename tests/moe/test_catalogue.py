"""docs/methods.md is what the registries say, and says something of each entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_moe.moe import ROUTERS
from llava_moe.moe.catalogue import all_entries, catalogue, example_layer, formula, papers, relative_flops

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
ENTRIES = list(all_entries())
# Our own parts and bounds, which stand in no paper.
NO_PAPER = {"scored", "dense", "random", "modality", "loop", "batched", "grouped", "stacked", "linear", "from_scratch"}


def test_the_page_is_not_stale() -> None:
    assert PAGE.read_text() == catalogue(), "run: python -m llava_moe.moe.catalogue > docs/methods.md"


def test_everything_is_listed() -> None:
    assert len(ENTRIES) >= 80
    text = PAGE.read_text()
    for _, name, _ in ENTRIES:
        assert f"### {name}\n" in text
    for option in ("mix", "policy", "tau"):  # of shared experts and of a capacity, which are in no registry
        assert f"| `{option}` |" in text


@pytest.mark.parametrize(("kind", "name", "entry"), ENTRIES, ids=[f"{kind}-{name}" for kind, name, _ in ENTRIES])
def test_each_method_names_its_paper_and_formula(kind: str, name: str, entry: Any) -> None:
    if kind in ("router", "balance loss", "controller", "upcycler", "grower") and name not in NO_PAPER:
        assert papers(entry) or "(" in (entry.__doc__ or ""), f"{name}: the docstring names no source"
        assert formula(entry), f"{name}: the module's docstring has no indented formula"
    config = getattr(entry, "Config", None)
    if config is not None and config.__dataclass_fields__:
        for option in config.__dataclass_fields__:
            assert option in (config.__doc__ or ""), f"{name}: its option {option} is not documented"


@pytest.mark.parametrize(("name", "expected"), [("top_k", 2.0), ("dense", 8.0), ("random", 2.0)])
def test_flops_are_those_of_the_active_experts(name: str, expected: float) -> None:
    assert name in ROUTERS
    assert relative_flops(example_layer(name)) == pytest.approx(expected, rel=0.05)
