"""Task families on nameable things: kind, presence, counting, place, multiple choice by kind.

Training pictures hold training concepts only. Test pictures of the kind, counting and choice families hold held-out
concepts only; presence and relations name things, so they ask for trained names in new pictures, and presence also
(subset "unseen") for kinds of things that never occurred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
NUM_PRESENCE_WORDS = 12
SECOND_THING = 0.4  # the share of presence pictures that show another thing beside the one that is there


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
                topic="things",
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
    """Is there a pizza in the image? Is there any food in the image? One or two things in a picture.

    Half of the questions name one of a few things, the others a kind; in test pictures the latter show held-out
    concepts (subset "unseen"). Balanced for every question string.
    """
    names = _Asked("name", lambda thing: thing.concept, lambda thing: article(str(thing.word)))
    kinds = _Asked("kind", lambda thing: thing.kind, lambda thing: f"any {thing.kind}")
    num_named = min(count // 4 * 2, count - 4)
    few = catalogue.select(held_out=False, named=True)[:NUM_PRESENCE_WORDS]
    examples = _presence(catalogue, few, names, num_named, store, rng, "named")
    shown = catalogue.select(held_out=test, named=False)
    return examples + _presence(catalogue, shown, kinds, count - num_named, store, rng, _subset(test))


@dataclass(frozen=True)
class _Asked:
    """What a presence question asks for: two things with the same key are the same to it."""

    category: str
    key: Callable[[Thing], str]
    phrase: Callable[[Thing], str]


def _presence(
    catalogue: Catalogue,
    things: list[Thing],
    asked: _Asked,
    count: int,
    store: ImageStore,
    rng: np.random.Generator,
    subset: str,
) -> list[Example]:
    examples: list[Example] = []
    num_pairs = count // 2
    rounds = max(1, -(-num_pairs // len(things)))
    for size in [num_pairs // rounds + (turn < num_pairs % rounds) for turn in range(rounds)]:
        targets = _targets(things, asked, size, rng)
        scenes = []
        for target in targets:
            others = [thing for thing in things if asked.key(thing) != asked.key(target)]
            extra = [others[index] for index in rng.permutation(len(others))[: int(rng.random() < SECOND_THING)]]
            scenes.append([target, *extra])
        absent = _absent_targets(targets, scenes, asked, rng)
        for shown, missing in zip(scenes, absent, strict=True):
            order = [shown[index] for index in rng.permutation(len(shown))]
            arts = [catalogue.draw(thing, rng) for thing in order]
            picture = scene(arts, pick_quadrants(len(arts), rng), store.side, rng)
            image = store.put(f"presence/{subset}_{len(examples) // 2:05d}", picture)
            concepts = tuple(thing.concept for thing in order)
            caption = _scene_caption(order)
            for thing, answer in ((shown[0], "yes"), (missing, "no")):
                question = f"Is there {asked.phrase(thing)} in the image?"
                where = "unseen" if subset == "unseen" else "seen"
                facts = (caption, asked.category, concepts, "things")
                examples.append(Example("presence", "pope", question, answer, image, (), where, *facts))
    return examples


def presence_questions(
    catalogue: Catalogue, pictures: Sequence[Example], count: int, rng: np.random.Generator
) -> list[Example]:
    """Training questions about pictures that are there: half by name, half by kind, each on random pictures, so that
    another answer about the same picture says little. Balanced for every question string.

    `pictures`: presence examples, whose named pictures are asked by name, and others, which are asked by kind as well.
    """
    kinds_of: dict[str, set[str]] = defaultdict(set)  # a few concepts hold things of two kinds
    for thing in catalogue.things:
        kinds_of[thing.concept].add(thing.kind)
    word_of = {thing.concept: str(thing.word) for thing in catalogue.select(held_out=False, named=True)}
    pictures = list({example.image: example for example in pictures}.values())
    named = [(example, set(example.concepts)) for example in pictures if example.category == "name"]
    words = sorted({concept for _, shown in named for concept in shown})
    by_kind = [
        (example, set().union(*(kinds_of[concept] for concept in example.concepts)))
        for example in pictures
        if all(len(kinds_of[concept]) == 1 for concept in example.concepts)
    ]
    half = count // 4 * 2
    return _balanced(named, {word: article(word_of[word]) for word in words}, "name", half, rng) + _balanced(
        by_kind, {kind: f"any {kind}" for kind in catalogue.kinds}, "kind", count - half, rng
    )


def _balanced(
    pictures: Sequence[tuple[Example, set[str]]],
    phrases: dict[str, str],
    category: str,
    count: int,
    rng: np.random.Generator,
) -> list[Example]:
    """`count` questions in turn over `phrases`, for each one picture that shows it and one that does not.

    A picture gets a question again only when all have had it: a repeated question would be a conversation of its own,
    and since few pictures show a thing, those would mostly be answered with yes.
    """

    def pool(key: str, wanted: bool) -> list[Example]:
        fitting = [example for example, shown in pictures if (key in shown) == wanted]
        return [fitting[index] for index in rng.permutation(len(fitting))]

    pools = {key: (pool(key, True), pool(key, False)) for key in phrases}
    usable = [key for key in phrases if all(pools[key])]
    rounds = {key: zip(*map(cycle, pools[key]), strict=False) for key in usable}
    examples = []
    for key in islice(cycle(usable), count // 2):
        for answer, picture in zip(("yes", "no"), next(rounds[key]), strict=True):
            question = f"Is there {phrases[key]} in the image?"
            facts = (picture.caption, category, picture.concepts, "things")
            examples.append(Example("presence", "pope", question, answer, picture.image, (), "seen", *facts))
    return examples


def _targets(things: list[Thing], asked: _Asked, size: int, rng: np.random.Generator) -> list[Thing]:
    """`size` things, each key about as often as the others."""
    groups: dict[str, list[Thing]] = defaultdict(list)
    for thing in things:
        groups[asked.key(thing)].append(thing)
    order = [list(groups)[index] for index in rng.permutation(len(groups))]
    return [groups[key][int(rng.integers(len(groups[key])))] for key in islice(cycle(order), size)]


def _scene_caption(things: list[Thing]) -> str:
    """Empty when one of them has no name."""
    if any(thing.word is None for thing in things):
        return ""
    words = [article(str(thing.word)) for thing in things]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _absent_targets(
    targets: list[Thing], scenes: list[list[Thing]], asked: _Asked, rng: np.random.Generator
) -> list[Thing]:
    """A permutation of the targets in which none is in its scene, so that every word is asked as often yes as no.

    Where the last few leave no such permutation (tiny rounds), the scene loses the things besides its target.
    """
    order = [int(index) for index in rng.permutation(len(targets))]
    if len(targets) == 1:
        raise ValueError("presence needs at least four questions of each sort, half of them yes")
    for place in range(len(order)):
        inside = {asked.key(thing) for thing in scenes[place]}
        if asked.key(targets[order[place]]) not in inside:
            continue
        for other in range(len(order)):
            fits_here = asked.key(targets[order[other]]) not in inside
            others_inside = {asked.key(thing) for thing in scenes[other]}
            if fits_here and asked.key(targets[order[place]]) not in others_inside:
                order[place], order[other] = order[other], order[place]
                break
        else:
            return _rotated(targets, scenes, asked)
    return [targets[index] for index in order]


def _rotated(targets: list[Thing], scenes: list[list[Thing]], asked: _Asked) -> list[Thing]:
    for shown in scenes:
        del shown[1:]
    for shift in range(1, len(targets)):
        absent = targets[shift:] + targets[:shift]
        if all(asked.key(thing) != asked.key(target) for thing, target in zip(absent, targets, strict=True)):
            return absent
    raise ValueError(f"presence by {asked.category}: {len(targets)} targets cannot be balanced; ask for more questions")


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
