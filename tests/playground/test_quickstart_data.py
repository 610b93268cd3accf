"""The built directory: complete, deterministic, balanced, without leaks, and in the official formats."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from playground import quickstart_data
from playground.assets import fetch_assets
from playground.quickstart_data import EVAL_COUNTS, PROFILES, SFT_SHARES, DataBuildError, build, make_examples
from playground.records import (
    LETTER_ANSWER,
    SHORT_ANSWER,
    Example,
    commonest_answers,
    conversations,
    evaluation_record,
    training_record,
)
from playground.scenes import ImageStore
from playground.sources import Sources, open_sources
from tests.playground.fake_wheels import fake_assets

COUNTS = dict.fromkeys(EVAL_COUNTS, 24)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "smoke"
    build("smoke", out)
    return out


@pytest.fixture(scope="module", params=["procedural", "fake wheels", pytest.param("assets", marks=pytest.mark.assets)])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    rng = np.random.default_rng(0)
    if request.param == "procedural":
        return open_sources({}, 32, rng)
    if request.param == "fake wheels":
        return open_sources(fake_assets(tmp_path_factory.mktemp("wheels")), 32, rng)
    statuses = fetch_assets(offline=True)
    missing = [str(status) for status in statuses.values() if status.path is None]
    if missing:
        pytest.skip("; ".join(missing))
    return open_sources(statuses, 32, rng)


@pytest.fixture(scope="module")
def both(sources: Sources) -> dict[str, dict[str, list[Example]]]:
    return {split: make_examples(sources, COUNTS, split, ImageStore(32), seed=3) for split in ("train", "test")}


def flat(made: dict[str, list[Example]]) -> Iterator[Example]:
    for examples in made.values():
        yield from examples


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_training_files(smoke: Path) -> None:
    sft, pretrain = read_json(smoke / "sft.json"), read_json(smoke / "pretrain.json")
    manifest = read_json(smoke / "manifest.json")
    assert manifest["counts"]["sft.json"] == PROFILES["smoke"].sft
    questions = [len(record["conversations"]) // 2 for record in sft]
    assert sum(questions) == sum(PROFILES["smoke"].sft.values())
    assert max(questions) in (2, 3)
    short = [SHORT_ANSWER in record["conversations"][0]["value"] for record in sft]
    assert 0.7 < sum(short) / len(short) < 0.95
    assert all(
        record["conversations"][2]["value"].count("<image>") == 0 for record in sft if len(record["conversations"]) > 2
    )
    assert len(pretrain) > 50
    for record in sft + pretrain:
        human, answer = record["conversations"][:2]
        assert human["from"] == "human"
        assert human["value"].startswith("<image>\n")
        assert answer["from"] == "gpt"
        assert answer["value"]
        with Image.open(smoke / "images" / record["image"]) as picture:
            assert picture.mode == "RGB"
            assert max(picture.size) <= 128
    assert len({record["id"] for record in sft + pretrain}) == len(sft) + len(pretrain)
    assert len(list((smoke / "images").rglob("*.png"))) == manifest["images"]


def test_manifest_says_what_was_replaced(smoke: Path) -> None:
    manifest = read_json(smoke / "manifest.json")
    assert set(manifest["fallbacks"]) == {"emoji", "easy-vqa", "mnist", "tower", "language model"}
    assert manifest["tower"] == manifest["language_model"] == "random"
    assert (smoke / "DATA_CARD.md").read_text() == Path(quickstart_data.__file__).with_name("DATA_CARD.md").read_text()


def test_evaluation_files(smoke: Path, tmp_path: Path) -> None:
    families: Counter[str] = Counter()
    priors = read_json(smoke / "priors.json")
    questions = set()
    for style in ("gqa", "pope", "mmbench"):
        table = datasets.Dataset.from_parquet(str(smoke / "eval" / f"{style}.parquet"), cache_dir=str(tmp_path))
        assert isinstance(table.features["image"], datasets.Image)
        for row in table:
            families[row["family"]] += 1
            questions.add(row["question"])
            assert row["image"].size == (32, 32)
            assert style != "pope" or row["answer"] in ("yes", "no")
            assert style != "mmbench" or row["answer"] in "ABCD"
    assert families == dict.fromkeys(EVAL_COUNTS, 8)
    assert set(priors) == questions


def test_same_seed_same_bytes(smoke: Path, tmp_path: Path) -> None:
    build("smoke", tmp_path / "again")
    build("smoke", tmp_path / "other", seed=1)
    assert digest(tmp_path / "again") == digest(smoke)
    assert digest(tmp_path / "other")["sft.json"] != digest(smoke)["sft.json"]


def test_finished_is_left_alone_and_outdated_is_rebuilt(tmp_path: Path) -> None:
    out = tmp_path / "data"
    build("smoke", out)
    marker = out / "marker"
    marker.touch()
    build("smoke", out)
    assert marker.exists()
    build("smoke", out, seed=1)
    assert not marker.exists()
    assert read_json(out / "manifest.json")["seed"] == 1


def test_foreign_folders_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()
    with pytest.raises(DataBuildError, match=r"no manifest\.json"):
        build("smoke", tmp_path)
    assert (tmp_path / "precious.txt").exists()
    with pytest.raises(DataBuildError, match="smoke, default, full"):
        build("tiny", tmp_path / "x")


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quickstart_data, "_write_json", full)
    assert quickstart_data.main(["--profile", "smoke", "--out", str(tmp_path / "data")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_counts_and_captions(both: dict[str, dict[str, list[Example]]]) -> None:
    assert list(both["train"]) == list(SFT_SHARES)
    assert {family: len(examples) for family, examples in both["train"].items()} == COUNTS
    captions = quickstart_data.make_captions(both["train"], 40, np.random.default_rng(0))
    assert len(captions) >= 20
    assert all(example.caption for example in captions)
    assert len({example.image for example in captions}) == len(captions)


def test_held_out_concepts_are_in_no_training_picture(
    sources: Sources, both: dict[str, dict[str, list[Example]]]
) -> None:
    held_out = {thing.concept for thing in sources.things.select(held_out=True)}
    shown = {concept for example in flat(both["train"]) for concept in example.concepts}
    assert shown
    assert not shown & held_out
    for family in ("emoji_kind", "counting"):
        assert all(set(example.concepts) <= held_out for example in both["test"][family])
    for example in flat(both["test"]):
        if example.concepts:
            assert (example.subset == "unseen") == bool(set(example.concepts) & held_out)


def test_yes_no_is_balanced_for_every_string(both: dict[str, dict[str, list[Example]]]) -> None:
    for made in both.values():
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for example in made["shapes_yesno"] + made["presence"]:
            answers[example.question][example.answer] += 1
        assert len(answers) > 5
        assert all(count["yes"] == count["no"] for count in answers.values())


def test_no_picture_is_asked_the_same_twice_in_training(both: dict[str, dict[str, list[Example]]]) -> None:
    for family in ("shapes_yesno", "presence"):
        asked = Counter((example.image, example.question) for example in both["train"][family])
        assert max(asked.values()) == 1


def test_presence_and_relations_answer_to_the_picture(
    both: dict[str, dict[str, list[Example]]], sources: Sources
) -> None:
    kinds_of: dict[str, set[str]] = defaultdict(set)  # a few concepts hold things of two kinds
    for thing in sources.things.things:
        kinds_of[thing.concept].add(thing.kind)
    for made in both.values():
        assert {example.category for example in made["presence"]} == {"name", "kind"}
        for example in made["presence"]:
            word = example.question.removeprefix("Is there ").removesuffix(" in the image?")
            if example.category == "kind":
                kinds = [kinds_of[concept] for concept in example.concepts]
                asked = word.removeprefix("any ")
                shown = (
                    any(asked in of for of in kinds) if example.answer == "yes" else all(of == {asked} for of in kinds)
                )
                assert shown == (example.answer == "yes")
                continue
            assert (word in example.caption.replace(" and ", ", ").split(", ")) == (example.answer == "yes")
        answers = Counter(example.answer for example in made["relations"])
        assert set(answers.values()) == {6}
        for example in made["relations"]:
            first, second = example.caption.split(" ")[1], example.caption.split(" ")[-1]
            side = next(word for word in example.caption.split(" ") if word in ("left", "right", "above", "below"))
            if example.answer == side:
                assert example.question == f"Where is the {first} relative to the {second}?"
            else:
                assert example.question == f"Where is the {second} relative to the {first}?"


def test_choices_hold_the_answer_once_and_letters_are_even(both: dict[str, dict[str, list[Example]]]) -> None:
    for made in both.values():
        kinds = [example for example in made["choice"] if example.category == "kind"]
        assert set(Counter(example.answer for example in kinds).values()) == {3}
        for example in made["choice"]:
            assert len(set(example.options)) == len(example.options) >= 3
            assert "ABCD".index(example.answer) < len(example.options)


def test_no_question_string_belongs_to_two_families(both: dict[str, dict[str, list[Example]]]) -> None:
    families: dict[str, set[str]] = defaultdict(set)
    for made in both.values():
        for example in flat(made):
            families[example.question].add(example.family)
    assert all(len(names) == 1 for names in families.values())


def test_commonest_answers() -> None:
    def example(question: str, answer: str) -> Example:
        return Example("f", "gqa", question, answer, "x.png")

    train = [example("a?", "1"), example("a?", "2"), example("a?", "2"), example("b?", "3"), example("b?", "3")]
    priors = commonest_answers([*train, example("b?", "3")], [example("a?", "9"), example("new?", "9")])
    assert priors == {"a?": "2", "new?": "3"}


def asked(image: str, style: str, topic: str, number: int) -> Example:
    family = "shapes_yesno" if style == "pope" else "shapes_open"
    return Example(family, style, f"{style} {topic} {number}?", "yes", image, topic=topic)  # type: ignore[arg-type]


def test_conversations_hold_every_question_once_and_give_nothing_away() -> None:
    examples = [
        asked(f"{image}.png", style, topic, number)
        for image in range(30)
        for number in range(2)
        for style, topic in (("gqa", "color"), ("pope", "color"), ("gqa", "shape"), ("pope", "shape"))
    ]
    examples += [Example("relations", "gqa", f"where {side}?", "left", "0.png") for side in "ab"]
    groups = conversations(examples, np.random.default_rng(0))
    assert sorted(id(example) for group in groups for example in group) == sorted(map(id, examples))
    assert {len(group) for group in groups} >= {1, 3}
    orders = set()
    for group in groups:
        assert len({example.image for example in group}) == 1
        assert len(group) == 1 or "relations" not in {example.family for example in group}
        for place, example in enumerate(group):
            told = {before.topic for before in group[:place] if before.style == "gqa"}
            assert example.style != "pope" or example.topic not in told
        orders.add(tuple(example.style for example in group))
    assert len(orders) > 4


def test_only_the_first_turn_asks_for_a_short_answer() -> None:
    group = [asked("a.png", "pope", "color", 0), asked("a.png", "gqa", "color", 0)]
    for bare, first in ((False, f"<image>\npope color 0?{SHORT_ANSWER}"), (True, "<image>\npope color 0?")):
        turns = training_record(group, 3, bare)["conversations"]
        assert [turn["value"] for turn in turns] == [first, "yes", "gqa color 0?", "yes"]
    choice = Example("choice", "mmbench", "Which?", "A", "a.png", ("x", "y"))
    assert training_record([choice], 0, True)["conversations"][0]["value"].endswith(LETTER_ANSWER)


def test_prompts_equal_the_official_ones(both: dict[str, dict[str, list[Example]]]) -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks.gqa.utils import gqa_doc_to_text
    from lmms_eval.tasks.mmbench.en_utils import mmbench_doc_to_text
    from lmms_eval.tasks.pope.utils import pope_doc_to_text

    official = {"gqa": gqa_doc_to_text, "pope": pope_doc_to_text, "mmbench": mmbench_doc_to_text}
    seen = Counter()
    for number, example in enumerate(flat(both["test"])):
        post = LETTER_ANSWER[1:] if example.style == "mmbench" else SHORT_ANSWER
        record = evaluation_record(example, number, b"")
        assert official[example.style](record, {"pre_prompt": "", "post_prompt": post}) == example.prompt
        seen[example.style] += 1
    assert set(seen) == set(official)


def test_official_scorers_accept_the_right_answers(both: dict[str, dict[str, list[Example]]]) -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator, mmbench_process_results
    from lmms_eval.tasks.pope.utils import pope_process_results

    choices = [evaluation_record(example, number, b"") for number, example in enumerate(both["test"]["choice"])]
    results = [mmbench_process_results(record, [record["answer"]])["submission"] for record in choices]
    assert mmbench_evaluator.eval_result(results, eval_method="static")[0] == 1
    for example in both["test"]["presence"]:
        record = evaluation_record(example, 0, b"")
        assert pope_process_results(record, [example.answer])["pope_accuracy"]["score"] == 1
