"""Base concepts and the split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from playground.assets import EMOJI_IMAGES, EMOJI_NAMES, fetch_assets
from playground.things import COUNTRIES, WORDS, Catalogue, base_concepts, held_out_concepts, load_emoji
from tests.playground.fake_wheels import fake_assets


def record(short_name: str, unified: str, category: str = "Objects", subcategory: str = "x") -> dict[str, str]:
    return {"short_name": short_name, "unified": unified, "category": category, "subcategory": subcategory}


@pytest.mark.parametrize(
    "variants",
    [
        [("woman-running", "1F3C3-200D-2640-FE0F"), ("man-running", "1F3C3-200D-2642-FE0F"), ("runner", "1F3C3")],
        [
            ("male-doctor", "1F468-200D-2695-FE0F"),
            ("female-doctor", "1F469-200D-2695-FE0F"),
            ("health", "1F9D1-200D-2695"),
        ],
        [("man", "1F468"), ("girl", "1F467"), ("man-woman-boy", "1F468-200D-1F469-200D-1F466")],
        [("red_circle", "1F534"), ("large_blue_circle", "1F535")],
        [("clock1", "1F550"), ("clock1230", "1F567")],
        [("cat", "1F431"), ("cat2", "1F408"), ("black_cat", "1F408-200D-2B1B")],
        [("running_facing_right", "1F3C3-200D-27A1-FE0F"), ("runner", "1F3C3")],
    ],
)
def test_variants_are_one_concept(variants: list[tuple[str, str]]) -> None:
    assert len(set(base_concepts([record(*variant) for variant in variants]).values())) == 1


def test_different_things_stay_apart() -> None:
    records = [record("farmer", "1F9D1-200D-1F33E"), record("ear_of_rice", "1F33E"), record("pizza", "1F355")]
    records += [record("male_sign", "2642"), record("flag-in", "1F1EE", "Flags"), record("flag-mx", "1F1F2", "Flags")]
    assert len(set(base_concepts(records).values())) == len(records)


def test_split_takes_a_fifth_of_each_kind_and_is_fixed() -> None:
    kind_of = {f"{kind}{index}": kind for kind in ("a", "b") for index in range(50)}
    held_out = held_out_concepts(kind_of)
    assert [sum(kind_of[concept] == kind for concept in held_out) for kind in ("a", "b")] == [10, 10]
    assert held_out == held_out_concepts(dict(reversed(kind_of.items())))


def check_catalogue(catalogue: Catalogue) -> None:
    sides = [{thing.concept for thing in catalogue.select(held_out)} for held_out in (False, True)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    words = [thing.word for thing in catalogue.things if thing.word]
    assert len(set(words)) == len(words) > 10
    art = catalogue.draw(catalogue.things[0], np.random.default_rng(0))
    assert art.mode == "RGBA"
    assert art.width == art.height


def test_no_concept_on_both_sides(tmp_path: Path) -> None:
    assets = fake_assets(tmp_path)
    catalogue = load_emoji(assets[EMOJI_IMAGES].path, assets[EMOJI_NAMES].path)
    check_catalogue(catalogue)
    assert "skin-tone-2" not in {thing.key for thing in catalogue.things}


@pytest.mark.assets
def test_no_concept_on_both_sides_of_twemoji() -> None:
    statuses = fetch_assets(offline=True)
    if not (statuses[EMOJI_IMAGES].path and statuses[EMOJI_NAMES].path):
        pytest.skip(f"{statuses[EMOJI_IMAGES]}; {statuses[EMOJI_NAMES]}")
    catalogue = load_emoji(statuses[EMOJI_IMAGES].path, statuses[EMOJI_NAMES].path)
    check_catalogue(catalogue)
    keys = {thing.key for thing in catalogue.things}
    assert len(keys) == len(catalogue.things) == 1897
    assert set(WORDS) <= keys
    assert set(COUNTRIES) <= keys
