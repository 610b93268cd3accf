"""The page of samples: wrong ones first, spread over the task, small pictures, bounded, and honest about how many."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from llava_moe.evaluation import samples_page

COLOURS = ["red", "green", "blue"]


def sample(number: int, credit: float | None) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "doc_id": number,
        "prompt": f"What colour is number {number}?\n<b>one word</b>",
        "target": "red",
        "answer": "green",
        "credit": credit,
    }


def task(number_of_pictures: int = 1) -> Any:
    documents = [COLOURS[number % 3] for number in range(200)]
    return SimpleNamespace(
        eval_docs=documents,
        doc_to_visual=lambda colour: [Image.new("RGB", (900, 300), colour)] * number_of_pictures,
    )


RESULTS: dict[str, Any] = {"checkpoint": "runs/a & b", "arguments": {"blank_images": False}}


def test_wrong_answers_come_first_and_are_spread() -> None:
    credits = [0.0 if number < 100 else 1.0 for number in range(200)]
    credits[150] = 0.3
    chosen = samples_page.choose([sample(number, credit) for number, credit in enumerate(credits)])
    assert len(chosen) == samples_page.PER_TASK == len(set(chosen))
    found = [credits[place] for place in chosen]
    assert found == sorted(found)
    assert found.count(1.0) == samples_page.PER_TASK - samples_page.WRONG
    wrong = [place for place in chosen if credits[place] == 0]
    assert max(wrong) > 90  # not the first ones only
    assert len(samples_page.choose([sample(0, 1.0), sample(1, 0.0)])) == 2
    assert samples_page.choose([sample(number, 0.0) for number in range(40)], count=5, wrong=3) == [0, 8, 16, 24, 32]
    mixed = [sample(0, None), sample(1, 1.0), sample(2, 0.0)]
    assert samples_page.choose(mixed) == [2, 0, 1]
    assert samples_page.choose([]) == []


def test_page_shows_pictures_texts_and_how_many(tmp_path: Path) -> None:
    samples_page.keep(tmp_path, "gqa", [sample(number, float(number % 2)) for number in range(100)], task())
    samples_page.keep(tmp_path, "mmmu_val", [sample(number, None) for number in range(3)], task(6))
    samples_page.write(tmp_path, {**RESULTS, "tasks": {"gqa": {}, "mmmu_val": {}}})
    page = (tmp_path / samples_page.PAGE).read_text()
    assert "50 of 100 answers are right; 36 of 100 are shown." in page
    assert "3 of 3 answers are shown; they are not judged one by one." in page
    assert "103 questions were answered;\n39 are shown here" in page
    assert "runs/a &amp; b" in page
    assert "&lt;b&gt;one word" in page
    assert page.index(">q0<") < page.index(">q1<")  # q0 is wrong
    assert page.count('class="wrong"') == 24
    assert page.count("2 more pictures") == 3
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)  # nothing is loaded from elsewhere
    assert "<script" not in page
    encoded = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(encoded) == 36 + 3 * samples_page.PICTURES
    picture = Image.open(io.BytesIO(base64.b64decode(encoded[0])))
    assert picture.size == (224, 75)
    assert max(zip(picture.getpixel((100, 30)), "rgb", strict=True))[1] == "r"  # document 0 is red
    for place in (0, 1):  # each task can be shown alone
        assert f"#t{place}:checked ~ section:not(.t{place})" in page


def test_many_tasks_share_the_page(tmp_path: Path) -> None:
    names = [f"task{number}" for number in range(40)]
    samples_page.keep(tmp_path, "one", [sample(number, float(number % 2)) for number in range(100)], task())
    for name in names:
        (tmp_path / samples_page.FOLDER / f"{name}.json").write_text(
            (tmp_path / samples_page.FOLDER / "one.json").read_text()
        )
    samples_page.write(tmp_path, {**RESULTS, "tasks": dict.fromkeys(names)})
    page = (tmp_path / samples_page.PAGE).read_text()
    assert page.count("<li ") == 40 * 15 == samples_page.MOST
    assert page.count('class="wrong"') == 40 * 10


def test_long_texts_are_cut(tmp_path: Path) -> None:
    long = {**sample(0, 0.0), "answer": "x" * 5000, "target": ["a", "b"]}
    samples_page.keep(tmp_path, "t", [long], task(0))
    samples_page.write(tmp_path, {**RESULTS, "tasks": {"t": {}}})
    page = (tmp_path / samples_page.PAGE).read_text()
    assert "x" * samples_page.LONGEST + samples_page.MARK in page
    assert "x" * (samples_page.LONGEST + 1) not in page
    assert "[&#34;a&#34;, &#34;b&#34;]" in page
    assert "<img" not in page
