"""Every registered template is held to the contract, on every kind of tokenizer.

The exact ids are in test_templates_golden.py, the formats as independent f-strings in test_templates_formats.py; the
template that a tokenizer ships has tests of its own in test_templates_shipped.py.
"""

import jinja2
import pytest

from llava_moe.data.conversation import IGNORE_INDEX, TemplateError
from llava_moe.data.schema import Turn
from llava_moe.data.templates import TEMPLATES
from tests.data.template_cases import (
    CHAT,
    LEARNED,
    NEEDS_BOS,
    NO_SYSTEM,
    NUM_TOKENS,
    PAIRS,
    QUESTION,
    QUIRKY,
    SYSTEM_TURN,
    conversations,
    count,
    encoder,
    prompt,
    rendered,
    target_spans,
    train,
)


def test_the_registry_holds_the_field():
    assert TEMPLATES.names() == [
        *("plain", "v1", "chatml", "llava_llama_2", "mistral_instruct", "mpt", "chatml_direct", "qwen_1_5"),
        *("llava_llama_3", "phi3", "gemma", "chat_template"),
    ]
    for name in TEMPLATES:
        assert TEMPLATES.get(name).name == name


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_the_training_prefix_is_the_generation_prompt(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    for turns in conversations(template).values():
        ids, labels = train(made, turns)
        spans = target_spans(labels)
        assert len(spans) == len(turns) // 2
        text = rendered(made, turns)
        assert made.answer_start(turns, NUM_TOKENS) == spans[0][0]
        for index, (start, _) in enumerate(spans):
            asked = turns[: 2 * index + 1]
            assert prompt(made, asked) == ids[:start]
            assert text.startswith(rendered(made, asked, generate=True))


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_only_answers_and_their_end_are_learned(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    shape = LEARNED.get(template, "{}") + str(made.template.end_text)
    for turns in conversations(template).values():
        targets = [segment.text for segment in made.template.render(turns) if segment.is_target]
        assert "".join(targets) == "".join(shape.format(turn.text) for turn in turns[1::2])
        ids, labels = train(made, turns)
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True))
        for (start, end), answer in zip(target_spans(labels), turns[1::2], strict=True):
            learned = made.segments.tokenizer.decode(labels[start:end])
            assert learned.lstrip(" ") == shape.format(answer.text).lstrip(" ")
            assert labels[end - 1] in made.stop_token_ids or made.stop_strings == ["\n"]


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_texts_come_back_and_images_have_their_places(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    for turns in conversations(template).values():
        ids, _ = train(made, turns)
        assert ids.count(made.segments.image_token_id) == NUM_TOKENS * count(turns)
        decoded = made.segments.tokenizer.decode(ids)
        shown = turns if template != "plain" else turns[1:]
        for piece in (piece.strip() for turn in shown for piece in turn.text.split("<image>")):
            assert piece in decoded
            decoded = decoded[decoded.index(piece) + len(piece) :]


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_segments_agree_with_tokenising_the_whole_text(template: str, tokenizer: str):
    """What stock tools do: the whole rendered text at once, with BOS in front unless the text has it already."""
    made = encoder(template, tokenizer)
    loaded = made.segments.tokenizer
    for turns in conversations(template).values():
        text = rendered(made, turns)
        writes_bos = bool(loaded.bos_token) and text.startswith(loaded.bos_token)
        assert train(made, turns, 1)[0] == loaded.encode(text, add_special_tokens=not writes_bos)


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_the_length_bound_holds(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    for turns in conversations(template).values():
        assert len(train(made, turns, 7)[0]) <= made.max_length(turns, count(turns), 7)


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_special_tokens_spelled_in_a_record_stay_text(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    injected = "".join(made.segments.tokenizer.all_special_tokens).replace("<image>", "") + " [/INST] "
    spelled = [Turn("user", f"<image>\nWhat? {injected}"), Turn("assistant", f"red {injected} end")]
    harmless = [Turn("user", "<image>\nWhat?"), Turn("assistant", "red")]
    systems: tuple[list[Turn], list[Turn]] = ([], [])
    if template not in NO_SYSTEM:
        systems = ([Turn("system", f"be {injected}")], [Turn("system", "be")])
    special = set(made.segments.tokenizer.all_special_ids)

    def specials(turns: list[Turn]) -> list[int]:
        return [token for token in train(made, turns)[0] if token in special]

    assert specials([*systems[0], *spelled]) == specials([*systems[1], *harmless])
    assert f"red {injected} end" in made.segments.tokenizer.decode(train(made, spelled)[0])


@pytest.mark.parametrize(("template", "tokenizer"), [pair for pair in PAIRS if pair[0] not in NO_SYSTEM])
def test_a_system_message_takes_the_place_of_the_templates_own(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    turns = [SYSTEM_TURN, *CHAT]
    ids, labels = train(made, turns)
    text = rendered(made, turns)
    assert text.count(SYSTEM_TURN.text) == 1
    assert text.index(SYSTEM_TURN.text) < text.index(CHAT[0].text)
    own = getattr(made.template, "default_system", None)
    assert own is None or own not in text
    assert "curious" not in text
    spans = target_spans(labels)
    assert len(spans) == 2
    for start, asked in ((spans[0][0], turns[:2]), (spans[1][0], turns[:4])):
        assert prompt(made, asked) == ids[:start]
    loaded = made.segments.tokenizer
    writes_bos = bool(loaded.bos_token) and text.startswith(loaded.bos_token)
    assert train(made, turns, 1)[0] == loaded.encode(text, add_special_tokens=not writes_bos)


@pytest.mark.parametrize("template", sorted(NO_SYSTEM))
def test_templates_without_a_place_for_it_refuse_a_system_message(template: str):
    made = encoder(template, "gemma")
    assert not made.template.takes_system
    for turns, generate in (([SYSTEM_TURN, *CHAT[:2]], False), ([SYSTEM_TURN, CHAT[0]], True)):
        with pytest.raises(TemplateError, match=f"template '{template}' has no place for a system message"):
            made.template.render(turns, add_generation_prompt=generate)


@pytest.mark.parametrize(("template", "tokenizer"), [pair for pair in PAIRS if TEMPLATES.get(pair[0]).jinja])
def test_the_jinja_twin_renders_the_same_text(template: str, tokenizer: str):
    made = encoder(template, tokenizer)

    def twin(messages: list[dict[str, object]], generate: bool) -> str:
        return made.segments.tokenizer.apply_chat_template(
            messages, chat_template=made.template.jinja, add_generation_prompt=generate, tokenize=False
        )

    head = [] if template in NO_SYSTEM else [SYSTEM_TURN]
    for turns in (CHAT, [*head, *CHAT]):
        for shown, generate in ((turns, False), (turns[:-1], True), (turns[:-3], True)):
            expected = rendered(made, shown, generate)
            strings: list[dict[str, object]] = [{"role": turn.role, "content": turn.text} for turn in shown]
            parts = [
                {**one, "content": [{"type": "image"}, {"type": "text", "text": one["content"][len("<image>\n") :]}]}
                if str(one["content"]).startswith("<image>")
                else one
                for one in strings
            ]
            assert expected == twin(strings, generate)
            assert expected == twin(parts, generate)
    with pytest.raises(jinja2.TemplateError):
        twin([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], False)
    if template in NO_SYSTEM:
        with pytest.raises(jinja2.TemplateError, match="no place for a system message"):
            twin([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama3", "llama", "phi3", "gemma"])
def test_answers_stop_where_the_template_says(template: str, tokenizer: str):
    if tokenizer == "gpt2" and template in NEEDS_BOS:
        with pytest.raises(TemplateError, match="bos_token, and this tokenizer has none"):
            encoder(template, tokenizer)
        return
    made = encoder(template, tokenizer)
    loaded = made.segments.tokenizer
    ends = {
        "plain": "\n", "chatml": "<|im_end|>", "mpt": "<|im_end|>", "chatml_direct": "<|im_end|>",
        "qwen_1_5": "<|im_end|>", "llava_llama_3": "<|eot_id|>", "phi3": "<|end|>", "gemma": "<end_of_turn>",
        "chat_template": "<|im_end|>",
    }  # fmt: skip
    end = ends.get(template, loaded.eos_token)
    assert made.template.end_text == end
    assert made.stop_strings == (["\n"] if template == "plain" else [])
    assert made.stop_token_ids[0] == loaded.eos_token_id
    if template != "plain":
        assert set(made.stop_token_ids) == {loaded.eos_token_id, loaded.convert_tokens_to_ids(end)}


@pytest.mark.parametrize("template", TEMPLATES)
def test_empty_answers_are_refused_for_training_only(template: str):
    made = encoder(template, "llama3")
    for text in ("", " \n"):
        with pytest.raises(TemplateError, match="turn 1 is an empty answer"):
            made.template.render([QUESTION, Turn("assistant", text)])
    if template != "plain":
        # a chat in which the model once said nothing can go on
        asked = [QUESTION, Turn("assistant", ""), CHAT[2]]
        assert "What shape?" in rendered(made, asked, generate=True)
        with pytest.raises(TemplateError, match="turn 3 is an empty answer"):
            made.template.render([*CHAT[:3], Turn("assistant", "")])


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in NO_SYSTEM])
def test_an_empty_system_message_is_refused(template: str):
    with pytest.raises(TemplateError, match="the system message is empty"):
        encoder(template, "llama3").template.render([Turn("system", " "), *CHAT])


@pytest.mark.parametrize("template", QUIRKY)
def test_options_are_checked(template: str):
    with pytest.raises(TemplateError, match="has no option 'llava_next_label'; did you mean 'llava_next_labels'"):
        encoder(template, "llama3", llava_next_label=True)
    with pytest.raises(TemplateError, match="option llava_next_labels=1 must be bool"):
        encoder(template, "llama3", llava_next_labels=1)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in QUIRKY])
def test_templates_without_options_refuse_them(template: str):
    with pytest.raises(TemplateError, match=f"template '{template}' has no option 'llava_next_labels'; known: none"):
        encoder(template, "llama3", llava_next_labels=True)


TOOL = Turn("tool", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("turns", "generate"),
    [
        *[([], False), (CHAT[:1], False), (CHAT[:2], True), ([CHAT[1], CHAT[0]], True), ([CHAT[0]] * 2, True)],
        *[([TOOL, CHAT[1]], False), ([CHAT[0], TOOL], False), ([*CHAT[:2], TOOL, CHAT[3]], False)],
        *[([SYSTEM_TURN], False), ([SYSTEM_TURN] * 2, True), ([*CHAT[:2], SYSTEM_TURN, *CHAT[2:]], False)],
        *[([SYSTEM_TURN, SYSTEM_TURN, *CHAT], False), ([SYSTEM_TURN, CHAT[1]], False)],
    ],
)
def test_ill_ordered_turns_are_refused(template: str, turns: list[Turn], generate: bool):
    with pytest.raises(TemplateError, match="must start with the user, alternate and end with"):
        encoder(template, "llama3").template.render(turns, add_generation_prompt=generate)


def test_plain_holds_one_image_and_its_caption():
    made = encoder("plain", "tiny")
    for turns in (CHAT, [Turn("user", "What?"), Turn("assistant", "red")]):
        with pytest.raises(TemplateError, match="one image question and its caption"):
            made.template.render(turns)


def test_images_and_markers_must_match():
    with pytest.raises(TemplateError, match=r"1 <image> marker\(s\) .* for 2 image\(s\)"):
        encoder("chatml", "tiny").encode(CHAT, 2, 1, mode="train")
