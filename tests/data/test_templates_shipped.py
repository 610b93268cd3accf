"""The template that a tokenizer ships, and goldens that are written down as token strings."""

import pytest

from llava_moe.data.conversation import IGNORE_INDEX, TemplateError, TextEncoder
from llava_moe.data.schema import Turn
from llava_moe.data.templates import TEMPLATES
from tests.data.template_cases import (
    CHAT,
    NUM_TOKENS,
    QUESTION,
    SYSTEM_TURN,
    encoder,
    rendered,
    tokens,
)
from tests.tiny import tiny_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# (template, tokenizer, turns, tokens that are masked and learned in turn); written by hand from the published formats
GOLDEN = [
    ("plain", "tiny_llama", CHAT[:2], ["<s> <image> <image>", "▁red <0x0A>"]),
    ("plain", "tiny", CHAT[:2], ["<image> <image>", "red Ċ"]),
    (
        "v1",
        "tiny_llama",
        [QUESTION, Turn("assistant", "red"), Turn("user", "What shape?"), Turn("assistant", "a square")],
        [
            "<s> SYSTEM ▁USER : ▁ <image> <image> ▁ <0x0A> What ▁is ▁the ▁colour ? ▁ASSISTANT :",
            "▁red </s>",
            "▁USER : ▁What ▁shape ? ▁ASSISTANT :",
            "▁a ▁square </s>",
        ],
    ),
    (
        "v1",
        "tiny",
        [QUESTION, Turn("assistant", "red"), Turn("user", "What shape?"), Turn("assistant", "a square")],
        [
            "SYSTEM ĠUSER : Ġ <image> <image> Ċ What Ġis Ġthe Ġcolour ? ĠASSISTANT :",
            "Ġred <|im_end|>",
            "USER : ĠWhat Ġshape ? ĠASSISTANT :",
            "Ġa Ġsquare <|im_end|>",
        ],
    ),
    (
        "chatml",
        "tiny",
        [QUESTION, Turn("assistant", "red"), Turn("user", "What shape?"), Turn("assistant", "a square")],
        [
            "<|im_start|> user Ċ <image> <image> Ċ What Ġis Ġthe Ġcolour ? <|im_end|> Ċ <|im_start|> assistant Ċ",
            "red <|im_end|>",
            "Ċ <|im_start|> user Ċ What Ġshape ? <|im_end|> Ċ <|im_start|> assistant Ċ",
            "a Ġsquare <|im_end|>",
            "Ċ",
        ],
    ),
]


@pytest.mark.parametrize(("template", "tokenizer", "turns", "parts"), GOLDEN, ids=lambda value: str(value)[:12])
def test_golden_ids_and_labels(template: str, tokenizer: str, turns: list[Turn], parts: list[str]):
    made = encoder(template, tokenizer)
    check_golden(made, turns, parts)


def test_golden_shipped_chat_template_equals_chatml():
    for turns, parts in [(turns, parts) for name, _, turns, parts in GOLDEN if name == "chatml"]:
        check_golden(encoder("chat_template", "tiny"), turns, parts)


def check_golden(made: TextEncoder, turns: list[Turn], parts: list[str]) -> None:
    tokenizer = made.segments.tokenizer
    system = tokens(made, tokenizer.encode(SYSTEM, add_special_tokens=False))
    expected: list[str] = []
    is_target: list[bool] = []
    for index, part in enumerate(parts):
        new = [token for word in part.split() for token in (system if word == "SYSTEM" else [word])]
        expected += new
        is_target += [index % 2 == 1] * len(new)
    num_images = sum(turn.text.count("<image>") for turn in turns)
    ids, labels = made.encode(turns, num_images, NUM_TOKENS, mode="train")
    assert tokens(made, ids) == expected
    assert labels == [token if target else IGNORE_INDEX for token, target in zip(ids, is_target, strict=True)]


LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_golden_shipped_llama_2_template_writes_its_own_bos():
    turns = [Turn("user", "What?"), Turn("assistant", "red"), Turn("user", "What?"), Turn("assistant", "red")]
    question = "<s> ▁ [ I N S T ] ▁What ? ▁ [ / I N S T ]"
    parts = [question, "▁red ▁ </s>", question, "▁red ▁ </s>"]
    check_golden(encoder("chat_template", "tiny_llama", LLAMA_2), turns, parts)


# as published with llava-1.5-7b-hf: images first, no end token
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_that_takes_parts_gets_parts():
    made = encoder("chat_template", "tiny_llama", LLAVA_HF)
    rendered = made.template.render(CHAT[:3], add_generation_prompt=True)
    text = "".join(segment.text for segment in rendered)
    assert text == "USER: <image>\nWhat is the colour? ASSISTANT: red USER: What shape? ASSISTANT:"


def test_a_template_without_end_token_serves_but_does_not_train():
    made = encoder("chat_template", "tiny_llama", LLAVA_HF)
    ids, _ = made.encode(CHAT[:1], 1, 1, mode="generate")
    assert tokens(made, ids)[:4] == ["<s>", "▁USER", ":", "▁"]
    with pytest.raises(TemplateError, match="would never stop"):
        made.encode(CHAT[:2], 1, 1, mode="train")


STABLE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + TEXT + '<|im_end|>' }}{% endfor %}GEN"


@pytest.mark.parametrize(
    ("text", "generation", "message"),
    [
        ("m['content'] + ('!' if loop.last and loop.index == 2 else '')", "<|im_start|>assistant", "a later turn"),
        ("m['content']", "<|im_start|>assistant NOW", "does not start with its generation prompt"),
        ("(m['content'] | upper)", "<|im_start|>assistant", "rewrites the text"),
        ("''", "<|im_start|>assistant", "neither as a string nor as parts"),
    ],
)
def test_unfit_chat_templates_are_refused(text: str, generation: str, message: str):
    end = "{% if add_generation_prompt %}" + generation + "{% endif %}"
    jinja = STABLE.replace("TEXT", text).replace("GEN", end)
    with pytest.raises(TemplateError, match=message):
        encoder("chat_template", "tiny", jinja).encode(CHAT, 1, 1, mode="train")


def test_templates_name_what_the_tokenizer_lacks():
    bare = tiny_tokenizer()
    bare.chat_template = None
    bare.eos_token = None
    with pytest.raises(TemplateError, match="ships none; set template to one of plain, v1, chatml, llava_llama_2"):
        TEMPLATES.get("chat_template")(bare)
    with pytest.raises(TemplateError, match="this tokenizer has none"):
        TEMPLATES.get("v1")(bare)


def test_the_shipped_template_refuses_what_its_jinja_does_with_a_system_message():
    drops = (
        "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    made = encoder("chat_template", "tiny", drops)
    assert "red" in rendered(made, CHAT)
    with pytest.raises(TemplateError, match="leaves the system message out"):
        made.template.render([SYSTEM_TURN, *CHAT])
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    made = encoder("chat_template", "tiny", refuses + drops)
    assert "red" in rendered(made, CHAT)
    with pytest.raises(TemplateError, match=r"refuses the conversation: System role not supported"):
        made.template.render([SYSTEM_TURN, *CHAT])
