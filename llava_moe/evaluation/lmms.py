"""The lmms-eval adapter: a "simple" model class that answers with a llava_moe (or stock LLaVA) checkpoint.

Rules that differ from the adapters which come with lmms-eval, each because of a defect seen there:

- Task, split, document and pictures are looked up for every request, as a batch may span several tasks.
- Prompts are padded on the left and carry an attention mask, so that an answer does not depend on its batch mates.
- Stop strings: a task without any gets "\\n\\n" from lmms-eval, which would cut answers of several paragraphs; it is
  ignored. Every other string of `until` ends the answer (which is then cut in front of it).
- Nothing is caught: a failure ends the run instead of being scored as an empty answer.
- loglikelihood returns the mean LOSS per token, since lmms-eval takes the smallest value as the chosen option, and
  wraps the pair, since a bare (float, bool) would be turned into a string.

What makes it fast: `batching.py` (rows of similar length together) and `vision_reuse.py` (a picture is encoded once).
Greedy answers do not depend on batch size, order or number of ranks; sampled ones do, as they share one random stream.

What a run of scoring may use, beside the arguments of `LlavaMoe` (batch_size, batch_tokens, vision_cache_mib, routing,
routing_run):

    adapter.on_answers            None, or called after each batch with its requests and its answers, in the same order:
                                  what a journal must keep. Give all unanswered requests in one call; a call for each
                                  chunk would batch worse.
    adapter.is_recorded(request)  False where routing is asked for and has no line for this request: a journal's answer
                                  to it must be given again.
    adapter.progress              (total, what) -> a context manager with `update(number=1)`, tqdm unless it is replaced
    adapter.counters()            what this rank did
    routing_records.merge(out, wanted)   on rank 0 after the answers, where routing was asked for
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.answering import Answerer
from llava_moe.evaluation.batching import Row, padding_share, plan_batches
from llava_moe.evaluation.machinery import accelerator
from llava_moe.evaluation.requests import Encoded, Question, RequestReader, generations, options
from llava_moe.evaluation.routing_records import RoutingRecorder, measure_pictures, name_of
from llava_moe.evaluation.vision_reuse import DEFAULT_MIB, VisionFeatures, can_reuse
from llava_moe.moe import MoELayer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_checkpoint(pretrained: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model (eval mode) and the processor of a checkpoint directory."""
    from llava_moe.data.processing import load_processor
    from llava_moe.model.assemble import load_model

    return load_model(pretrained, dtype=dtype), load_processor(pretrained)


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        EvaluationError: the name is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise EvaluationError(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


class LlavaMoe(lmms):  # type: ignore[misc]
    """Answers lmms-eval's requests with one checkpoint.

    Args:
        pretrained: checkpoint directory; not needed where `model` and `processor` are given.
        batch_size: prompts that are answered together, at most.
        max_batch_size: upper bound of `batch_size`, where lmms-eval's command line gives one.
        device: "cpu", "cuda:0", ...; by default what accelerate assigns to this process.
        dtype: float32, bfloat16 or float16.
        blank_images: replaces every picture by a mid-grey one of its size: what the model knows without looking.
        model: a loaded model (for scoring inside a training process); stays alive after the run.
        processor: the processor that goes with `model`.
        batch_tokens: bound on the tokens of a batch: rows times the longest prompt and its answer.
        vision_cache_mib: features of pictures that are kept for further questions; 0 keeps nothing.
        routing: folder that gets the routing records, see `routing_records.py`.
        routing_run: what decides the answers (weights, tasks, settings) as a text; records of an interrupted run
            with the same text are kept. "" begins anew.

    Attributes:
        on_answers, progress: see above.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        blank_images: bool = False,
        model: Any = None,
        processor: Any = None,
        batch_tokens: int | str | None = None,
        vision_cache_mib: float = DEFAULT_MIB,
        routing: str | Path | None = None,
        routing_run: str = "",
    ) -> None:
        super().__init__()
        if (model is None) != (processor is None) or (model is None) == (pretrained is None):
            raise EvaluationError("give either pretrained=CHECKPOINT, or both model= and processor=")
        self.batch_size = min(_whole("batch_size", batch_size), int(max_batch_size or batch_size))
        self.batch_tokens = None if batch_tokens is None else _whole("batch_tokens", batch_tokens)
        if isinstance(vision_cache_mib, bool) or not isinstance(vision_cache_mib, int | float) or vision_cache_mib < 0:
            raise EvaluationError(f"vision_cache_mib must be a number from 0 on, not {vision_cache_mib!r}")
        if not isinstance(blank_images, bool):
            raise EvaluationError(f"blank_images must be True or False, not {blank_images!r}")
        self.blank_images = blank_images
        self.accelerator = accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device else self.accelerator.device
        if self._world_size > 1 and self.device.type != self.accelerator.device.type:
            raise EvaluationError(f"device {device!r} cannot be used by {self._world_size} processes; leave it out")
        if pretrained is not None:
            model, processor = load_checkpoint(str(pretrained), parse_dtype(dtype))
        # a quantised model is where it was made, and refuses to be moved
        self.model = (model if getattr(model, "is_quantized", False) else model.to(self.device)).eval()
        self.dtype: torch.dtype = self.model.dtype
        self.processor = processor
        self.on_answers: Callable[[list[Any], list[GenerationResult]], None] | None = None
        self.progress: Callable[[int, str], Any] = self._bar
        self._counts = {"requests": 0, "batches": 0, "padding": 0.0}
        self._install(vision_cache_mib, None if routing is None else Path(routing), routing_run)
        self._check_batch()

    def _install(self, vision_cache_mib: float, routing: Path | None, routing_run: str) -> None:
        """What reads, remembers, records and answers."""
        self.recorder: RoutingRecorder | None = None
        if routing is not None:
            if not can_reuse(self.model):
                raise EvaluationError("routing records need a model of this package")
            try:
                self.recorder = RoutingRecorder(self.model, routing, self.rank, self.world_size, routing_run)
            except ValueError as error:
                raise EvaluationError(f"routing: {error}") from error
        self.vision: VisionFeatures | None = None
        if can_reuse(self.model):
            summarise = None if self.recorder is None else measure_pictures
            self.vision = VisionFeatures(self.model, self.processor, vision_cache_mib, summarise)
        self.reader = RequestReader(
            self.processor, lambda task, split, doc_id: self.task_dict[task][split][doc_id], self.blank_images
        )
        self.answerer = Answerer(self.model, self.processor, self.reader, self.vision, self.recorder, self.device)

    def _check_batch(self) -> None:
        """Answers one by one where a router lets the tokens of one question change what becomes of another's."""
        modules = self.model.modules() if isinstance(self.model, torch.nn.Module) else ()
        layers = [m for m in modules if isinstance(m, MoELayer) and m.site[0] == "decoder"]
        if self.batch_size > 1 and any(not layer.router.token_choice for layer in layers):
            warnings.warn(
                "the router of this decoder lets the questions of a batch change each other's answers; batch_size is 1",
                stacklevel=3,
            )
            self.batch_size = 1

    def clean(self) -> None:
        """Keeps the model: lmms-eval calls this after the answers, and its own version deletes every module."""
        if self.vision is not None:
            self.vision.clear()
        if self.recorder is not None:
            self.recorder.close()

    def is_recorded(self, request: Instance) -> bool:
        """Whether nothing is left to record about a request that was answered before."""
        if self.recorder is None:
            return True
        _, second, _, doc_id, task, _ = request.args
        option = None if isinstance(second, Mapping) else int(request.idx)
        return name_of(task, doc_id, option) in self.recorder.recorded

    def counters(self) -> dict[str, float]:
        """Requests, batches, share of padding, and pictures that were encoded and that were reused; of this rank."""
        found: dict[str, float] = {name: self._counts[name] for name in ("requests", "batches")}
        found["padding_share"] = round(self._counts["padding"] / max(self._counts["batches"], 1), 4)
        if self.vision is not None:
            found |= {"pictures_encoded": self.vision.misses, "pictures_reused": self.vision.hits}
        return found

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in the order of the requests."""
        return self._answer(requests, generations(requests), self.answerer.generate, "answers")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each (context, continuation): mean loss per target token, and whether greedy decoding would say it."""
        return self._answer(requests, options(requests), self.answerer.score, "continuations")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """Not available.

        Raises:
            NotImplementedError: always; the message names the tasks.
        """
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise NotImplementedError(f"llava_moe answers no multi-round tasks ({tasks}); leave them out of the list")

    def _answer(
        self,
        requests: list[Instance],
        questions: list[Question],
        answer: Callable[[list[Question], list[Encoded] | None], list[GenerationResult]],
        what: str,
    ) -> list[GenerationResult]:
        encoded, batches = self._plan(questions)
        found: dict[int, GenerationResult] = {}
        with self.progress(len(questions), what) as progress:
            for batch in batches:
                asked = [questions[index] for index in batch]
                results = answer(asked, None if encoded is None else [encoded[index] for index in batch])
                found |= dict(zip(batch, results, strict=True))
                if self.on_answers is not None:
                    self.on_answers([requests[index] for index in batch], results)
                progress.update(len(batch))
        return [found[index] for index in range(len(questions))]

    def _plan(self, questions: list[Question]) -> tuple[list[Encoded] | None, list[list[int]]]:
        """The requests as tokens, and the batches; for a model that takes pixels only letters are counted."""
        encoded: list[Encoded] | None = None
        if self.vision is None:
            rows = [Row(i, len(q.context), q.max_new_tokens, q.settings) for i, q in enumerate(questions)]
        else:
            encoded = []
            with self.progress(len(questions), "questions read") as progress:
                for question in questions:
                    encoded.append(self.reader.encode(question))
                    progress.update()
            rows = [one.row(i, q) for i, (one, q) in enumerate(zip(encoded, questions, strict=True))]
        batches = plan_batches(rows, self.batch_size, self.batch_tokens)
        self._counts["requests"] += len(rows)
        self._counts["batches"] += len(batches)
        self._counts["padding"] += padding_share(rows, batches) * len(batches)
        return encoded, batches

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="", disable=self.rank != 0)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise EvaluationError(f"{name} must be a whole number from 1 on, not {value!r}")
    return int(value)
