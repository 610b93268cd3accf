"""The adapter with trained tiny checkpoints: the same answers at any batch size, in any order, after a kill."""

from __future__ import annotations

from typing import Any

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)

import torch  # isort: skip

from llava_moe.evaluation.answering import StringStops
from llava_moe.evaluation.lmms import LlavaMoe
from llava_moe.evaluation.requests import Question
from tests.evaluation.trained import (
    KINDS,
    adapter,
    answers,
    checkpoint,
    lessons,
    losses,
    option_requests,
    requests,
    with_options,
)
from tests.tiny import tiny_tokenizer
from tests.tiny_families import write_family_checkpoint
from tests.tiny_model import tiny_moe

FAMILIES = [
    *(("llava", kind) for kind in KINDS),
    ("llava_next", "moe"),
    pytest.param("llava_onevision", "moe", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_answers_and_losses_are_those_of_batch_one(family: str, kind: str) -> None:
    """Mixed tasks and settings, pictures of different sizes, none and several, text-only rows in the same batch."""
    path = checkpoint(family, kind)
    alone, together = adapter(path), adapter(path, batch_size=8)
    found = answers(alone)
    assert len({text for text, *_ in found}) >= 5, found
    assert answers(together) == found
    values, greedy = losses(alone)
    values_8, greedy_8 = losses(together)
    assert values == pytest.approx(values_8, abs=1e-4)
    assert greedy == greedy_8
    assert together.counters()["batches"] < alone.counters()["batches"] == 18 + 72
    scores, scores_8 = first_scores(alone), first_scores(together)
    for name, row in scores.items():
        assert torch.allclose(row, scores_8[name], atol=1e-4), name


def first_scores(lm: LlavaMoe) -> dict[tuple[str, int], torch.Tensor]:
    """Of each question the logits of its first token: small faults show here before they change an answer."""
    passed: list[torch.Tensor] = []
    found: dict[tuple[str, int], torch.Tensor] = {}

    def take(asked: list[Any], said: list[Any]) -> None:
        found.update({(r.args[4], r.args[3]): row for r, row in zip(asked, passed[0], strict=True)})
        passed.clear()

    handle = lm.model.register_forward_hook(lambda module, args, output: passed.append(output.logits[:, -1]))
    lm.on_answers = take
    answers(lm)
    handle.remove()
    assert len(found) == 18
    return found


def test_a_bound_on_tokens_makes_other_batches_and_the_same_answers() -> None:
    path = checkpoint("llava", "moe")
    lm = adapter(path, batch_size=8, batch_tokens=120)
    assert answers(lm) == answers(adapter(path, batch_size=8))
    assert lm.counters()["batches"] > 18 / 8 + 1


def test_a_capacity_drops_in_training_and_not_here() -> None:
    """Otherwise the invariance of the kind "capacity" would say nothing."""
    model = adapter(checkpoint("llava", "capacity")).model
    layers = [module for module in model.modules() if getattr(module, "capacity", None) is not None]
    assert [float(layer.capacity.factor) for layer in layers] == [0.75, 0.75]
    inputs = {"input_ids": torch.arange(40).view(2, 20) + 5, "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    dropped = []
    with torch.no_grad():
        for is_training in (True, False):
            routings = model.train(is_training)(**inputs).routings
            dropped.append(sum(int((r.index_TK == r.num_experts).sum()) for r in routings.values()))
    assert dropped[0] > 0 == dropped[1]


def test_answers_are_those_of_the_pixels() -> None:
    """Encoded ahead or inside generate(): the same answers, padded or not."""
    lm = adapter(checkpoint("llava", "moe"), batch_size=4)
    given = [request for request in requests() if request.args[1]["max_new_tokens"] == 6]
    found = [text for text, *_ in answers(lm, given)]
    for request, text in zip(given, found, strict=True):
        context, _, doc_to_visual, doc_id, task, split = request.args
        question = Question(context, doc_to_visual, doc_id, task, split, gen_kwargs={})
        shown = lm.reader.pictures(question)
        prompt = lm.processor.encode_prompt(lm.reader.turns(question, len(shown)), shown)
        inputs = lm.processor.pad_prompts([prompt])
        ids = lm.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=lm.processor.stop_token_ids)
        said = lm.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == text


def test_losses_are_those_of_the_forward_with_labels() -> None:
    lm = adapter(checkpoint("llava", "moe"), batch_size=8)
    given = option_requests()[:24]
    found = [one.text[0] for one in lm.loglikelihood(given)]
    for request, loss in zip(given, found, strict=True):
        context, option, doc_to_visual, doc_id, task, split = request.args
        question = Question(context, doc_to_visual, doc_id, task, split, continuation=option)
        shown = lm.reader.pictures(question)
        sample = lm.processor.encode_sample(lm.reader.turns(question, len(shown)), shown)
        inputs = {key: value[None] for key, value in sample.items() if key in ("input_ids", "labels")}
        with torch.no_grad():
            assert float(lm.model(**inputs, pixel_values=sample.get("pixel_values")).loss) == pytest.approx(
                loss, abs=1e-5
            )


def test_training_has_taught_something() -> None:
    """Otherwise equal answers would say little: the colours of pictures of all sizes are mostly right."""
    lm = adapter(checkpoint("llava", "moe"), batch_size=8)
    taught = [lesson for lesson in lessons() if lesson[0] == "What colour is the shape?"]
    lm.task_dict = {"taught": {"test": [{"pictures": shown} for _, _, shown in taught]}}
    given = requests({"max_new_tokens": 4})[: len(taught)]
    for index, request in enumerate(given):
        request.args = (taught[0][0], request.args[1], request.args[2], index, "taught", "test")
    right = [text == taught[index][1] for index, (text, *_) in enumerate(answers(lm, given))]
    assert sum(right) >= 0.6 * len(right), right


def test_beams_are_those_of_batch_one() -> None:
    """The features of several pictures are repeated for the beams of their own row."""
    given = requests({"max_new_tokens": 5, "num_beams": 2})
    path = checkpoint("llava", "moe")
    assert answers(adapter(path, batch_size=6), given) == answers(adapter(path), given)


def test_batches_hold_one_kind_of_settings_and_the_largest_comes_first() -> None:
    lm = adapter(checkpoint("llava", "dense"), batch_size=4)
    sizes: list[tuple[int, int, int]] = []
    generate = lm.model.generate

    def watched(**inputs: Any) -> Any:
        sizes.append((*inputs["input_ids"].shape, inputs["max_new_tokens"]))
        return generate(**inputs)

    lm.model.generate = watched
    answers(lm)
    assert sum(rows for rows, *_ in sizes) == 18
    assert {limit for *_, limit in sizes} == {3, 6}
    peaks = [length + limit for _, length, limit in sizes]
    assert peaks[0] == max(peaks)


def test_routers_that_mix_questions_answer_one_by_one(tmp_path: Any) -> None:
    router = {"name": "expert_choice", "args": {"group": "batch"}}
    path = write_family_checkpoint(tmp_path / "model", "llava", tiny_moe(router=router, allow_noncausal=True))
    with pytest.warns(UserWarning, match="change each other's answers; batch_size is 1"):
        lm = LlavaMoe(pretrained=str(path), batch_size=8, device="cpu")
    assert lm.batch_size == 1


def test_stop_strings_look_at_the_answer_and_know_where_it_ended() -> None:
    tokenizer = tiny_tokenizer()
    rows = ["a red", "a blue", "it is"]
    answers_ = [[" and", " a", " blue"], [" is", " red", " and"], [" is", " a", " shape"]]
    stops = StringStops(tokenizer, ["d and"], start=6)
    prompts = [tokenizer.encode(row, add_special_tokens=False) for row in rows]
    ids = torch.tensor([[tokenizer.pad_token_id] * (6 - len(prompt)) + prompt for prompt in prompts])
    over = []
    assert stops.ended() is None
    for step in range(3):
        new = [tokenizer.encode(said[step], add_special_tokens=False) for said in answers_]
        assert [len(one) for one in new] == [1, 1, 1]
        ids = torch.cat([ids, torch.tensor(new)], dim=1)
        over.append(stops(ids, None).tolist())
    assert over == [[False, False, False], [False, False, False], [False, True, False]]  # "red" is of the first prompt
    assert stops.length_B.tolist() == [0, 9, 0]
    assert stops.ended().tolist() == [False, True, False]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_stop_strings_of_a_template_end_the_answer(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    path = checkpoint("llava", "moe")
    given = requests({"max_new_tokens": 6})
    plain = answers(adapter(path), given)
    said = next(text for text, *_ in plain if " and" in text[1:])
    string = said[said.index(" and") - 1 :][:5]  # begins inside of a token
    lm = adapter(path, batch_size=batch_size)
    monkeypatch.setattr(type(lm.processor), "stop_strings", property(lambda self: [string]))
    found = answers(lm, given)
    assert [text for text, *_ in found] == [text.split(string)[0].strip() for text, *_ in plain]
    for (before, _, length), (_, _, shorter) in zip(plain, found, strict=True):
        assert (shorter < length) if string in before and not before.endswith(string) else shorter == length


def test_a_run_goes_on_from_the_answers_that_were_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    path, given = checkpoint("llava", "dense"), requests()
    whole = answers(adapter(path, batch_size=4), given)
    lm = adapter(path, batch_size=4)
    kept: dict[int, Any] = {}
    lm.on_answers = lambda asked, said: kept.update({id(r): a.text for r, a in zip(asked, said, strict=True)})
    generate = lm.model.generate
    calls: list[int] = []

    def dying(**inputs: Any) -> Any:
        if len(calls) == 2:
            raise RuntimeError("killed")
        calls.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(lm.model, "generate", dying)
    with pytest.raises(RuntimeError, match="killed"):
        answers(lm, given)
    assert len(kept) == sum(calls) > 0
    rest = [request for request in given if id(request) not in kept]
    found = iter(answers(adapter(path, batch_size=4), rest))
    assert [kept[id(r)] if id(r) in kept else next(found)[0] for r in given] == [text for text, *_ in whole]


def test_options_keep_their_numbers() -> None:
    """After a kill only some options of a question are asked for; a padded rank asks for one twice."""
    from llava_moe.evaluation.requests import options

    given = with_options(requests()[:1])
    assert [question.option for question in options([*given[2:], given[3]])] == [2, 3, 3]
