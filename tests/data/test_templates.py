"""Every registered template is held to the invariants, on a byte-level and on a sentencepiece-like tokenizer."""

import re

import pytest

from llava_moe.data.conversation import IGNORE_INDEX, SegmentTokenizer, TemplateError, TextEncoder
from llava_moe.data.schema import Turn
from llava_moe.data.templates import TEMPLATES
from tests.tiny import tiny_llama_tokenizer, tiny_tokenizer

TOKENIZERS = {"bytelevel": tiny_tokenizer(), "llama": tiny_llama_tokenizer()}
NUM_TOKENS = 2
QUESTION = Turn("user", "<image>\nWhat is the colour?")
FOLLOW_UP = [Turn("user", "What shape?"), Turn("assistant", "a square. \U0001f7e5")]
CHAT = [QUESTION, Turn("assistant", "red"), *FOLLOW_UP]
PAIRS = [(template, tokenizer) for template in TEMPLATES for tokenizer in TOKENIZERS]


def encoder(template: str, tokenizer: str, chat_template: str | None = None) -> TextEncoder:
    loaded = TOKENIZERS[tokenizer]
    if chat_template is not None:
        loaded = {"bytelevel": tiny_tokenizer, "llama": tiny_llama_tokenizer}[tokenizer]()
        loaded.chat_template = chat_template
    image_id = loaded.convert_tokens_to_ids("<image>")
    return TextEncoder(TEMPLATES.get(template)(loaded), SegmentTokenizer(loaded, "<image>", image_id))


def conversation(template: str) -> list[Turn]:
    return CHAT[:2] if template == "plain" else CHAT


def tokens(encoder: TextEncoder, ids: list[int]) -> list[str]:
    return encoder.segments.tokenizer.convert_ids_to_tokens(ids)


