"""The adapter alone: requests in, answers out."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.lmms import LlavaMoe
from llava_moe.evaluation.registry import manifests
from llava_moe.evaluation.requests import generation_options
from tests.evaluation import fakes

RED, BLUE = fakes.picture(0), fakes.picture(2)


def adapter(documents: list[Any], **options: Any) -> tuple[LlavaMoe, fakes.FakeModel]:
    """An adapter for one task whose documents are lists of pictures."""
    model = fakes.FakeModel()
    lm = LlavaMoe(model=model, processor=fakes.FakeProcessor(), **options)
    lm.task_dict = {"toy": {"test": documents}}
    return lm, model


def request(context: str, doc_id: int, second: Any = None) -> Any:
    second = {"until": ["\n\n"], "max_new_tokens": 16} if second is None else second
    return SimpleNamespace(args=(context, second, lambda doc: doc, doc_id, "toy", "test"), task_name="toy", idx=0)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_come_in_request_order_with_their_own_pictures(batch_size: int) -> None:
    documents = [[RED], [BLUE], [], [RED]]
    lm, model = adapter(documents, batch_size=batch_size)
    contexts = ["What color?", "What color is it?", "Which color then?", "<image>\nWhat color?"]
    answers = lm.generate_until([request(context, i) for i, context in enumerate(contexts)])
    assert [answer.text for answer in answers] == ["RED", "BLUE", "NOTHING", "RED"]
    assert answers[0].token_counts.output_tokens == len(" RED")
    assert max(len(call["input_ids"]) for call in model.calls) == min(batch_size, 4)
    assert sum("<image>" in prompt for prompt in model.prompts) == 3  # the document without a picture has no marker
    for call in model.calls:
        assert call["attention_mask"][:, -1].all()  # padded on the left


def test_requests_with_other_settings_are_not_answered_together() -> None:
    lm, model = adapter([[RED]], batch_size=8)
    settings = [{"max_new_tokens": 4}, {"max_new_tokens": 9}, {"max_new_tokens": 4}]
    lm.generate_until([request("What color?", 0, setting) for setting in settings])
    assert sorted((call["max_new_tokens"], len(call["input_ids"])) for call in model.calls) == [(4, 2), (9, 1)]
    assert settings[0] == {"max_new_tokens": 4}


def test_generation_options() -> None:
    given = {"until": ["\n\n"], "temperature": 0, "top_p": 1.0, "do_sample": True, "image_aspect_ratio": "pad"}
    before = dict(given)
    options, stop_strings = generation_options(given)
    assert given == before
    assert options == {
        "max_new_tokens": 1024,
        "num_beams": 1,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    assert stop_strings == []
    options, stop_strings = generation_options({"temperature": 0.7, "top_p": 0.9, "until": ["\n\n", "ASSISTANT:"]})
    assert options["do_sample"]
    assert (options["temperature"], options["top_p"]) == (0.7, 0.9)
    assert stop_strings == ["ASSISTANT:"]
    assert generation_options({"until": "Q:"})[1] == ["Q:"]


def test_stop_strings_cut_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, _ = adapter([[RED]])
    monkeypatch.setattr(fakes, "oracle", lambda text, colour: "\none\n\ntwo STOP three")
    assert lm.generate_until([request("q", 0)])[0].text == "one\n\ntwo STOP three"
    assert lm.generate_until([request("q", 0, {"until": ["STOP"]})])[0].text == "one\n\ntwo"


def test_marker_and_picture_mismatch_names_task_and_document() -> None:
    lm, _ = adapter([[RED], ["film.mp4"]])
    with pytest.raises(EvaluationError, match=r"task 'toy', document 0 .* 2 <image> markers, but there are 1 pictures"):
        lm.generate_until([request("<image> and <image>", 0)])
    with pytest.raises(EvaluationError, match=r"document 1 .* a visual is a str"):
        lm.generate_until([request("q", 1)])


def test_errors_of_the_processor_get_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, _ = adapter([[RED]])
    monkeypatch.setattr(fakes.FakeProcessor, "encode_prompt", lambda *_: int("no number"))
    with pytest.raises(EvaluationError, match="document 0 of split 'test': invalid literal"):
        lm.generate_until([request("q", 0)])


class ScoringModel(fakes.FakeModel):
    """Puts 90 % on the next character of "<colour in the picture><STOP>", whatever stands before."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        vocabulary = 200
        logits = torch.zeros(*input_ids.shape, vocabulary)
        tokenizer = fakes.CharTokenizer()
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            text = tokenizer.decode(ids[mask.bool()].tolist())
            colour = fakes._nearest(options["pixel_values"][row : row + 1].flatten(1).tolist())
            start = 1 + len(text) - len(text.split("?")[1])
            for offset, token in enumerate([*tokenizer.encode(colour), fakes.STOP]):
                if start + offset - 1 < ids.shape[0]:
                    logits[row, start + offset - 1, token] = torch.tensor(0.9 * (vocabulary - 1) / 0.1).log()
        return SimpleNamespace(logits=logits[:, options["logits_to_keep"]])


