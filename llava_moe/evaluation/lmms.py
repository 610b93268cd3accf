"""The lmms-eval adapter: a "simple" model class that answers with a llava_moe (or stock LLaVA) checkpoint.

Rules that differ from the adapters which come with lmms-eval, each because of a defect seen there:

- Task, split, document and pictures are looked up for every request, as a batch may span several tasks.
- Prompts are padded on the left and carry an attention mask, so that an answer does not depend on its batch mates.
- Stop strings: a task without any gets "\\n\\n" from lmms-eval, which would cut answers of several paragraphs; it is
  ignored. Every other string of `until` ends the answer (which is then cut in front of it).
- Nothing is caught: a failure ends the run instead of being scored as an empty answer.
- loglikelihood returns the mean LOSS per token, since lmms-eval takes the smallest value as the chosen option, and
  wraps the pair, since a bare (float, bool) would be turned into a string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llava_moe.data.schema import Turn
from llava_moe.data.visuals import join_visuals
from llava_moe.evaluation import EvaluationError

IMAGE_MARKER = "<image>"
DEFAULT_MAX_NEW_TOKENS = 1024  # LLaVA's own default, for the tasks that set no limit
FRAMEWORK_STOP = "\n\n"  # put in by lmms-eval where a task names no stop string
SAMPLING_KEYS = ("temperature", "top_p", "top_k")
MID_GREY = (128, 128, 128)
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


def generation_options(gen_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translates a task's generation settings into arguments of `generate`, and stop strings.

    Only known keys pass: tasks hand the settings of other models (`image_aspect_ratio`, ...) to everyone. Temperature 0
    or none means greedy decoding. The mapping itself is left as it is, for lmms-eval shares it between requests.
    """
    temperature = float(gen_kwargs.get("temperature") or 0.0)
    sample = temperature > 0 and bool(gen_kwargs.get("do_sample", True))
    options: dict[str, Any] = {
        "max_new_tokens": int(gen_kwargs.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS),
        "num_beams": int(gen_kwargs.get("num_beams") or 1),
        "do_sample": sample,
    }
    # None switches off what the checkpoint's generation_config may hold for sampling.
    options |= {key: gen_kwargs.get(key) if sample else None for key in SAMPLING_KEYS}
    until = gen_kwargs.get("until") or []
    strings = [until] if isinstance(until, str) else list(until)
    return options, [string for string in strings if string != FRAMEWORK_STOP]