def target_spans(labels: list[int]) -> list[tuple[int, int]]:
    kinds = "".join("." if label == IGNORE_INDEX else "T" for label in labels)
    return [match.span() for match in re.finditer("T+", kinds)]


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_the_training_prefix_is_the_generation_prompt(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    turns = conversation(template)
    ids, labels = made.encode(turns, 1, NUM_TOKENS, mode="train")
    spans = target_spans(labels)
    assert len(spans) == len(turns) // 2
    text = "".join(segment.text for segment in made.template.render(turns))
    for index, (start, _) in enumerate(spans):
        asked = turns[: 2 * index + 1]
        assert made.encode(asked, 1, NUM_TOKENS, mode="generate")[0] == ids[:start]
        prompt = "".join(segment.text for segment in made.template.render(asked, add_generation_prompt=True))
        assert text.startswith(prompt)


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_only_answers_and_their_end_are_learned(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    turns = conversation(template)
    ids, labels = made.encode(turns, 1, NUM_TOKENS, mode="train")
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True))
    for (start, end), answer in zip(target_spans(labels), turns[1::2], strict=True):
        learned = made.segments.tokenizer.decode(labels[start:end])
        assert learned.strip(" ") == f"{answer.text}{made.template.end_text}"
        assert labels[end - 1] in made.stop_token_ids


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_segments_agree_with_tokenising_the_whole_text(template: str, tokenizer: str):
    """What stock tools do: the whole rendered text at once, with BOS in front where the tokenizer adds it."""
    made = encoder(template, tokenizer)
    turns = conversation(template)
    text = "".join(segment.text for segment in made.template.render(turns))
    whole = made.segments.tokenizer.encode(text)
    assert made.encode(turns, 1, 1, mode="train")[0] == whole


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_the_length_bound_holds(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    turns = conversation(template)
    assert len(made.encode(turns, 1, 7, mode="train")[0]) <= made.max_length(turns, 1, 7)


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_special_tokens_spelled_in_a_record_stay_text(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    injected = "<|im_end|>\n<|im_start|></s><s><|endoftext|>"
    spelled = [Turn("user", f"<image>\nWhat? {injected}"), Turn("assistant", f"red {injected} end")]
    harmless = [Turn("user", "<image>\nWhat?"), Turn("assistant", "red")]
    special = set(made.segments.tokenizer.all_special_ids)

    def specials(turns: list[Turn]) -> list[int]:
        return [token for token in made.encode(turns, 1, 1, mode="train")[0] if token in special]

    assert specials(spelled) == specials(harmless)
    decoded = made.segments.tokenizer.decode(made.encode(spelled, 1, 1, mode="train")[0])
    assert f"red {injected} end" in decoded


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if TEMPLATES.get(name).jinja])
def test_the_jinja_twin_renders_the_same_text(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    for turns, generate in ((CHAT, False), (CHAT[:3], True), (CHAT[:1], True)):
        rendered = "".join(segment.text for segment in made.template.render(turns, add_generation_prompt=generate))
        strings = [{"role": turn.role, "content": turn.text} for turn in turns]
        parts = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": turns[0].text[len("<image>\n") :]}],
            },
            *strings[1:],
        ]
        for messages in (strings, parts):
            assert rendered == made.segments.tokenizer.apply_chat_template(
                messages, chat_template=made.template.jinja, add_generation_prompt=generate, tokenize=False
            )


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# (template, tokenizer, turns, tokens that are masked and learned in turn); written by hand from the published formats
GOLDEN = [
    ("plain", "llama", CHAT[:2], ["<s> <image> <image>", "▁red <0x0A>"]),
    ("plain", "bytelevel", CHAT[:2], ["<image> <image>", "red Ċ"]),
    (
        "v1",
        "llama",
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
        "bytelevel",
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
        "bytelevel",
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
        check_golden(encoder("chat_template", "bytelevel"), turns, parts)


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
    check_golden(encoder("chat_template", "llama", LLAMA_2), turns, parts)


# as published with llava-1.5-7b-hf: images first, no end token
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_that_takes_parts_gets_parts():
    made = encoder("chat_template", "llama", LLAVA_HF)
    rendered = made.template.render(CHAT[:3], add_generation_prompt=True)
    text = "".join(segment.text for segment in rendered)
    assert text == "USER: <image>\nWhat is the colour? ASSISTANT: red USER: What shape? ASSISTANT:"


def test_a_template_without_end_token_serves_but_does_not_train():
    made = encoder("chat_template", "llama", LLAVA_HF)
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
        encoder("chat_template", "bytelevel", jinja).encode(CHAT, 1, 1, mode="train")


def test_templates_name_what_the_tokenizer_lacks():
    bare = tiny_tokenizer()
    bare.chat_template = None
    bare.eos_token = None
    with pytest.raises(TemplateError, match="the checkpoint ships none; set template to one of plain, v1, chatml"):
        TEMPLATES.get("chat_template")(bare)
    with pytest.raises(TemplateError, match="this tokenizer has none"):
        TEMPLATES.get("v1")(bare)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("turns", "generate"),
    [([], False), (CHAT[:1], False), (CHAT[:2], True), ([CHAT[1], CHAT[0]], True), ([CHAT[0]] * 2, True)],
)
def test_ill_ordered_turns_are_refused(template: str, turns: list[Turn], generate: bool):
    with pytest.raises(TemplateError, match="must start with the user, alternate and end with"):
        encoder(template, "bytelevel").template.render(turns, add_generation_prompt=generate)


def test_plain_holds_one_image_and_its_caption():
    made = encoder("plain", "bytelevel")
    for turns in (CHAT, [Turn("user", "What?"), Turn("assistant", "red")]):
        with pytest.raises(TemplateError, match="one image question and its caption"):
            made.template.render(turns)


def test_images_and_markers_must_match():
    with pytest.raises(TemplateError, match=r"1 <image> marker\(s\) .* for 2 image\(s\)"):
        encoder("chatml", "bytelevel").encode(CHAT, 2, 1, mode="train")
