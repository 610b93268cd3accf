"""Ids, labels and stop tokens of every template, compared with lists that were checked by hand (see their README)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_moe.data.conversation import IGNORE_INDEX, SegmentTokenizer, TextEncoder
from llava_moe.data.schema import Turn
from llava_moe.data.templates import TEMPLATES
from tests.tiny import tiny_chat_tokenizer

FOLDER = Path(__file__).parents[1] / "golden" / "templates"
GOLDEN: dict[str, Any] = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}
CASES = [(name, index) for name, golden in GOLDEN.items() for index in range(len(golden["cases"]))]
QUIRKY = {"qwen_1_5", "llava_llama_3", "gemma"}


def made(template: str, case: dict[str, Any]) -> TextEncoder:
    tokenizer = tiny_chat_tokenizer(case["tokenizer"])
    segments = SegmentTokenizer(tokenizer, "<image>", tokenizer.convert_tokens_to_ids("<image>"))
    return TextEncoder(TEMPLATES.get(template)(tokenizer, case["options"]), segments)


@pytest.mark.parametrize(("template", "index"), CASES)
def test_ids_labels_and_stops(template: str, index: int):
    golden = GOLDEN[template]
    case = golden["cases"][index]
    encoder = made(template, case)
    turns = [Turn(role, text) for role, text in case["turns"]]
    num_images = sum(turn.text.count("<image>") for turn in turns)
    ids, labels = encoder.encode(turns, num_images, golden["num_image_tokens"], mode="train")
    assert encoder.segments.tokenizer.convert_ids_to_tokens(ids) == case["tokens"]
    assert ids == case["ids"]
    assert labels == case["labels"]
    assert encoder.stop_token_ids == case["stop_token_ids"]
    assert encoder.stop_strings == case["stop_strings"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_has_goldens_on_two_kinds_of_tokenizer(template: str):
    golden = GOLDEN[template]
    assert golden["template"] == template
    kinds = {case["tokenizer"] for case in golden["cases"]}
    assert kinds & {"gpt2", "llama3"}
    assert kinds & {"llama", "phi3", "gemma"}
    assert {bool(case["options"]) for case in golden["cases"]} == ({False, True} if template in QUIRKY else {False})


def test_the_lists_belong_together():
    for golden in GOLDEN.values():
        for case in golden["cases"]:
            assert len(case["tokens"]) == len(case["ids"]) == len(case["labels"])
            assert all(label in (IGNORE_INDEX, token) for token, label in zip(case["ids"], case["labels"], strict=True))
            # the last answer ends with a stop token or text, and that is learned
            learned = [label for label in case["labels"] if label != IGNORE_INDEX]
            tail = case["tokens"][case["ids"].index(learned[-1])]
            assert learned[-1] in case["stop_token_ids"] or case["stop_strings"] or case["options"], tail
