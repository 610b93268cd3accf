"""One question about one picture, and how it is written as a training prompt or as an evaluation record.

The training prompt of a question equals, to the character, what the official lmms-eval functions of GQA, POPE and
MMBench make of its evaluation record; tests hold the two together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Style = Literal["gqa", "pope", "mmbench"]
LETTERS = "ABCD"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\n\nAnswer with the option's letter from the given choices directly."
OPTIONS_HEADER = "There are several options:"
CAPTION_REQUESTS = (
    "What does the picture show?",
    "Describe the picture in a few words.",
    "Give a short caption for this picture.",
)


GROUPED = ("shapes_open", "shapes_yesno", "emoji_kind", "presence")


@dataclass(frozen=True)
class Example:
    """A question with its only right answer.

    Attributes:
        image: path of the picture in its store.
        options: the texts of the choices (style mmbench only); `answer` is then a letter.
        subset: "unseen" when the picture shows base concepts that occur nowhere in training, otherwise "seen".
        caption: what the picture shows, where there is a good short phrase; feeds the pretraining file.
        concepts: the base concepts drawn in the picture, for the leak test.
        topic: what about the picture is asked: the answer to an open question gives away that of a yes/no question with
            the same topic.
    """

    family: str
    style: Style
    question: str
    answer: str
    image: str
    options: tuple[str, ...] = ()
    subset: str = "seen"
    caption: str = ""
    category: str = ""
    concepts: tuple[str, ...] = ()
    topic: str = ""

    @property
    def prompt(self) -> str:
        """The user's text without the image marker."""
        if self.style != "mmbench":
            return self.question + SHORT_ANSWER
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return f"{self.question} {OPTIONS_HEADER}\n" + "\n".join(lines) + LETTER_ANSWER


def conversations(
    examples: Sequence[Example], rng: np.random.Generator, share: float = 0.95, most: int = 3
) -> list[list[Example]]:
    """Groups questions about the same picture into conversations, in the order of their first question.

    A `share` of the pictures with several questions get them in conversations of `most` questions at the most, for the
    model to learn follow-ups and for every pass over a picture to teach several answers; the others stay single. Only
    GROUPED families take part: the two sides of a relation, say, give each other away.
    """
    by_picture: dict[str, list[Example]] = {}
    for example in examples:
        by_picture.setdefault(example.image, []).append(example)
    groups: list[list[Example]] = []
    for questions in by_picture.values():
        grouped = [question for question in questions if question.family in GROUPED]
        together = list({question.question: question for question in grouped}.values())
        if len(together) < 2 or rng.random() >= share:
            together = []
        together = [together[index] for index in rng.permutation(len(together))]
        groups += [_ordered(together[start : start + most]) for start in range(0, len(together), most)]
        chosen = {id(question) for question in together}
        groups += [[question] for question in questions if id(question) not in chosen]
    first = {id(example): number for number, example in enumerate(examples)}
    return sorted(groups, key=lambda group: min(first[id(example)] for example in group))


def _ordered(questions: list[Example]) -> list[Example]:
    """The same questions, each open one after the yes/no questions that its answer would give away."""
    place = {id(question): number for number, question in enumerate(questions)}
    for question in questions:
        if question.style != "pope":
            same = [place[id(other)] for other in questions if other.style == "pope" and other.topic == question.topic]
            place[id(question)] = max([place[id(question)], *same])
    return sorted(questions, key=lambda question: (place[id(question)], question.style != "pope"))


def training_record(examples: Sequence[Example], number: int, bare: bool = False) -> dict[str, Any]:
    """A LLaVA record, one turn for each question, with `family` (of the first one) as an extra key.

    Only the first turn asks for a short answer, as in LLaVA's mix665k. `bare` leaves that out too: a model that never
    saw a question without it answers what people type in a chat with whatever it says most often.
    """
    turns = []
    for position, example in enumerate(examples):
        marker = "<image>\n" if position == 0 else ""
        short = bare or position > 0
        text = example.prompt.removesuffix(SHORT_ANSWER) if short else example.prompt
        turns += [{"from": "human", "value": f"{marker}{text}"}, {"from": "gpt", "value": example.answer}]
    return {
        "id": f"{examples[0].family}-{number:06d}",
        "image": examples[0].image,
        "family": examples[0].family,
        "conversations": turns,
    }


def caption_record(example: Example, number: int) -> dict[str, Any]:
    """A LLaVA pretraining record: the picture's caption after one of a few requests."""
    request = CAPTION_REQUESTS[number % len(CAPTION_REQUESTS)]
    return {
        "id": f"caption-{number:06d}",
        "image": example.image,
        "family": example.family,
        "conversations": [
            {"from": "human", "value": f"<image>\n{request}"},
            {"from": "gpt", "value": example.caption},
        ],
    }


def evaluation_record(example: Example, number: int, png: bytes) -> dict[str, Any]:
    """A record in the official schema of its style, plus `id`, `family` and `subset`."""
    key = f"{example.family}-{number:06d}"
    common = {"id": key, "family": example.family, "subset": example.subset, "image": {"bytes": png, "path": None}}
    if example.style == "gqa":
        return common | {"imageId": key, "question": example.question, "answer": example.answer}
    if example.style == "pope":
        return common | {
            "question_id": key,
            "image_source": key,
            "category": example.category,
            "question": example.question,
            "answer": example.answer,
        }
    options = dict.fromkeys(LETTERS, "nan") | dict(zip(LETTERS, example.options, strict=False))
    return common | {
        "index": number,
        "question": example.question,
        "hint": "nan",
        "source": "quickstart",
        "split": "dev",
        "category": example.category,
        "L2-category": "perception",
        "answer": example.answer,
        **options,
    }


def _commonest(answers: Iterable[str]) -> str:
    """The most frequent answer; among equals the first by spelling, so that the result is stable."""
    return min(Counter(answers).items(), key=lambda item: (-item[1], item[0]))[0]


def commonest_answers(train: Sequence[Example], evaluation: Sequence[Example]) -> dict[str, str]:
    """For each evaluation question string the commonest training answer to that string.

    A string that never occurs in training gets the commonest training answer of its family.
    """
    by_question: dict[str, list[str]] = defaultdict(list)
    by_family: dict[str, list[str]] = defaultdict(list)
    for example in train:
        by_question[example.question].append(example.answer)
        by_family[example.family].append(example.answer)
    priors = {}
    for example in evaluation:
        priors[example.question] = _commonest(by_question.get(example.question) or by_family[example.family])
    return priors
