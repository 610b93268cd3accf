"""One batch of requests through the model: answers that are generated, and options that are scored.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lmms_eval.api.instance import GenerationResult, TokenCounts
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteriaList, StopStringCriteria

from llava_moe.data.visuals import join_visuals
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.requests import Encoded, Question, RequestReader, generation_options
from llava_moe.evaluation.routing_records import RoutingRecorder, Watch
from llava_moe.evaluation.vision_reuse import Entry, VisionFeatures, encoder_outputs

IGNORE = -100


class StringStops(StopStringCriteria):  # type: ignore[misc]  # transformers types it as Any
    """Ends rows at texts that are no token of their own, and knows where each ended.

    Unlike the stock class it looks at the answer alone: a text that begins in the prompt ends nothing.

    Args:
        tokenizer: of the model.
        strings: the texts.
        start: length of the prompts, padding included.

    Attributes:
        length_B: of each ended row prompt and answer, padding included; 0 for the others. None before the first token.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], start: int) -> None:
        super().__init__(tokenizer=tokenizer, stop_strings=list(strings))
        self.start = start
        self.length_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over: Tensor = super().__call__(input_ids[:, self.start :], scores, **kwargs)
        before = torch.zeros_like(over, dtype=torch.long) if self.length_B is None else self.length_B
        self.length_B = torch.where(over & (before == 0), input_ids.shape[1], before)
        return over

    def ended(self) -> Tensor | None:
        """(B,) bool, None before the first token."""
        return None if self.length_B is None else self.length_B > 0