def test_batches_are_reported_with_their_requests() -> None:
    lm, _ = adapter([[RED], [BLUE]], batch_size=2)
    seen: list[tuple[list[Any], list[str]]] = []
    lm.on_answers = lambda asked, said: seen.append((asked, [one.text for one in said]))
    given = [request("What color?", i % 2) for i in range(5)]
    lm.generate_until(given)
    assert [len(asked) for asked, _ in seen] == [2, 2, 1]
    assert sorted(map(id, given)) == sorted(id(one) for asked, _ in seen for one in asked)
    for asked, said in seen:
        assert said == [("RED", "BLUE")[one.args[3]] for one in asked]
    assert all(lm.is_recorded(one) for one in given)  # nothing is to be recorded
    assert lm.counters() == {"requests": 5, "batches": 3, "padding_share": 0.0}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood_is_a_mean_loss_in_a_wrapper(batch_size: int) -> None:
    lm = LlavaMoe(model=ScoringModel(), processor=fakes.FakeProcessor(), batch_size=batch_size)
    lm.task_dict = {"toy": {"test": [[RED], [BLUE]]}}
    results = lm.loglikelihood(
        [request("What?", 0, " red"), request("What?", 0, " blue"), request("Which one?", 1, lambda doc: "blue")]
    )
    losses, greedy = zip(*(result.text for result in results), strict=True)
    assert losses[0] == pytest.approx(-torch.tensor(0.9).log().item(), abs=1e-5)
    assert losses[1] > 3
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert greedy == (True, False, True)


def test_lmms_eval_still_needs_the_wrapper() -> None:
    """Where this fails, lmms-eval accepts plain pairs again, and the wrapper may go."""
    from lmms_eval.api.instance import GenerationResult, unwrap_generation_output

    assert unwrap_generation_output((0.5, True))[0] == "(0.5, True)"
    assert unwrap_generation_output(GenerationResult(text=(0.5, True)))[0] == (0.5, True)


def test_model_survives_and_multi_round_is_refused() -> None:
    lm, model = adapter([[RED]])
    lm.clean()
    assert lm.model is model
    assert (lm.rank, lm.world_size) == (0, 1)
    assert lm.device == lm.accelerator.device
    with pytest.raises(NotImplementedError, match=r"multi-round tasks \(toy\)"):
        lm.generate_until_multi_round([request("q", 0)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "either pretrained"),
        ({"pretrained": "x", "model": 1, "processor": 1}, "either pretrained"),
        ({"model": 1}, "either pretrained"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size"),
        ({"pretrained": "x", "batch_size": 0}, "batch_size"),
        ({"pretrained": "x", "batch_tokens": 0}, "batch_tokens must be a whole number from 1 on, not 0"),
        ({"pretrained": "x", "vision_cache_mib": -1}, "vision_cache_mib must be a number from 0 on, not -1"),
        ({"pretrained": "x", "vision_cache_mib": True}, "vision_cache_mib"),
        ({"model": fakes.FakeModel(), "processor": fakes.FakeProcessor(), "routing": "x"}, "a model of this package"),
        ({"pretrained": "x", "dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"pretrained": "x", "blank_images": "yes"}, "blank_images"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(EvaluationError, match=match):
        LlavaMoe(**options)


def test_registered_as_a_simple_model_only() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    for manifest in manifests():
        registry.register_manifest(manifest)
        assert manifest.chat_class_path is None
    assert registry.get_model_class("llava_moe") is LlavaMoe


def test_entry_point_is_installed() -> None:
    """`lmms-eval --model llava_moe` finds us; where this fails, install the package again (pip install -e .)."""
    found = [entry.load() for entry in entry_points(group="lmms_eval.models") if entry.name == "llava_moe"]
    assert found == [manifests]
