"""Answers: stock generate on our class, alone and in batches, with and without the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.data.schema import Turn
from llava_moe.model.assemble import load_model
from tests.model.inputs import NUM_WORDS, greedy, prompt_batch
from tests.tiny import tiny_image
from tests.tiny_model import TINY_MOE, tiny_model

QUESTIONS = (
    "<image>\nWhat is the shape?",
    "describe",
    "<image>\n<image>\nWhat colour is it and what is the colour?",
    "What is the image?",
    "<image>\ndescribe the image and the shape and the colour",
    "is it red",
    "<image>\nred",
    "<image>\nis it green and what is a circle?",
)


def prompts(processor: LlavaMoeProcessor) -> list[dict[str, torch.Tensor]]:
    found, used = [], 0
    for question in QUESTIONS:
        images = [tiny_image(used + i) for i in range(question.count("<image>"))]
        used += len(images)
        found.append(processor.encode_prompt([Turn("user", question)], images))
    return found


@pytest.mark.parametrize("kind", ["dense", "moe", "timm"])
def test_answers_do_not_depend_on_the_batch(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(f"{kind}_checkpoint")
    model, processor = load_model(path), load_processor(path)
    encoded = prompts(processor)
    assert len({len(prompt["input_ids"]) for prompt in encoded}) > 4, "rows need different lengths"
    together = greedy(model, num_tokens=6, **processor.pad_prompts(encoded))
    alone = [greedy(model, num_tokens=6, **processor.pad_prompts([prompt]))[0] for prompt in encoded]
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 3, "answers that are all alike would prove nothing"


@pytest.mark.parametrize("moe", [None, TINY_MOE], ids=["dense", "sparse"])
def test_cache_changes_no_answer(moe: dict[str, object] | None) -> None:
    model = tiny_model(moe)
    inputs = prompt_batch(model, batch=3)
    cached = greedy(model, **inputs, use_cache=True)
    assert greedy(model, **inputs, use_cache=False) == cached
    # and both are what one gets by hand, a whole forward for each token
    ids = inputs["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert ids[:, inputs["input_ids"].shape[1] :].tolist() == cached


def test_cached_logits_equal_uncached_ones_at_every_step() -> None:
    model = tiny_model(TINY_MOE)
    ids = torch.randint(0, NUM_WORDS, (2, 9))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        past, steps = None, []
        for position in range(9):
            mask = torch.ones(2, position + 1, dtype=torch.int64)
            step = model(
                input_ids=ids[:, position : position + 1], attention_mask=mask, past_key_values=past, use_cache=True
            )
            past = step.past_key_values
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_other_ways_to_generate_work() -> None:
    model = tiny_model(TINY_MOE)
    inputs = prompt_batch(model, batch=2)
    expected = greedy(model, num_tokens=4, **inputs)
    static = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation="static",
        disable_compile=True,
    )  # fmt: skip
    assert static[:, 12:].tolist() == expected
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape[0] == 2
    sampled = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (4, 16)


def test_generation_stops_at_the_end_token(moe_checkpoint: Path) -> None:
    model, processor = load_model(moe_checkpoint), load_processor(moe_checkpoint)
    assert model.generation_config.eos_token_id == processor.stop_token_ids
    inputs = processor.pad_prompts(prompts(processor)[:1])
    length = inputs["input_ids"].shape[1]
    end = processor.stop_token_ids[0]
    with torch.no_grad():
        state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = state  # the end token wins the first step
    stopped = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert stopped[0, length:].tolist() == [end]
    with torch.no_grad():
        model.lm_head.weight[end] = -state
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, length:].tolist()[0] != end