class LlavaMoe(lmms):  # type: ignore[misc]
    """Answers lmms-eval's requests with one checkpoint.

    Args:
        pretrained: checkpoint directory; not needed where `model` and `processor` are given.
        batch_size: prompts that are answered together.
        max_batch_size: upper bound of `batch_size`, where lmms-eval's command line gives one.
        device: "cpu", "cuda:0", ...; by default what accelerate assigns to this process.
        dtype: float32, bfloat16 or float16.
        blank_images: replaces every picture by a mid-grey one of its size: what the model knows without looking.
        model: a loaded model (for scoring inside a training process); stays alive after the run.
        processor: the processor that goes with `model`.
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
    ) -> None:
        super().__init__()
        if (model is None) != (processor is None) or (model is None) == (pretrained is None):
            raise EvaluationError("give either pretrained=CHECKPOINT, or both model= and processor=")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise EvaluationError(f"batch_size must be a whole number from 1 on, not {batch_size!r}")
        if not isinstance(blank_images, bool):
            raise EvaluationError(f"blank_images must be True or False, not {blank_images!r}")
        self.batch_size = min(int(batch_size), int(max_batch_size or batch_size))
        self.blank_images = blank_images
        self.accelerator = Accelerator()
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

    def clean(self) -> None:
        """Keeps the model: lmms-eval calls this after the answers, and its own version deletes every module."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in the order of the requests."""
        collator = Collator([request.args for request in requests], _by_length, grouping=True)
        results: list[GenerationResult] = []
        with self._progress(len(requests), "answers") as progress:
            for batch in collator.get_batched(n=self.batch_size):
                results.extend(self._generate_batch(batch))
                progress.update(len(batch))
        return list(collator.get_original(results))

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each (context, continuation): mean loss per target token, and whether greedy decoding would say it."""
        collator = Collator([request.args for request in requests], _by_length)
        results: list[GenerationResult] = []
        with self._progress(len(requests), "continuations") as progress:
            for batch in collator.get_batched(n=self.batch_size):
                results.extend(self._score_batch(batch))
                progress.update(len(batch))
        return list(collator.get_original(results))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """Not available.

        Raises:
            NotImplementedError: always; the message names the tasks.
        """
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise NotImplementedError(f"llava_moe answers no multi-round tasks ({tasks}); leave them out of the list")

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="", disable=self.rank != 0)

    def _generate_batch(self, batch: Sequence[tuple[Any, ...]]) -> list[GenerationResult]:
        options, stop_strings = generation_options(batch[0][1])  # the collator groups by these
        prompts = [
            self._encode(context, None, doc_to_visual, doc_id, task, split)
            for context, _, doc_to_visual, doc_id, task, split in batch
        ]
        inputs = self._to_device(self.processor.pad_prompts(prompts))
        stop_ids = list(self.processor.stop_token_ids)
        if self.processor.stop_strings:  # templates whose end is no token of its own
            stop_strings = [*stop_strings, *self.processor.stop_strings]
            options = {**options, "stop_strings": stop_strings, "tokenizer": self.processor.tokenizer}
        pad_id = self.processor.tokenizer.pad_token_id
        with torch.inference_mode():
            output_ids = self.model.generate(
                **inputs, **options, eos_token_id=stop_ids, pad_token_id=stop_ids[0] if pad_id is None else pad_id
            )
        answers = output_ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            self._decode(answer, stop_ids, stop_strings, input_tokens=len(prompt["input_ids"]))
            for answer, prompt in zip(answers, prompts, strict=True)
        ]

    def _decode(
        self, answer: list[int], stop_ids: list[int], stop_strings: list[str], input_tokens: int
    ) -> GenerationResult:
        length = next((i for i, token in enumerate(answer) if token in stop_ids), len(answer))
        text = self.processor.tokenizer.decode(answer[:length], skip_special_tokens=True).strip()
        for string in stop_strings:
            text = text.split(string, 1)[0]
        return GenerationResult(text.strip(), TokenCounts(input_tokens=input_tokens, output_tokens=length))

    def _score_batch(self, batch: Sequence[tuple[Any, ...]]) -> list[GenerationResult]:
        samples = [self._encode(*args) for args in batch]
        # Right padding: nothing that stands behind a token can change it, and positions start at 0 for every row.
        input_ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
        labels = pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        }
        inputs |= join_visuals(samples)
        with torch.inference_mode():
            logits = self.model(**self._to_device(inputs)).logits[:, :-1].float()
        targets = labels[:, 1:].to(logits.device)
        is_target = targets != -100
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        means = losses.sum(dim=1) / is_target.sum(dim=1)
        greedy = ((logits.argmax(dim=-1) == targets) | ~is_target).all(dim=1)
        pairs = zip(means.tolist(), greedy.tolist(), strict=True)
        return [GenerationResult(text=(loss, is_greedy)) for loss, is_greedy in pairs]

    def _encode(
        self, context: str, continuation: Any, doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> dict[str, Any]:
        """One request as tensors: a prompt, or (with a continuation) a labelled sample."""
        doc = self.task_dict[task][split][doc_id]
        where = f"task {task!r}, document {doc_id} of split {split!r}"
        images = self._images(doc_to_visual(doc), where)
        turns = [Turn(role="user", text=_with_markers(context, len(images), where))]
        try:
            if continuation is None:
                return dict(self.processor.encode_prompt(turns, images))
            text = continuation(doc) if callable(continuation) else continuation
            return dict(self.processor.encode_sample([*turns, Turn(role="assistant", text=text.strip())], images))
        except ValueError as error:
            raise EvaluationError(f"{where}: {error}") from error

    def _images(self, visuals: Any, where: str) -> list[Image.Image]:
        images = list(visuals or [])
        for visual in images:
            if not isinstance(visual, Image.Image):
                kind = type(visual).__name__
                raise EvaluationError(f"{where}: a visual is a {kind}, but only pictures (PIL images) are understood")
        if self.blank_images:
            return [Image.new("RGB", image.size, MID_GREY) for image in images]
        return images

    def _to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in inputs.items()
            if value is not None
        }


def _by_length(args: tuple[Any, ...]) -> tuple[int, str]:
    return -len(args[0]), args[0]  # longest first: a batch that does not fit in memory shows at once


def _with_markers(context: str, num_images: int, where: str) -> str:
    """Puts the picture markers in front of a context that has none, and refuses a wrong number of them."""
    num_markers = context.count(IMAGE_MARKER)
    if num_markers == 0:
        return f"{IMAGE_MARKER}\n" * num_images + context
    if num_markers != num_images:
        raise EvaluationError(
            f"{where}: the prompt holds {num_markers} {IMAGE_MARKER} markers, but there are {num_images} pictures; "
            "correct the task's doc_to_text or doc_to_visual"
        )
    return context
