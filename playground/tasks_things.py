"""Task families on nameable things: kind, presence, counting, place, multiple choice by kind.

Training pictures hold training concepts only. Test pictures of the kind, counting and choice families hold held-out
concepts only; presence and relations name things, so they ask for trained names in new pictures, and presence also
(subset "unseen") for names and drawings that never occurred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from playground.records import Example
from playground.scenes import ImageStore, augmented, pick_quadrants, plain, scene
from playground.tasks_shapes import shuffled_options
from playground.things import Catalogue, Thing, article

KIND_QUESTION = "What kind of thing is this?"
KIND_CHOICE = "What kind of thing is shown?"
COUNT_QUESTION = "How many things are in the image?"
MAX_COUNT = 4
NUM_RELATION_WORDS = 20
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_PLACES = {
    "left": ((0.26, 0.5), (0.74, 0.5)),
    "right": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}
_NO_FLIP = ("flag", "symbol")
UNSEEN_PRESENCE_SHARE = 0.2


def by_concept(things: Sequence[Thing], count: int, rng: np.random.Generator) -> list[Thing]:
    """`count` things in rounds over the concepts: one thing of each concept, then another one, and so on."""
    groups: dict[str, list[Thing]] = defaultdict(list)
    for thing in things:
        groups[thing.concept].append(thing)
    order = [list(groups.values())[index] for index in rng.permutation(len(groups))]
    order = [[group[index] for index in rng.permutation(len(group))] for group in order]
    chosen: list[Thing] = []
    turn = 0
    while len(chosen) < count:
        chosen.extend(group[turn % len(group)] for group in order)
        turn += 1
    return chosen[:count]


def in_rounds(things: Sequence[Thing], count: int, rng: np.random.Generator) -> list[Thing]:
    """`count` things: all of them in random order, and again in another order."""
    chosen: list[Thing] = []
    while len(chosen) < count:
        chosen.extend(things[index] for index in rng.permutation(len(things)))
    return chosen[:count]


def _subset(held_out: bool) -> str:
    return "unseen" if held_out else "seen"


def _thing_caption(thing: Thing, number: int) -> str:
    name = thing.name if thing.kind == "flag" else article(thing.name)
    name = f"the {name}" if thing.name.startswith("flag of") else name
    return name if number % 2 or thing.kind == "flag" else f"{name}, a kind of {thing.kind}"


def kinds(catalogue: Catalogue, test: bool, count: int, store: ImageStore, rng: np.random.Generator) -> list[Example]:
    """What kind of thing is this? Test: held-out things, drawn plainly, each at most once.

    Training goes in rounds over the training things: plain drawings in the first, augmented ones after it.
    """
    pool = catalogue.select(held_out=test)
    if test and not catalogue.varied:
        count = min(count, len(pool))
    examples = []
    for number, thing in enumerate(in_rounds(pool, count, rng)):
        art = catalogue.draw(thing, rng)
        as_is = test or number < len(pool)
        picture = plain(art, store.side) if as_is else augmented(art, store.side, rng, thing.kind not in _NO_FLIP)
        image = store.put(f"things/{number:05d}", picture)
        caption = _thing_caption(thing, number)
        concepts = (thing.concept,)
        examples.append(
            Example(
                "emoji_kind",
                "gqa",
                KIND_QUESTION,
                thing.kind,
                image,
                subset=_subset(test),
                caption=caption,
                category=thing.kind,
                concepts=concepts,
            )
        )
    return examples


def kind_choices(
    catalogue: Catalogue, asked: Sequence[Example], count: int, store: ImageStore, rng: np.random.Generator
) -> list[Example]:
    """Four kinds to choose from, on the pictures of `asked` (training), or when that is empty on held-out things."""
    if asked:
        shown = [asked[int(index)] for index in rng.integers(len(asked), size=count)]
        rows = [(example.answer, example.image, example.concepts) for example in shown]
    else:
        rows = []
        for number, thing in enumerate(in_rounds(catalogue.select(held_out=True), count, rng)):
            picture = augmented(catalogue.draw(thing, rng), store.side, rng, thing.kind not in _NO_FLIP)
            rows.append((thing.kind, store.put(f"choice/{number:05d}", picture), (thing.concept,)))
    examples = []
    subset = _subset(held_out=not asked)
    for number, (kind, image, concepts) in enumerate(rows):
        options, answer = shuffled_options(kind, catalogue.kinds, number, rng)
        examples.append(Example("choice", "mmbench", KIND_CHOICE, answer, image, options, subset, "", "kind", concepts))
    return examples


def presence(
    catalogue: Catalogue, test: bool, count: int, store: ImageStore, rng: np.random.Generator
) -> list[Example]:
    """Is there a pizza in the image? One to three things in a picture; balanced for every question string."""
    seen = catalogue.select(held_out=False, named=True)
    if not test:
        return _presence(catalogue, seen, count, store, rng, "seen")
    unseen = catalogue.select(held_out=True, named=True)
    num_unseen = int(count * UNSEEN_PRESENCE_SHARE) // 2 * 2
    examples = _presence(catalogue, seen, count - num_unseen, store, rng, "seen")
    return examples + (_presence(catalogue, unseen, num_unseen, store, rng, "unseen") if num_unseen >= 4 else [])


def _presence(
    catalogue: Catalogue, named: list[Thing], count: int, store: ImageStore, rng: np.random.Generator, subset: str
) -> list[Example]:
    examples: list[Example] = []
    num_pairs = count // 2
    rounds = max(1, -(-num_pairs // len(named)))
    for size in [num_pairs // rounds + (turn < num_pairs % rounds) for turn in range(rounds)]:
        targets = [named[index] for index in rng.permutation(len(named))[:size]]
        scenes = []
        for target in targets:
            others = [thing for thing in named if thing.concept != target.concept]
            extra = [others[index] for index in rng.permutation(len(others))[: int(rng.integers(0, 3))]]
            scenes.append([target, *extra])
        absent = _absent_targets(targets, scenes, rng)
        for shown, missing in zip(scenes, absent, strict=True):
            order = [shown[index] for index in rng.permutation(len(shown))]
            arts = [catalogue.draw(thing, rng) for thing in order]
            picture = scene(arts, pick_quadrants(len(arts), rng), store.side, rng)
            image = store.put(f"presence/{subset}_{len(examples) // 2:05d}", picture)
            words = [article(str(thing.word)) for thing in order]
            caption = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
            concepts = tuple(thing.concept for thing in order)
            for thing, answer in ((shown[0], "yes"), (missing, "no")):
                question = f"Is there {article(str(thing.word))} in the image?"
                examples.append(
                    Example("presence", "pope", question, answer, image, (), subset, caption, "scene", concepts)
                )
    return examples


def _absent_targets(targets: list[Thing], scenes: list[list[Thing]], rng: np.random.Generator) -> list[Thing]:
    """A permutation of the targets in which none is in its scene, so that every word is asked as often yes as no.

    Where the last few leave no such permutation (tiny rounds), the scene loses the things besides its target.
    """
    order = [int(index) for index in rng.permutation(len(targets))]
    if len(targets) == 1:
        raise ValueError("presence needs at least four questions, half of them yes")
    for place in range(len(order)):
        inside = {thing.concept for thing in scenes[place]}
        if targets[order[place]].concept not in inside:
            continue
        for other in range(len(order)):
            fits_here = targets[order[other]].concept not in inside
            others_inside = {thing.concept for thing in scenes[other]}
            if fits_here and targets[order[place]].concept not in others_inside:
                order[place], order[other] = order[other], order[place]
                break
        else:
            return _rotated(targets, scenes)
    return [targets[index] for index in order]


def _rotated(targets: list[Thing], scenes: list[list[Thing]]) -> list[Thing]:
    for shown in scenes:
        del shown[1:]
    return targets[1:] + targets[:1]


def counting(
    catalogue: Catalogue, test: bool, count: int, store: ImageStore, rng: np.random.Generator
) -> list[Example]:
    """One to four equal things in the quadrants; each number as often as the others."""
    chosen = by_concept(catalogue.select(held_out=test), count, rng)
    examples = []
    for index, thing in enumerate(chosen):
        number = index % MAX_COUNT + 1
        arts = [catalogue.draw(thing, rng)] * number
        picture = scene(arts, pick_quadrants(number, rng), store.side, rng)
        image = store.put(f"counting/{index:05d}", picture)
        examples.append(
            Example(
                "counting", "gqa", COUNT_QUESTION, str(number), image, (), _subset(test), "", "count", (thing.concept,)
            )
        )
    return examples


def relations(catalogue: Catalogue, count: int, store: ImageStore, rng: np.random.Generator) -> list[Example]:
    """Where is the dog relative to the pizza? Two things; each picture is asked both ways, each answer as often."""
    named = catalogue.select(held_out=False, named=True)
    named = sorted(named, key=lambda thing: thing.key)[:: max(1, len(named) // NUM_RELATION_WORDS)][:NUM_RELATION_WORDS]
    examples = []
    for index, side in enumerate(islice(cycle(OPPOSITE), (count + 1) // 2)):
        first, second = (named[place] for place in rng.permutation(len(named))[:2])
        arts = [catalogue.draw(thing, rng) for thing in (first, second)]
        image = store.put(f"relations/{index:05d}", scene(arts, _PLACES[side], store.side, rng))
        phrase = f"to the {side} of" if side in ("left", "right") else side
        caption = f"{article(str(first.word))} {phrase} {article(str(second.word))}"
        for one, other, answer in ((first, second, side), (second, first, OPPOSITE[side])):
            question = f"Where is the {one.word} relative to the {other.word}?"
            concepts = (first.concept, second.concept)
            examples.append(
                Example("relations", "gqa", question, answer, image, (), "seen", caption, "place", concepts)
            )
    return examples[:count]
