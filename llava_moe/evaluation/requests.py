"""lmms-eval's requests as sequences of tokens: task, document and pictures looked up for each, errors with their place.

Requests are read twice where pictures are large in number: once for their length and the content of their pictures,
which decide the batches, and once more for the pixels of those whose features are not there when they are answered.
Nothing but token ids and content keys is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava_moe.data.schema import Turn
from llava_moe.data.visuals import Shape, shape_of
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.batching import Row
from llava_moe.evaluation.vision_reuse import content_key

IMAGE_MARKER = "<image>"
DEFAULT_MAX_NEW_TOKENS = 1024  # LLaVA's own default, for the tasks that set no limit
FRAMEWORK_STOP = "\n\n"  # put in by lmms-eval where a task names no stop string
SAMPLING_KEYS = ("temperature", "top_p", "top_k")
MID_GREY = (128, 128, 128)


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


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        context, doc_to_visual, doc_id, task, split: as lmms-eval gives them.
        gen_kwargs: of a generation; None for a log-likelihood.
        continuation: of a log-likelihood: a text, or what makes one of the document.
        option: of a log-likelihood: `Instance.idx`, which tells the options of a document apart.
    """

    context: str
    doc_to_visual: Callable[[Any], Any]
    doc_id: int
    task: str
    split: str
    gen_kwargs: Mapping[str, Any] | None = None
    continuation: Any = None
    option: int | None = None

    @property
    def where(self) -> str:
        return f"task {self.task!r}, document {self.doc_id} of split {self.split!r}"

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """What requests that are answered together must share, in any order of the keys."""
        if self.gen_kwargs is None:
            return ()
        options, strings = generation_options(self.gen_kwargs)
        return (*((key, repr(value)) for key, value in sorted(options.items())), ("until", repr(strings)))

    @property
    def max_new_tokens(self) -> int:
        return 0 if self.gen_kwargs is None else int(generation_options(self.gen_kwargs)[0]["max_new_tokens"])


def generations(requests: Sequence[Any]) -> list[Question]:
    """lmms-eval's instances of the kind generate_until."""
    found = []
    for request in requests:
        context, gen_kwargs, doc_to_visual, doc_id, task, split = request.args
        found.append(Question(context, doc_to_visual, doc_id, task, split, gen_kwargs=gen_kwargs))
    return found


def options(requests: Sequence[Any]) -> list[Question]:
    """lmms-eval's instances of the kind loglikelihood."""
    found = []
    for request in requests:
        context, continuation, doc_to_visual, doc_id, task, split = request.args
        option = int(request.idx)
        found.append(Question(context, doc_to_visual, doc_id, task, split, continuation=continuation, option=option))
    return found


@dataclass(frozen=True)
class Shown:
    """The pictures of a document without their pixels.

    Attributes:
        keys: content of each, see `vision_reuse.content_key`.
        shapes: what decides their number of tokens.
    """

    keys: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """A request as tokens.

    Attributes:
        ids, labels: (S,), with the placeholders of its pictures; labels only of a log-likelihood.
        shown: its pictures.
    """

    ids: torch.Tensor
    shown: Shown
    labels: torch.Tensor | None = None

    def row(self, index: int, question: Question) -> Row:
        """What batching needs to know."""
        return Row(
            index,
            len(self.ids),
            question.max_new_tokens,
            question.settings,
            self.shown.keys,
            (question.task, question.split, question.doc_id),
        )


class RequestReader:
    """Looks requests up and turns them into tokens.

    Args:
        processor: of the checkpoint.
        documents: gives the document of a task, split and number.
        blank: shows a mid-grey picture of the same size in the place of each.
    """

    def __init__(self, processor: Any, documents: Callable[[str, str, int], Any], blank: bool = False) -> None:
        self.processor = processor
        self.documents = documents
        self.blank = blank
        self._last: tuple[tuple[str, str, int, int], Shown] | None = None

    def pictures(self, question: Question) -> list[Image.Image]:
        """The pictures of a request.

        Raises:
            EvaluationError: something among them is no picture.
        """
        images = list(question.doc_to_visual(self._document(question)) or [])
        for visual in images:
            if not isinstance(visual, Image.Image):
                kind = type(visual).__name__
                raise EvaluationError(
                    f"{question.where}: a visual is a {kind}, but only pictures (PIL images) are understood"
                )
        if self.blank:
            return [Image.new("RGB", image.size, MID_GREY) for image in images]
        return images

    def turns(self, question: Question, num_images: int) -> list[Turn]:
        """The conversation, with one marker for each picture, and for a log-likelihood with the answer."""
        asked = Turn(role="user", text=_with_markers(question.context, num_images, question.where))
        if question.continuation is None:
            return [asked]
        text = question.continuation
        text = text(self._document(question)) if callable(text) else text
        return [asked, Turn(role="assistant", text=str(text).strip())]

    def encode(self, question: Question) -> Encoded:
        """Reads a request; its pictures are decoded and let go of.

        Raises:
            EvaluationError: it does not fit the checkpoint; the message names task and document.
        """
        shown = self._shown(question)
        turns = self.turns(question, len(shown.keys))
        try:
            counts = self.processor.image_tokens(shown.shapes)
            if len(turns) == 1:
                ids, _ = self.processor.text_encoder.encode(turns, len(shown.keys), counts, mode="generate")
                return Encoded(torch.tensor(ids, dtype=torch.int32), shown)
            text = self.processor.encode_text(turns, len(shown.keys), counts)
            return Encoded(text["input_ids"].int(), shown, text["labels"].int())
        except ValueError as error:
            raise EvaluationError(f"{question.where}: {error}") from error

    def _document(self, question: Question) -> Any:
        return self.documents(question.task, question.split, question.doc_id)

    def _shown(self, question: Question) -> Shown:
        # the options of a document come one behind the other; a document is decoded once for them
        name = (question.task, question.split, question.doc_id, id(question.doc_to_visual))
        if self._last is None or self._last[0] != name:
            images = self.pictures(question)
            keys = tuple(content_key(image) for image in images)
            self._last = (name, Shown(keys, tuple(shape_of(image) for image in images)))
        return self._last[1]


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
