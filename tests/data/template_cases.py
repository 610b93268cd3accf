"""Conversations, tokenizers and short-cuts that the tests of the templates share."""

from __future__ import annotations

import re

from llava_moe.data.conversation import IGNORE_INDEX, SegmentTokenizer, TextEncoder
from llava_moe.data.schema import Turn
from llava_moe.data.templates import TEMPLATES
from tests.tiny import CHAT_TOKENIZERS, tiny_chat_tokenizer, tiny_llama_tokenizer, tiny_tokenizer

TOKENIZERS = {kind: tiny_chat_tokenizer(kind) for kind in CHAT_TOKENIZERS}
TOKENIZERS |= {"tiny": tiny_tokenizer(), "tiny_llama": tiny_llama_tokenizer()}
NEEDS_BOS = {"llava_llama_2", "llava_llama_3"}
NO_SYSTEM = {"plain", "gemma"}
QUIRKY = ["qwen_1_5", "llava_llama_3", "gemma"]
NUM_TOKENS = 2
QUESTION = Turn("user", "<image>\nWhat is the colour?")
CHAT = [QUESTION, Turn("assistant", "red"), Turn("user", "What shape?"), Turn("assistant", "a square. \U0001f7e5")]
SYSTEM_TURN = Turn("system", "Answer in one word.")
CHATS = {
    "image first": CHAT,
    "image in the middle": [Turn("user", "What is <image> and\n<image> the shape?"), *CHAT[1:]],
    "image in a later turn": [Turn("user", "What is it?"), CHAT[1], QUESTION, CHAT[3]],
    "text only": [Turn("user", "What is it?"), Turn("assistant", "1. a `f(x)`:\n\n\tx = 12\n2. it's"), *CHAT[2:]],
    "unicode": [Turn("user", "<image>\n\u00e9t\u00e9 \u65e5\u672c"), Turn("assistant", "\u8d64\u3044 \U0001f7e5.")],
    "three rounds": [*CHAT, Turn("user", "and?"), Turn("assistant", "The circle.")],
}
PAIRS = [(t, kind) for t in TEMPLATES for kind in CHAT_TOKENIZERS if not (kind == "gpt2" and t in NEEDS_BOS)]
# what is learned of an answer, where that is not the answer and the end token
LEARNED = {"v1": " {}", "llava_llama_2": " {} ", "mistral_instruct": " {} "}


def encoder(template: str, tokenizer: str, chat_template: str | None = None, **options: object) -> TextEncoder:
    loaded = TOKENIZERS[tokenizer]
    if chat_template is not None:
        loaded = {"tiny": tiny_tokenizer, "tiny_llama": tiny_llama_tokenizer}[tokenizer]()
        loaded.chat_template = chat_template
    image_id = loaded.convert_tokens_to_ids("<image>")
    return TextEncoder(TEMPLATES.get(template)(loaded, options), SegmentTokenizer(loaded, "<image>", image_id))


def conversations(template: str) -> dict[str, list[Turn]]:
    """The chats that the template can hold."""
    if template != "plain":
        return CHATS
    return {name: turns[:2] for name, turns in CHATS.items() if "<image>" in turns[0].text}


def count(turns: list[Turn]) -> int:
    return sum(turn.text.count("<image>") for turn in turns)


def train(made: TextEncoder, turns: list[Turn], num_image_tokens: int = NUM_TOKENS) -> tuple[list[int], list[int]]:
    return made.encode(turns, count(turns), num_image_tokens, mode="train")


def prompt(made: TextEncoder, turns: list[Turn]) -> list[int]:
    return made.encode(turns, count(turns), NUM_TOKENS, mode="generate")[0]


def rendered(made: TextEncoder, turns: list[Turn], generate: bool = False) -> str:
    return "".join(segment.text for segment in made.template.render(turns, add_generation_prompt=generate))


def tokens(encoder: TextEncoder, ids: list[int]) -> list[str]:
    return encoder.segments.tokenizer.convert_ids_to_tokens(ids)


def target_spans(labels: list[int]) -> list[tuple[int, int]]:
    kinds = "".join("." if label == IGNORE_INDEX else "T" for label in labels)
    return [match.span() for match in re.finditer("T+", kinds)]
