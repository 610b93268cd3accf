"""The engine says what `generate` says, keeps a conversation together, and fails in words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llava_moe.data.schema import DataError, Turn
from llava_moe.serve.engine import ChatError, Engine, open_picture, user_turn
from tests.tiny import tiny_image
from tests.tiny_model import tiny_model, tiny_processor


def _generated(engine: Engine, turns: list[Turn], images: list, max_new_tokens: int) -> str:
    processor = engine.processor
    inputs = processor.pad_prompts([processor.encode_prompt(turns, images)])
    ids = engine.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


QUESTION = "What colour is the shape?"
CHATS = {
    "picture": ([user_turn(QUESTION, 1)], 1),
    "text": ([user_turn(QUESTION)], 0),
    "two turns, picture in the first": ([user_turn(QUESTION, 1), Turn("assistant", "red"), user_turn("And now?")], 1),
    "two turns, picture in the second": ([user_turn("Hi"), Turn("assistant", "Hi"), user_turn(QUESTION, 1)], 1),
    "two pictures in one turn": ([user_turn(QUESTION, 2)], 2),
}


@pytest.mark.parametrize("name", CHATS)
def test_stream_grows_to_what_generate_says(engine: Engine, name: str) -> None:
    turns, num_images = CHATS[name]
    images = [tiny_image(index) for index in range(num_images)]
    steps = list(engine.stream(turns, images, max_new_tokens=12))
    assert steps[-1] == _generated(engine, turns, images, 12) != ""
    assert all(later.startswith(earlier) and later != earlier for earlier, later in pairwise(steps))


def test_pictures_and_earlier_turns_matter(engine: Engine) -> None:
    turns, _ = CHATS["two turns, picture in the first"]
    asked = [(turns, 0), (turns, 5), (turns[:1], 0)]
    answers = {list(engine.stream(chat, [tiny_image(index)], 12))[-1] for chat, index in asked}
    assert len(answers) == 3


def test_sampling_draws_and_top_p_narrows_it(engine: Engine) -> None:
    turns = [user_turn(QUESTION)]
    greedy = list(engine.stream(turns, (), 8))[-1]
    assert list(engine.stream(turns, (), 8, temperature=1.0, top_p=1e-6))[-1] == greedy
    assert any(list(engine.stream(turns, (), 8, temperature=5.0))[-1:] != [greedy] for _ in range(3))


def test_saved_sampling_settings_do_not_leak_into_greedy_answers() -> None:
    model, processor = tiny_model(), tiny_processor()
    model.generation_config.update(do_sample=True, temperature=5.0, max_new_tokens=1, repetition_penalty=None)
    engine = Engine(model, processor, "tiny")
    answers = {list(engine.stream([user_turn(QUESTION)], (), 8))[-1] for _ in range(3)}
    assert len(answers) == 1


def test_an_answer_that_ends_at_once_yields_nothing() -> None:
    model, processor = tiny_model(), tiny_processor()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal: the first id wins
    model.lm_head.register_forward_hook(
        lambda *given: torch.nn.functional.one_hot(
            torch.full(given[2].shape[:-1], processor.stop_token_ids[0]), given[2].shape[-1]
        ).float()
    )
    assert list(Engine(model, processor, "tiny").stream([user_turn("Hi")], ())) == []


def test_failure_in_the_worker_reaches_the_caller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of paper")

    monkeypatch.setattr(engine.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of paper"):
        list(engine.stream([user_turn("Hi")], ()))
    monkeypatch.undo()
    assert list(engine.stream([user_turn("Hi")], (), 4)), "the lock was not released"


def test_closing_the_stream_stops_the_model(engine: Engine) -> None:
    steps = []
    hook = engine.model.lm_head.register_forward_hook(lambda *given: steps.append(1))
    stream: Iterator[str] = engine.stream([user_turn(QUESTION)], (), 200)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    hook.remove()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert len(steps) < 200


@pytest.mark.parametrize(
    ("turns", "num_images", "options", "says"),
    [
        ([user_turn("a" * 400)], 0, {}, "too long"),
        ([user_turn("Hi")], 0, {"max_new_tokens": 1000}, "reads 256 at most"),
        ([user_turn("Hi")], 0, {"max_new_tokens": 0}, "max_new_tokens"),
        ([user_turn("Hi")], 0, {"temperature": -1.0}, "temperature"),
        ([user_turn("Hi")], 0, {"top_p": 0.0}, "top_p"),
        ([user_turn("Hi")], 1, {}, "1 image"),
        ([user_turn("Hi", 1)], 0, {}, "0 image"),
        ([user_turn("Hi"), Turn("assistant", "Hi")], 0, {}, "end with the user"),
        ([], 0, {}, "start with the user"),
    ],
)
def test_wrong_chats_are_refused_in_words(
    engine: Engine, turns: list[Turn], num_images: int, options: dict, says: str
) -> None:
    with pytest.raises((ChatError, DataError), match=says):
        next(engine.stream(turns, [tiny_image(0)] * num_images, **options))


def test_a_caption_checkpoint_says_that_it_only_captions() -> None:
    engine = Engine(tiny_model(), tiny_processor(template="plain"), "tiny")
    assert list(engine.stream([user_turn(QUESTION, 1)], [tiny_image(0)], 4))
    for turns, num_images in (CHATS["text"], CHATS["two turns, picture in the first"]):
        with pytest.raises(ChatError, match="captions pictures"):
            next(engine.stream(turns, [tiny_image(0)] * num_images))


@pytest.mark.parametrize(("text", "says"), [("  ", "no question"), ("what is <image>?", "attach a picture")])
def test_wrong_questions(text: str, says: str) -> None:
    with pytest.raises(ChatError, match=says):
        user_turn(text)


def test_wrong_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ChatError, match=r"notes\.png cannot be read"):
        open_picture(tmp_path / "notes.png")
    for missing in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(ChatError, match="no such file"):
            open_picture(missing)


@pytest.mark.parametrize(("keyword", "value"), [("device", "abacus"), ("dtype", "float3")])
def test_wrong_device_or_dtype(moe_checkpoint: Path, keyword: str, value: str) -> None:
    with pytest.raises(ChatError, match=value):
        Engine.load(moe_checkpoint, **{"device": "cpu", keyword: value})


def test_half_precision_answers_about_pictures(moe_checkpoint: Path) -> None:
    engine = Engine.load(moe_checkpoint, device="cpu", dtype="bfloat16")
    assert engine.facts.dtype == "bfloat16"
    assert list(engine.stream([user_turn(QUESTION, 1)], [tiny_image(0)], 4))


def test_facts_of_dense_and_sparse(engine: Engine, tmp_path: Path) -> None:
    facts = engine.facts
    assert (facts.moe_layers, facts.num_layers, facts.num_experts, facts.experts_per_token) == (2, 4, 4, 2)
    # two layers, two idle experts each, three matrices of 32 x 48
    assert facts.num_parameters - facts.num_active == 2 * 2 * 3 * 32 * 48
    assert "4 experts in 2 of 4 layers, 2 experts per token" in facts.lines()
    assert facts.notes() == []
    dense = tiny_model()
    dense.config.text_config.source_blocks = [0, 1, 2, 3]
    facts = Engine(dense, tiny_processor(template="plain"), "tiny").facts
    assert facts.num_parameters == facts.num_active
    assert "dense, 4 layers" in facts.lines()
    assert len(facts.notes()) == 2
    assert "not a general chat model" in facts.notes()[0]


def test_name_leaves_out_the_folder_called_model(tmp_path: Path) -> None:
    from llava_moe.serve.engine import _name

    assert _name(tmp_path / "runs" / "sft" / "model") == "runs/sft"
    assert _name(tmp_path / "runs" / "mine") == "runs/mine"
