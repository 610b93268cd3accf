"""Tiny snapshots of the public benchmarks, in the columns and types of their cards, laid out as a mirror.

Every picture has a colour of its own, so that an answer can be tied to the picture that was shown. Beside each question
stands what a model that sees answers (`right`), and what the model with planned mistakes answers (`planned`); what
scores they give stands in test_oracle.py, worked out by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Features, Image, List, Value

from tests.evaluation.imitations_files import Imitation, Item, Part, colour, write

TEXT, INT8, INT32, INT64 = Value("string"), Value("int8"), Value("int32"), Value("int64")


def _strings(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, TEXT)


def _rows(items: Sequence[Item], **columns: Any) -> list[Item]:
    """Items with what all their rows share."""
    return [replace(item, row={**columns, **item.row}) for item in items]


def gqa() -> Imitation:
    """Questions and pictures apart, joined by imageId; two questions share a picture."""
    questions = [
        ("Is the sky dark?", 0, "no", ""),
        ("What color is the car?", 0, "red", "blue"),
        ("Which animal is it?", 1, "dog", ""),
        ("What is on the table?", 2, "cup", "Cup."),  # case and punctuation do not count
        ("Who holds the ball?", 3, "girl", "boy"),
        ("Is it outdoors?", 3, "yes", ""),
    ]
    items = [
        Item(
            {
                "id": f"2013{number}",
                "imageId": f"n{image}",
                "question": question,
                "answer": answer,
                "fullAnswer": f"It is {answer}.",
                "isBalanced": True,
                "groups": {"global": "color", "local": "01-car_color"},
                "entailed": "['1', '2']",
                "equivalent": f"['2013{number}']",
                "types": {"structural": "query", "semantic": "attr", "detailed": "directOf"},
                "semantic": [{"operation": "select", "argument": "car (1)", "dependencies": [0]}],
                "semanticStr": "select: car (1)",
                "picture": colour(0, image),
            },
            answer,
            planned,
        )
        for number, (question, image, answer, planned) in enumerate(questions)
    ]
    words = Features(
        _strings("id", "imageId", "question", "answer", "fullAnswer")
        | {"isBalanced": Value("bool"), "groups": _strings("global", "local")}
        | _strings("entailed", "equivalent")
        | {"types": _strings("structural", "semantic", "detailed")}
        | {"semantic": List({**_strings("operation", "argument"), "dependencies": List(INT32)}), "semanticStr": TEXT}
    )
    images = [Item({"id": f"n{image}", "image": colour(0, image)}, "") for image in range(4)]
    name = "testdev_balanced_{}"
    path = "testdev_balanced_{}/testdev-00000-of-00001.parquet"
    return Imitation(
        "lmms-lab-encoder/GQA",
        (
            Part(name.format("images"), "testdev", path.format("images"), Features(id=TEXT, image=Image()), images),
            Part(name.format("instructions"), "testdev", path.format("instructions"), words, items, ()),
        ),
        licence="mit",
    )


def mmbench() -> Imitation:
    """Four questions, the first with a rotation (index 1000000 on): both must be right."""
    options = dict(zip("ABCD", ("red", "green", "blue", "black"), strict=True))
    rotated = dict(zip("ABCD", ("green", "blue", "black", "red"), strict=True))
    common = {"hint": "nan", "source": "imitation", "L2-category": "finegrained_perception", "comment": "nan"}
    common |= {"category": "color", "split": "dev", **options}
    rows = [
        (0, options, "A", ""),
        (1, options, "B", "green"),  # the text of the right option counts
        (2, options, "C", "The answer is A."),
        (3, options, "D", "D. black"),
        (1_000_000, rotated, "D", "B"),
    ]
    items = [
        Item({"index": index, **given, "answer": answer, "question": f"What color is thing {index}?"}, answer, planned)
        for index, given, answer, planned in rows
    ]
    items = [replace(item, row={**item.row, "image": colour(1, number)}) for number, item in enumerate(items)]
    features = Features(
        {"index": INT64, **_strings("question", "hint", "answer", *"ABCD", "category")}
        | {"image": Image(), **_strings("source", "L2-category", "comment", "split")}
    )
    english, chinese = ("en/dev-00000-of-00001.parquet", "cn/dev-00000-of-00001.parquet")
    test = [replace(items[0], row={**items[0].row, "answer": "", "split": "test"})]
    return Imitation(
        "lmms-lab-encoder/MMBench",
        (
            Part("cn", "dev", chinese, features, _rows(items[:2], **common)),
            Part("en", "dev", english, features, _rows(items, **common)),
            Part("en", "test", "en/test-00000-of-00001.parquet", features, _rows(test, **common)),
        ),
    )


def pope() -> Imitation:
    """Four objects that are there and four that are not."""
    planned = ["no", "Yes, there is.", "", "", "yes", "yes", "", "No"]
    items = [
        Item(
            {
                "id": str(number),
                "question_id": str(number),
                "question": f"Is there a thing {number} in the image?",
                "answer": "yes" if number < 4 else "no",
                "image_source": f"COCO_val2014_{number:012d}",
                "image": colour(2, number),
                "category": ("adversarial", "popular", "random")[number % 3],
            },
            "Yes" if number < 4 else "No",
            answer,
        )
        for number, answer in enumerate(planned)
    ]
    features = Features(
        {**_strings("id", "question_id", "question", "answer", "image_source"), "image": Image(), "category": TEXT}
    )
    full = Part("Full", "random", "Full/random-00000-of-00001.parquet", features, items[:1])
    test = Part("default", "test", "data/test-00000-of-00001.parquet", features, items)
    return Imitation("lmms-lab-encoder/POPE", (full, test))


def textvqa() -> Imitation:
    """Ten answers each; the second has a minority of two, which is worth 0.6."""
    given = [["nokia"] * 10, ["stop"] * 8 + ["shop"] * 2, ["seven"] * 10]
    planned = ["Nokia.", "shop", "8"]
    items = [
        Item(
            {
                "image_id": f"im{number}",
                "question_id": 34602 + number,
                "question": f"what does sign {number} say?",
                "question_tokens": ["what", "does", "sign", str(number), "say"],
                "image": colour(3, number),
                "image_width": 24,
                "image_height": 16,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": answers,
                "image_classes": ["Sign"],
                "set_name": "val",
                "ocr_tokens": [answers[0].upper(), f"T{number}"],
            },
            answers[0],
            answer,
        )
        for number, (answers, answer) in enumerate(zip(given, planned, strict=True))
    ]
    features = Features(
        {"image_id": TEXT, "question_id": INT32, "question": TEXT, "question_tokens": List(TEXT), "image": Image()}
        | {"image_width": INT32, "image_height": INT32, **_strings("flickr_original_url", "flickr_300k_url")}
        | {"answers": List(TEXT), "image_classes": List(TEXT), "set_name": TEXT, "ocr_tokens": List(TEXT)}
    )
    path = "data/{}-00000-of-00001.parquet"
    training = Part("default", "train", path.format("train"), features, items[:1])
    validation = Part("default", "validation", path.format("validation"), features, items)
    return Imitation("lmms-lab-encoder/textvqa", (training, validation), stated=False)


def scienceqa() -> Imitation:
    planned = ["B. green", "a", "red", "D", ""]
    right = ["B", "A", "A", "C", "B"]
    items = [
        Item(
            {
                "image": colour(4, number),
                "question": f"Which rock {number} is it?",
                "choices": ["red", "green", "blue", "black"],
                "answer": "ABCD".index(letter),
                "hint": "Look at the rock." if number % 2 else "",
                "task": "closed choice",
                "grade": "grade4",
                "subject": "natural science",
                "topic": "earth-science",
                "category": "Rocks",
                "skill": "Identify rocks",
                "lecture": "",
                "solution": "",
            },
            letter,
            answer,
        )
        for number, (letter, answer) in enumerate(zip(right, planned, strict=True))
    ]
    features = Features(
        {"image": Image(), "question": TEXT, "choices": List(TEXT), "answer": INT8}
        | _strings("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    )
    path = "ScienceQA-IMG/{}-00000-of-00001.parquet"
    config = "ScienceQA-IMG"
    return Imitation(
        "lmms-lab-encoder/ScienceQA",
        (
            Part(config, "validation", path.format("validation"), features, items[:1]),
            Part(config, "test", path.format("test"), features, items),
        ),
    )


def mme() -> Imitation:
    """Pairs: one of two right is worth 50, both 200."""
    pairs = [
        ("existence", "existence/1.jpg", ("", "Yes")),
        ("existence", "existence/2.jpg", ("", "")),
        ("color", "color/1.jpg", ("No.", "Yes, it is")),
        ("code_reasoning", "code_reasoning/0001.png", ("yes", "no, it is not")),
    ]
    items = [
        Item(
            {
                "question_id": name,
                "image": colour(5, number),
                "question": f"Is {name} {'so' if first else 'not so'}? Please answer yes or no.",
                "answer": "Yes" if first else "No",
                "category": category,
            },
            "Yes" if first else "No",
            planned[0 if first else 1],
        )
        for number, (category, name, planned) in enumerate(pairs)
        for first in (True, False)
    ]
    features = Features({"question_id": TEXT, "image": Image(), **_strings("question", "answer", "category")})
    return Imitation(
        "lmms-lab-encoder/MME", (Part("default", "test", "data/test-00000-of-00001.parquet", features, items),)
    )


def ai2d() -> Imitation:
    right, planned = ["B", "A", "D", "C"], ["B. leaf", "a", "A", ""]
    items = [
        Item(
            {
                "question": f"What is label {number}?",
                "options": ["root", "leaf", "stem", "seed"],
                "answer": str("ABCD".index(letter)),
                "image": colour(6, number),
            },
            letter,
            answer,
        )
        for number, (letter, answer) in enumerate(zip(right, planned, strict=True))
    ]
    features = Features(question=TEXT, options=List(TEXT), answer=TEXT, image=Image())
    return Imitation(
        "lmms-lab-encoder/ai2d", (Part("default", "test", "data/test-00000-of-00001.parquet", features, items),)
    )


def mmstar() -> Imitation:
    """One question of each category, two of the first; the file's name is the publisher's."""
    categories = [
        ("coarse perception", "image emotion", "A", ""),
        ("coarse perception", "image emotion", "B", "C"),
        ("fine-grained perception", "recognition", "C", "(C)"),
        ("instance reasoning", "single-instance reasoning", "D", "The answer is D."),
        ("logical reasoning", "diagram reasoning", "A", ""),
        ("science & technology", "geography & earth science & agriculture", "B", "A"),
        ("math", "geometry", "C", ""),
    ]
    items = [
        Item(
            {
                "index": number,
                "question": f"Which one is {number}?\nOptions: A: one, B: two, C: three, D: four",
                "image": colour(7, number),
                "answer": letter,
                "category": category,
                "l2_category": finer,
                "meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{number}.jpg"},
            },
            letter,
            planned,
        )
        for number, (category, finer, letter, planned) in enumerate(categories)
    ]
    features = Features(
        {"index": INT64, "question": TEXT, "image": Image(), **_strings("answer", "category", "l2_category")}
        | {"meta_info": _strings("source", "split", "image_path")}
    )
    return Imitation("Lin-Chen/MMStar", (Part("val", "val", "mmstar.parquet", features, items),))


def mmmu() -> Imitation:
    """Two choices, an open question, and one with two pictures."""
    rows = [
        ("Art_1", "What is shown in <image 1>?", "['vase', 'bowl', 'cup']", "B", "multiple-choice", 1, "(B)"),
        ("Math_1", "Which curve is <image 1>?", "['circle', 'line']", "A", "multiple-choice", 1, "B"),
        ("Math_2", "<image 1> What is the area?", "[]", "12", "open", 1, "The area is 12."),
        ("Music_1", "Compare <image 1> with <image 2>.", "['same', 'other']", "B", "multiple-choice", 2, ""),
    ]
    names = tuple(f"image_{number}" for number in range(1, 8))
    items = [
        Item(
            {
                "id": f"validation_{name}",
                "question": question,
                "options": options,
                "explanation": "",
                **{column: colour(8, row, n) if n < pictures else None for n, column in enumerate(names)},
                "img_type": "['Diagrams']",
                "answer": answer,
                "topic_difficulty": "Easy",
                "question_type": kind,
                "subfield": "General",
            },
            answer,
            planned,
        )
        for row, (name, question, options, answer, kind, pictures, planned) in enumerate(rows)
    ]
    features = Features(
        {**_strings("id", "question", "options", "explanation"), **dict.fromkeys(names, Image())}
        | _strings("img_type", "answer", "topic_difficulty", "question_type", "subfield")
    )
    path = "data/{}-00000-of-00001.parquet"
    return Imitation(
        "lmms-lab-encoder/MMMU",
        (
            Part("default", "dev", path.format("dev"), features, items[:1], names),
            Part("default", "validation", path.format("validation"), features, items, names),
        ),
    )


MAKERS = (gqa, mmbench, pope, textvqa, scienceqa, mme, ai2d, mmstar, mmmu)


def imitations() -> dict[str, Imitation]:
    """All of them by the name of the data set."""
    return {made.repo: made for made in (maker() for maker in MAKERS)}


def write_all(folder: Path) -> Path:
    """A mirror made by hand: every imitation, no mirror.json."""
    for imitation in imitations().values():
        write(folder, imitation)
    return folder
