"""Task families on pictures of one coloured shape: open questions, balanced yes/no, multiple choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import numpy as np

from playground.forms import COLOURS, SHAPES
from playground.records import LETTERS, Example
from playground.scenes import ImageStore
from playground.sources import ShapePicture, ShapeSource

# Only affirmative wordings: the negated half of easy-VQA ("is there not a ...") asks the same of the picture and adds
# an exclusive-or in the text, which would measure the language model and not the sight.
YES_NO = (
    "is there a {}?",
    "is there a {} in the image?",
    "is a {} present?",
    "does the image contain a {}?",
)


def choose_pictures(source: ShapeSource, split: str, limit: int, rng: np.random.Generator) -> list[ShapePicture]:
    """At most `limit` pictures of a split in random order; all shape families draw from them."""
    pictures = source.splits[split]
    return [pictures[index] for index in rng.permutation(len(pictures))[:limit]]


def _put(store: ImageStore, source: ShapeSource, item: ShapePicture) -> str:
    key = f"shapes/{item.key}"
    return f"{key}.png" if f"{key}.png" in store else store.put(key, source.picture(item))


def _caption(item: ShapePicture) -> str:
    return f"a {item.colour} {item.shape}" if item.shape and item.colour else ""


def open_questions(
    source: ShapeSource, pictures: Sequence[ShapePicture], count: int, store: ImageStore, rng: np.random.Generator
) -> list[Example]:
    """What shape, what colour. Pictures come in rounds, so that few questions spread over many pictures."""
    rounds: dict[int, list[tuple[ShapePicture, str, str]]] = {}
    for item in pictures:
        for turn, number in enumerate(rng.permutation(len(item.questions))):
            rounds.setdefault(turn, []).append((item, *item.questions[number]))
    rows = [row for turn in sorted(rounds) for row in rounds[turn]][:count]
    return [
        Example(
            "shapes_open",
            "gqa",
            question,
            answer,
            _put(store, source, item),
            caption=_caption(item),
            topic="color" if answer in COLOURS else "shape",
        )
        for item, question, answer in rows
    ]


def yes_no_questions(
    source: ShapeSource, pictures: Sequence[ShapePicture], count: int, store: ImageStore, rng: np.random.Generator
) -> list[Example]:
    """For every question string as many pictures with the answer yes as with no.

    A picture is asked for the same again, in whatever words, only when all such pictures have been.
    """
    known = [item for item in pictures if item.shape and item.colour]
    subjects = [*SHAPES, *(f"{colour} shape" for colour in COLOURS)]
    holds = {subject: [subject in (item.shape, f"{item.colour} shape") for item in known] for subject in subjects}
    subjects = [subject for subject in subjects if any(holds[subject]) and not all(holds[subject])]
    strings = [(wording.format(subject), subject) for wording in YES_NO for subject in subjects]
    strings = [strings[index] for index in rng.permutation(len(strings))]

    def pool(subject: str, wanted: bool) -> Iterator[ShapePicture]:
        return cycle([known[index] for index in rng.permutation(len(known)) if holds[subject][index] == wanted])

    rounds = {(subject, wanted): pool(subject, wanted) for subject in subjects for wanted in (True, False)}
    examples = []
    for question, subject in islice(cycle(strings), count // 2):
        for answer, wanted in (("yes", True), ("no", False)):
            item = next(rounds[subject, wanted])
            image = _put(store, source, item)
            examples.append(
                Example(
                    "shapes_yesno",
                    "pope",
                    question,
                    answer,
                    image,
                    category=subject.split()[-1],
                    caption=_caption(item),
                    topic="shape" if subject in SHAPES else "color",
                )
            )
    return examples


def multiple_choice(
    source: ShapeSource, pictures: Sequence[ShapePicture], count: int, store: ImageStore, rng: np.random.Generator
) -> list[Example]:
    """Shape (three options) and colour (four of eight) by turns; the right letter is uniform."""
    known = [item for item in pictures if item.shape and item.colour]
    examples = []
    for number in range(count):
        item = known[int(rng.integers(len(known)))]
        if number % 2:
            question, category, right, pool = "What shape is shown?", "shape", item.shape, list(SHAPES)
        else:
            question, category, right, pool = "What color is shown?", "color", item.colour, list(COLOURS)
        options, answer = shuffled_options(str(right), pool, number // 2, rng)
        image = _put(store, source, item)
        examples.append(Example("choice", "mmbench", question, answer, image, options, category=category))
    return examples


def shuffled_options(
    right: str, pool: Sequence[str], turn: int, rng: np.random.Generator
) -> tuple[tuple[str, ...], str]:
    """Up to four options with the right one at place `turn` modulo their number, and that place's letter."""
    wrong = [option for option in pool if option != right]
    wrong = [wrong[index] for index in rng.permutation(len(wrong))[:3]]
    place = turn % (len(wrong) + 1)
    return (*wrong[:place], right, *wrong[place:]), LETTERS[place]
