"""Tiny checkpoints that have learned something, so that answers differ between questions and pictures."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
from PIL import Image  # isort: skip
from torch.nn.utils.rnn import pad_sequence  # isort: skip

from llava_moe.data.schema import Turn
from llava_moe.data.visuals import join_visuals
from llava_moe.evaluation.lmms import LlavaMoe
from tests.tiny import COLOURS, SHAPES, tiny_image
from tests.tiny_families import family_model, family_processor

SIZES = ((24, 20), (40, 20), (17, 33), (50, 14))
STEPS = 60
MOE_PART: dict[str, Any] = {
    "layers": [0, 2],
    "num_experts": 4,
    "router": {"name": "top_k", "args": {"k": 2}},
    "experts": {"name": "stacked", "args": {"kernel": "grouped"}},
}
KINDS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "moe": {"decoder": MOE_PART, "projector": {**MOE_PART, "layers": [0]}},
    "capacity": {"decoder": {**MOE_PART, "capacity": {"factor": 0.75}}},
}


def picture(index: int) -> Image.Image:
    """Colour by index % 4, shape by index // 4 % 2, size by index % 3 and more."""
    return tiny_image(index, SIZES[index % 3 + (index // 8) % 2])


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def shape(index: int) -> str:
    return SHAPES[index // len(COLOURS) % len(SHAPES)]


def lessons() -> list[tuple[str, str, list[int]]]:
    """(question, answer, pictures): colour, shape, two pictures, and text alone."""
    found = []
    for index in range(24):
        found.append(("What colour is the shape?", colour(index), [index]))
        found.append(("What is the shape?", f"a {shape(index)}", [index]))
        if index % 3 == 0:
            both = f"{colour(index)} and {colour(index + 5)}"
            found.append(("What colour is it and what colour is it?", both, [index, index + 5]))
    found += [(f"describe {word}", f"the colour {word}", []) for word in COLOURS]
    return found


def _sample(processor: Any, lesson: tuple[str, str, list[int]]) -> dict[str, Any]:
    question, answer, shown = lesson
    turns = [Turn("user", "<image>\n" * len(shown) + question), Turn("assistant", answer)]
    return dict(processor.encode_sample(turns, [picture(index) for index in shown]))


def _batch(samples: list[dict[str, Any]]) -> dict[str, Any]:
    input_ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True)
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    return {
        "input_ids": input_ids,
        "labels": pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=-100),
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        **join_visuals(samples),
    }


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="llava_moe_trained_")  # goes with the process


@functools.cache
def checkpoint(family: str = "llava", kind: str = "moe") -> Path:
    """The checkpoint of a family and kind; each is trained once for all tests of a process."""
    return write_trained(Path(_folder().name) / f"{family}_{kind}", family, kind)


def write_trained(path: Path, family: str = "llava", kind: str = "dense", steps: int = STEPS) -> Path:
    """Trains a tiny model for some steps and writes it as a finished run does."""
    processor = family_processor(family)
    model = family_model(family, KINDS[kind], processor).train()
    generator, taught = torch.Generator().manual_seed(1), [_sample(processor, lesson) for lesson in lessons()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 5e-3 * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)
            chosen = [taught[i] for i in torch.randperm(len(taught), generator=generator)[:12].tolist()]
            loss = model(**_batch(chosen)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.pad_token_id
    model.save_pretrained(path, save_original_format=True)
    processor.save_pretrained(path)
    return path


QUESTIONS = (
    "What colour is the shape?",
    "What is the shape?",
    "What colour is it and what colour is it?",
    "describe red",
    "What is it and what is the colour and what is the shape?",
    "describe the image",
)


def documents() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Two tasks: one picture (some asked about twice), and a mixture with none or two; sizes differ."""
    one = [{"pictures": [10 * (i // 2) + 1], "text": QUESTIONS[i % 2]} for i in range(10)]
    mixed = [{"pictures": [], "text": "describe blue"}, {"pictures": [3, 8], "text": QUESTIONS[2]}]
    mixed += [{"pictures": [i], "text": QUESTIONS[i % 6]} for i in range(4)]
    mixed += [{"pictures": [3, 8], "text": QUESTIONS[5]}, {"pictures": [], "text": "describe green and red and it"}]
    return {"one": {"test": one}, "mixed": {"test": mixed}}


def visuals(document: dict[str, Any]) -> list[Image.Image]:
    return [picture(index) for index in document["pictures"]]


def requests(second: Any = None) -> list[Any]:
    """A generation of every document, of both tasks in turn, with two kinds of settings."""
    found = []
    for task, splits in documents().items():
        for doc_id, document in enumerate(splits["test"]):
            settings = second or {"until": ["\n\n"], "max_new_tokens": 6 if doc_id % 4 else 3}
            args = (document["text"], settings, visuals, doc_id, task, "test")
            found.append(SimpleNamespace(args=args, task_name=task, idx=0))
    return found[::2] + found[1::2]


def with_options(given: list[Any]) -> list[Any]:
    """The log-likelihoods of some answers to each, as lmms-eval makes them of multiple choice."""
    found = []
    for request in given:
        for index, option in enumerate(("red", "blue", "a circle", "the colour red and green")):
            args = (request.args[0], option, *request.args[2:])
            found.append(SimpleNamespace(args=args, task_name=request.task_name, idx=index))
    return found


def option_requests() -> list[Any]:
    """The log-likelihoods of some answers to every document."""
    return with_options(requests())


def adapter(path: Path, **options: Any) -> LlavaMoe:
    """The adapter on a checkpoint, with both tasks."""
    lm = LlavaMoe(pretrained=str(path), device="cpu", **options)
    lm.task_dict = documents()
    return lm


def answers(lm: LlavaMoe, given: Sequence[Any] | None = None) -> list[tuple[str, int, int]]:
    """Text, tokens of the prompt and tokens of the answer of each request."""
    found = lm.generate_until(requests() if given is None else list(given))
    return [(one.text, one.token_counts.input_tokens, one.token_counts.output_tokens) for one in found]


def losses(lm: LlavaMoe) -> tuple[list[float], list[bool]]:
    """Of every option."""
    found = [one.text for one in lm.loglikelihood(option_requests())]
    return [loss for loss, _ in found], [greedy for _, greedy in found]
