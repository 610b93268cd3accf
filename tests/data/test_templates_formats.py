"""The formats and labels of the field, stated a second time and independently of the templates.

The formats are f-strings after LLaVA's, LLaVA-NeXT's and LLaVA++'s `conversation.py`. The labels are found as these
projects find them: by tokenising longer and longer pieces of the text (`preprocess_v1` and its siblings) or message by
message (`preprocess_qwen`, `preprocess_llama3`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llava_moe.data.conversation import IGNORE_INDEX, TemplateError, TextEncoder
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.schema import DataError, Turn
from llava_moe.data.templates import TEMPLATES
from tests.data.template_cases import CHATS, TOKENIZERS, conversations, encoder, prompt, rendered, tokens, train
from tests.tiny import tiny_chat_tokenizer, tiny_siglip_processor, write_llava_json

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."

Piece = tuple[str, bool]
"""Text, and whether it is learned."""


def v1(rounds: Sequence[tuple[str, str]], bos: str, eos: str) -> list[Piece]:
    pieces = [(f"{VICUNA} ", False)]
    for question, answer in rounds:
        pieces += [(f"USER: {question} ASSISTANT:", False), (f" {answer}{eos}", True)]
    return pieces


def llava_llama_2(rounds: Sequence[tuple[str, str]], bos: str, eos: str) -> list[Piece]:
    (first, first_answer), *others = rounds
    pieces = [(f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n{first} [/INST]", False), (f" {first_answer} {eos}", True)]
    for question, answer in others:
        pieces += [(f"{bos}[INST] {question} [/INST]", False), (f" {answer} {eos}", True)]
    return pieces


def mistral_instruct(rounds: Sequence[tuple[str, str]], bos: str, eos: str) -> list[Piece]:
    return [
        piece
        for question, answer in rounds
        for piece in ((f"[INST] {question} [/INST]", False), (f" {answer} {eos}", True))
    ]


def chatml_groups(system: str | None, newline: str) -> Callable[..., list[Piece]]:
    def pieces(rounds: Sequence[tuple[str, str]], bos: str, eos: str) -> list[Piece]:
        made = [] if system is None else [(f"<|im_start|>system\n{system}<|im_end|>{newline}", False)]
        for question, answer in rounds:
            asked = f"<|im_start|>user\n{question}<|im_end|>{newline}<|im_start|>assistant\n"
            made += [(asked, False), (f"{answer}<|im_end|>", True), (newline, False)]
        return made

    return pieces


def llava_llama_3(rounds: Sequence[tuple[str, str]], bos: str, eos: str) -> list[Piece]:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    pieces = [(f"{bos}{header('system')}{LLAVA}<|eot_id|>", False)]
    for question, answer in rounds:
        asked = f"{header('user')}{question.strip()}<|eot_id|>{header('assistant')}"
        pieces += [(asked, False), (f"{answer.strip()}<|eot_id|>", True)]
    return pieces


def phi3(rounds: Sequence[tuple[str, str]], bos: str, eos: str) -> list[Piece]:
    pieces = [("<|system|>\nYou are a helpful AI assistant.<|end|>", False)]
    for question, answer in rounds:
        pieces += [(f"\n<|user|>\n{question}<|end|>\n<|assistant|>\n", False), (f"{answer}<|end|>", True)]
    return pieces


def gemma(rounds: Sequence[tuple[str, str]], bos: str, eos: str) -> list[Piece]:
    pieces: list[Piece] = []
    for question, answer in rounds:
        asked = f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        pieces += [(asked, False), (f"{answer}<end_of_turn>", True), ("\n", False)]
    return pieces


FORMATS: dict[str, Callable[..., list[Piece]]] = {
    "plain": lambda rounds, bos, eos: [("<image>" * rounds[0][0].count("<image>"), False), (f"{rounds[0][1]}\n", True)],
    "v1": v1,
    "chatml": chatml_groups(None, "\n"),
    "llava_llama_2": llava_llama_2,
    "mistral_instruct": mistral_instruct,
    "mpt": chatml_groups(MPT, ""),
    "chatml_direct": chatml_groups("Answer the questions.", ""),
    "qwen_1_5": chatml_groups("You are a helpful assistant.", "\n"),
    "llava_llama_3": llava_llama_3,
    "phi3": phi3,
    "gemma": gemma,
}
# each format on the tokenizers of its own models
PAIRS = [
    *[(name, "llama") for name in ("plain", "v1", "llava_llama_2", "mistral_instruct", "phi3", "gemma")],
    *[(name, "gpt2") for name in ("plain", "v1", "chatml", "mpt", "chatml_direct", "qwen_1_5", "phi3")],
    *[(name, "llama3") for name in ("plain", "llava_llama_2", "llava_llama_3", "qwen_1_5")],
    *[("phi3", "phi3"), ("gemma", "gemma"), ("v1", "llama_first")],
]


def pieces_of(template: str, tokenizer: str, turns: Sequence[Turn]) -> list[Piece]:
    loaded = TOKENIZERS[tokenizer]
    rounds = [(asked.text, answer.text) for asked, answer in zip(turns[::2], turns[1::2], strict=True)]
    return FORMATS[template](rounds, loaded.bos_token or "", loaded.eos_token)


def test_every_template_of_the_field_is_stated_here():
    assert {*FORMATS, "chat_template"} == set(TEMPLATES)
    assert {template for template, _ in PAIRS} == set(FORMATS)


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_the_text_is_the_formats(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    for turns in conversations(template).values():
        pieces = pieces_of(template, tokenizer, turns)
        assert rendered(made, turns) == "".join(text for text, _ in pieces)
        learned = "".join(segment.text for segment in made.template.render(turns) if segment.is_target)
        assert learned == "".join(text for text, is_learned in pieces if is_learned)


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_labels_agree_with_counting_tokens_of_longer_and_longer_texts(template: str, tokenizer: str):
    made = encoder(template, tokenizer)
    loaded = made.segments.tokenizer
    for turns in conversations(template).values():
        ids, labels = train(made, turns, 1)
        expected: list[int] = []
        text = ""
        for piece, is_learned in pieces_of(template, tokenizer, turns):
            text += piece
            writes_bos = bool(loaded.bos_token) and text.startswith(loaded.bos_token)
            count = len(loaded.encode(text, add_special_tokens=not writes_bos)) - len(expected)
            expected += [1 if is_learned else 0] * count
        assert [0 if label == IGNORE_INDEX else 1 for label in labels] == expected
        assert len(ids) == len(expected)


def message_by_message(tokenizer: str, messages: Sequence[tuple[str, str]], anywhere: set[int]) -> list[int]:
    """LLaVA-NeXT: each message apart; those of the assistant are learned whole, and some ids wherever they stand."""
    labels: list[int] = []
    for text, role in messages:
        ids = TOKENIZERS[tokenizer].encode(text, add_special_tokens=False)
        labels += [token if role == "assistant" or token in anywhere else IGNORE_INDEX for token in ids]
    return labels


@pytest.mark.parametrize("chat", CHATS)
def test_llava_next_labels_of_qwen(chat: str):
    made = encoder("qwen_1_5", "gpt2", llava_next_labels=True)
    loaded = made.segments.tokenizer
    turns = [Turn("system", "You are a helpful assistant."), *CHATS[chat]]
    messages = [(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>\n", turn.role) for turn in turns]
    anywhere = {loaded.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "Ċ")}
    assert train(made, CHATS[chat], 1)[1] == message_by_message("gpt2", messages, anywhere)


@pytest.mark.parametrize("chat", CHATS)
def test_llava_next_labels_of_llama_3(chat: str):
    made = encoder("llava_llama_3", "llama3", llava_next_labels=True)
    loaded = made.segments.tokenizer
    turns = [Turn("system", LLAVA), *CHATS[chat]]
    messages = [
        (f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n{turn.text}<|eot_id|>", turn.role) for turn in turns
    ]
    listed = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n")
    looked_up = [loaded.convert_tokens_to_ids(token) for token in listed]
    # the vocabulary calls it "ĊĊ", so LLaVA-NeXT's look-up finds nothing and blank lines of questions stay masked
    assert looked_up[-1] is None
    assert loaded.encode("\n\n", add_special_tokens=False) == [loaded.convert_tokens_to_ids("ĊĊ")]
    expected = message_by_message("llama3", messages, set(looked_up) - {None})
    assert train(made, CHATS[chat], 1)[1] == [loaded.bos_token_id, *expected]


@pytest.mark.parametrize("chat", CHATS)
def test_llava_next_labels_of_gemma(chat: str):
    quirky, ours = encoder("gemma", "gemma", llava_next_labels=True), encoder("gemma", "gemma")
    newline, end = (ours.segments.tokenizer.convert_tokens_to_ids(token) for token in ("\n", "<end_of_turn>"))
    ids, labels = train(ours, CHATS[chat])
    expected = [
        token if index and token == newline and labels[index - 1] == end else labels[index]
        for index, token in enumerate(ids)
    ]
    assert expected != labels
    assert train(quirky, CHATS[chat]) == (ids, expected)


@pytest.mark.parametrize(
    ("template", "tokenizer"), [("qwen_1_5", "gpt2"), ("llava_llama_3", "llama3"), ("gemma", "gemma")]
)
def test_llava_next_labels_change_nothing_but_labels(template: str, tokenizer: str):
    quirky, ours = encoder(template, tokenizer, llava_next_labels=True), encoder(template, tokenizer)
    for turns in CHATS.values():
        ids, labels = train(quirky, turns)
        assert ids == train(ours, turns)[0]
        assert prompt(quirky, turns[:1]) == prompt(ours, turns[:1]) == ids[: len(prompt(ours, turns[:1]))]
        more = {index for index, label in enumerate(labels) if label != IGNORE_INDEX}
        assert more > {index for index, label in enumerate(train(ours, turns)[1]) if label != IGNORE_INDEX}
        assert quirky.answer_start(turns, 2) == ours.answer_start(turns, 2)
    assert (quirky.stop_token_ids, quirky.stop_strings) == (ours.stop_token_ids, ours.stop_strings)


def test_what_is_learned_anywhere_must_be_one_token():
    made = encoder("qwen_1_5", "gpt2", llava_next_labels=True)
    made.template.learned_anywhere = ("<|im_start|>", "a b")
    with pytest.raises(TemplateError, match="learns 'a b' wherever it stands, but it is not one token"):
        TextEncoder(made.template, made.segments)


def test_markers_that_swallow_white_space_do_so_across_segments():
    made = encoder("phi3", "phi3")
    turns = [Turn("user", " \n What?"), Turn("assistant", "\n red ")]
    ids, labels = train(made, turns)
    assert ids == made.segments.tokenizer.encode(rendered(made, turns))
    assert tokens(made, [label for label in labels if label != IGNORE_INDEX]) == ["▁red", "▁", "<|end|>"]
    assert prompt(made, turns[:1]) == ids[: labels.index(next(x for x in labels if x != IGNORE_INDEX))]


def test_llama_3_strips_messages_as_its_chat_template_does():
    made = encoder("llava_llama_3", "llama3")
    spaced = [Turn("system", " Answer. \n"), Turn("user", "\n\n What? "), Turn("assistant", " red\n")]
    bare = [Turn("system", "Answer."), Turn("user", "What?"), Turn("assistant", "red")]
    assert train(made, spaced) == train(made, bare)


def long_records(tmp_path: Path) -> tuple[Path, Path]:
    """Four records: short, with a long answer, with a long question, and with a system message."""
    path, images = write_llava_json(tmp_path, 4)
    records = json.loads(path.read_text())
    marker = "<image>\n"
    words = "the shape is a square " * 20
    records[1]["conversations"] = [{"from": "human", "value": f"{marker}What?"}, {"from": "gpt", "value": words}]
    records[2]["conversations"] = [{"from": "human", "value": f"{marker}{words}"}, {"from": "gpt", "value": "red"}]
    records[3]["conversations"].insert(0, {"from": "system", "value": "Answer in one word."})
    path.write_text(json.dumps(records))
    return path, images


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize(("template", "tokenizer"), [("qwen_1_5", "gpt2"), ("llava_llama_3", "llama3")])
def test_truncation_leaves_out_samples_without_their_answer(tmp_path: Path, template: str, tokenizer: str, quirk: bool):
    """Also where markers of questions are learned: what is left of such a sample holds labels, but no answer."""
    processor = tiny_siglip_processor(
        template=template,
        tokenizer=tiny_chat_tokenizer(tokenizer),
        template_options={"llava_next_labels": True} if quirk else None,
    )
    source = long_records(tmp_path)
    data = ConversationDataset([source], processor, max_length=80, overlong="truncate")
    assert data.report() == {"records": 4, "used": 3, "skipped_overlong": 1, "truncated": 1}
    assert [sample.id for sample in data.samples] == ["sample-0", "sample-1", "sample-3"]
    for index in range(3):
        start = processor.answer_start(data.samples[index].turns)
        assert (data[index]["labels"][start:] != IGNORE_INDEX).any()
    assert data.samples[2].turns[0] == Turn("system", "Answer in one word.")
    decoded = processor.tokenizer.decode(data[2]["input_ids"])
    assert "Answer in one word." in decoded
    assert "You are" not in decoded


def test_a_record_with_a_system_message_is_refused_where_it_has_no_place(tmp_path: Path):
    processor = tiny_siglip_processor(template="gemma", tokenizer=tiny_chat_tokenizer("gemma"))
    with pytest.raises(DataError, match=r"1 problem.*\n.*'sample-3': template 'gemma' has no place for a system"):
        ConversationDataset([long_records(tmp_path)], processor, max_length=512)
