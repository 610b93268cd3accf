"""A stage refuses a start point that does not fit, and names the keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llava_moe.config import ModelSection, NamedSection, PartSection, RecipeError, RunConfig, UpcycleSection
from llava_moe.model.upcycling import PROVENANCE
from llava_moe.training.chain import _PARTS, check_recipe, check_start
from llava_moe.training.start import start_point
from tests.tiny_model import TINY_MOE, write_tiny_checkpoint


def recipe(checkpoint: Path | None, upcycle: UpcycleSection | None = None, **model: Any) -> RunConfig:
    named = None if checkpoint is None else str(checkpoint)
    return RunConfig(output_dir="out", model=ModelSection(checkpoint=named, **model), upcycle=upcycle)


def section(**changes: Any) -> UpcycleSection:
    return UpcycleSection(parent="somewhere", decoder=PartSection(**{"layers": [0, 2], **changes}))


def test_every_key_of_a_first_model_is_checked() -> None:
    others = {"checkpoint", "attn_implementation", "dtype"}  # these hold for any start point
    assert set(_PARTS) | others == {field.name for field in dataclasses.fields(ModelSection)}


def test_a_checkpoint_and_parts_are_refused_by_key() -> None:
    check_recipe(recipe(Path("somewhere"), dtype="bfloat16"))
    check_recipe(recipe(None, vision_tower="tower", language_model="lm"))
    message = r"model\.vision_tower, model\.projector: of a model to assemble, but model\.checkpoint=somewhere"
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe(Path("somewhere"), vision_tower="tower", projector="linear"))


def test_the_start_of_a_run_is_checked(dense_checkpoint: Path, moe_checkpoint: Path) -> None:
    assert start_point(recipe(dense_checkpoint)) == dense_checkpoint
    assert start_point(recipe(moe_checkpoint)) == moe_checkpoint
    with pytest.raises(RecipeError, match=r"a dense checkpoint, and the recipe's section upcycle"):
        start_point(recipe(dense_checkpoint, section()))
    with pytest.raises(RecipeError, match=r"model\.image_size: of a model to assemble"):
        start_point(recipe(dense_checkpoint, image_size=16))


def test_an_upcycled_checkpoint_must_be_the_one_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "upcycled", TINY_MOE)
    assert start_point(recipe(checkpoint, section())) == checkpoint  # without a provenance nothing can be compared
    made = {"section": {**dataclasses.asdict(section()), "parent": "elsewhere"}}
    (checkpoint / PROVENANCE).write_text(json.dumps(made))
    assert start_point(recipe(checkpoint, section())) == checkpoint
    with pytest.raises(RecipeError) as caught:
        start_point(recipe(checkpoint, section(num_experts=8, router=NamedSection("top_k", {"k": 1}))))
    assert "upcycle.decoder.num_experts was 4 and is 8" in str(caught.value)
    assert "upcycle.decoder.router.args.k was None and is 1" in str(caught.value)
    vision = UpcycleSection(parent="somewhere", vision=PartSection(layers=[0]))
    with pytest.raises(RecipeError, match=r"upcycle\.vision was None and is \{"):
        check_start(recipe(checkpoint, vision), checkpoint)