class Answerer:
    """Answers batches.

    Args:
        model, processor: of the checkpoint.
        reader: of the requests.
        vision: encodes the pictures; None for a model that takes pixels only.
        recorder: of the routing, or None.
        device: of the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        reader: RequestReader,
        vision: VisionFeatures | None,
        recorder: RoutingRecorder | None,
        device: torch.device,
    ) -> None:
        self.model = model
        self.processor = processor
        self.reader = reader
        self.vision = vision
        self.recorder = recorder
        self.device = device

    def generate(self, questions: list[Question], encoded: list[Encoded] | None) -> list[GenerationResult]:
        """Answers to questions of the same settings, padded on the left."""
        gen_kwargs = questions[0].gen_kwargs
        assert gen_kwargs is not None
        options, cuts = generation_options(gen_kwargs)
        if self.recorder is not None and options["num_beams"] > 1:
            raise EvaluationError(f"{questions[0].where}: routing cannot be recorded with num_beams > 1; leave it out")
        prompts, entries = self._prompts(questions, encoded)
        inputs = {**self.processor.pad_prompts(prompts), **encoder_outputs([e for row in entries for e in row])}
        start = inputs["input_ids"].shape[1]
        stop_ids = list(self.processor.stop_token_ids)
        stops = None
        if self.processor.stop_strings:  # templates whose end is no token of its own
            cuts = [*cuts, *self.processor.stop_strings]
            stops = StringStops(self.processor.tokenizer, self.processor.stop_strings, start)
            options["stopping_criteria"] = StoppingCriteriaList([stops])
        pad_id = self.processor.tokenizer.pad_token_id
        ended = (lambda: None) if stops is None else stops.ended
        with self._watch(stop_ids=stop_ids, ended=ended) as watch, torch.inference_mode():
            output_ids = self.model.generate(
                **self._to_device(inputs),
                **options,
                use_cache=True,  # a training config may have switched it off
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0] if pad_id is None else pad_id,
            )
        self._write(watch, questions, entries)
        # the rows of a beam search are its beams; its answers are cut by their text alone
        lengths = None if stops is None or options["num_beams"] > 1 else stops.length_B
        ends = [0] * len(questions) if lengths is None else lengths.tolist()
        return [
            self._decode(answer[: end - start] if end else answer, cuts, len(prompt["input_ids"]))
            for answer, end, prompt in zip(output_ids[:, start:].tolist(), ends, prompts, strict=True)
        ]

    def _decode(self, answer: list[int], cuts: Sequence[str], input_tokens: int) -> GenerationResult:
        stop_ids = self.processor.stop_token_ids
        length = next((i for i, token in enumerate(answer) if token in stop_ids), len(answer))
        text = self.processor.tokenizer.decode(answer[:length], skip_special_tokens=True).strip()
        for string in cuts:
            text = text.split(string, 1)[0]
        return GenerationResult(text.strip(), TokenCounts(input_tokens=input_tokens, output_tokens=length))

    def score(self, questions: list[Question], encoded: list[Encoded] | None) -> list[GenerationResult]:
        """For each option the mean loss of its tokens, and whether greedy decoding would say it.

        Padded on the right: nothing that stands behind a token can change it, and positions start at 0 for every row.
        """
        samples, entries = self._samples(questions, encoded)
        input_ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True)
        labels = pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE)
        empty = [q.where for q, row in zip(questions, labels, strict=True) if not (row[1:] != IGNORE).any()]
        if empty:
            raise EvaluationError(f"{empty[0]}: the option has no tokens, and so no likelihood; mend the record")
        lengths = torch.tensor([len(s["input_ids"]) for s in samples])
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            **join_visuals(samples),
            **encoder_outputs([entry for row in entries for entry in row]),
        }
        # the vocabulary's logits of all positions would be most of the memory
        places = (labels[:, 1:] != IGNORE).any(dim=0).nonzero().squeeze(1)
        targets = labels[:, 1:][:, places].to(self.device)
        with self._watch(answer_BS=labels != IGNORE) as watch, torch.inference_mode():
            device_places = places.to(self.device)
            logits = self.model(**self._to_device(inputs), logits_to_keep=device_places).logits.float()
        self._write(watch, questions, entries)
        is_target = targets != IGNORE
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORE)
        means = losses.sum(dim=1) / is_target.sum(dim=1)
        greedy = ((logits.argmax(dim=-1) == targets) | ~is_target).all(dim=1)
        pairs = zip(means.tolist(), greedy.tolist(), strict=True)
        return [GenerationResult(text=(loss, is_greedy)) for loss, is_greedy in pairs]

    def _prompts(
        self, questions: list[Question], encoded: list[Encoded] | None
    ) -> tuple[list[dict[str, Any]], list[list[Entry]]]:
        if encoded is not None:
            return [{"input_ids": e.ids.long()} for e in encoded], self._entries(questions, encoded)
        return [self._with_pixels(question) for question in questions], [[] for _ in questions]

    def _samples(
        self, questions: list[Question], encoded: list[Encoded] | None
    ) -> tuple[list[dict[str, Any]], list[list[Entry]]]:
        if encoded is None:
            return [self._with_pixels(question) for question in questions], [[] for _ in questions]
        samples = []
        for one in encoded:
            assert one.labels is not None
            samples.append({"input_ids": one.ids.long(), "labels": one.labels.long()})
        return samples, self._entries(questions, encoded)

    def _entries(self, questions: list[Question], encoded: list[Encoded]) -> list[list[Entry]]:
        assert self.vision is not None
        found = []
        for question, one in zip(questions, encoded, strict=True):
            try:
                found.append(self.vision.encode(one.shown.keys, partial(self.reader.pictures, question)))
            except ValueError as error:
                raise EvaluationError(f"{question.where}: {error}") from error
        return found

    def _with_pixels(self, question: Question) -> dict[str, Any]:
        """A prompt or a labelled sample with its pictures, for models that take pixels only."""
        images = self.reader.pictures(question)
        turns = self.reader.turns(question, len(images))
        encode = self.processor.encode_prompt if len(turns) == 1 else self.processor.encode_sample
        try:
            return dict(encode(turns, images))
        except ValueError as error:
            raise EvaluationError(f"{question.where}: {error}") from error

    def _watch(self, **options: Any) -> contextlib.AbstractContextManager[Watch | None]:
        return contextlib.nullcontext() if self.recorder is None else self.recorder.watch(**options)

    def _write(self, watch: Watch | None, questions: list[Question], entries: list[list[Entry]]) -> None:
        if watch is None or self.recorder is None:
            return
        for question, sums, shown in zip(questions, watch.rows(), entries, strict=True):
            self.recorder.write(question.task, question.doc_id, question.option, sums, [e.routing for e in shown])
        self.recorder.flush()

    def _to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        dtype = self.model.dtype
        return {
            key: value.to(self.device, dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for key, value in inputs.items()
            if value is not None
        }
