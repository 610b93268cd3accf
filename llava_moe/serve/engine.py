"""A loaded checkpoint that answers conversations, word by word; the terminal and the browser are two faces of it."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava_moe.data.image import load_image
from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.data.schema import IMAGE_MARKER, DataError, Turn, place_markers
from llava_moe.model.assemble import load_model
from llava_moe.model.upcycling import count_parameters
from llava_moe.moe import MoELayer
from llava_moe.registry import near_misses

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MAX_NEW_TOKENS = 128


class ChatError(ValueError):
    """A question that cannot be answered as it was put; the message is for the person who asked."""


def user_turn(text: str, num_images: int = 0) -> Turn:
    """A question with one image marker in front for each picture that comes with it.

    Raises:
        ChatError: the text is empty, or spells the marker.
    """
    text = text.strip()
    if not text:
        raise ChatError("there is no question; write one, for example: What is in this picture?")
    if IMAGE_MARKER in text:
        raise ChatError(
            f"the question spells {IMAGE_MARKER}, which marks pictures for the model; attach a picture instead"
        )
    return Turn("user", f"{IMAGE_MARKER}\n" * num_images + text)


def open_picture(path: Path) -> Image.Image:
    """Reads a picture file as RGB.

    Raises:
        ChatError: there is no such file, or it is no readable picture.
    """
    if not path.is_file():
        raise ChatError(f"{path}: no such file")
    try:
        return load_image(path, path.name)
    except DataError as error:
        raise ChatError(f"{path.name} cannot be read as a picture; give a PNG, JPEG or WebP file") from error


@dataclass(frozen=True)
class ModelFacts:
    """What a person should know of the model that answers.

    Attributes:
        num_parameters, num_active: in all, and used for one token.
        moe_layers: decoder layers with experts, of `num_layers`; 0 for a dense model.
        num_experts, experts_per_token: E and k of those layers.
        is_cut: the decoder keeps only some blocks of the language model it was made from.
    """

    name: str
    template: str
    num_parameters: int
    num_active: int
    num_layers: int
    moe_layers: int
    num_experts: int
    experts_per_token: int
    is_cut: bool
    device: str
    dtype: str

    @staticmethod
    def read(model: Any, template: str, name: str) -> ModelFacts:
        """Reads the facts off a loaded model."""
        count = count_parameters(model)
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        num_experts = layers[0].experts.num_experts if layers else 0
        text_config: Any = model.config.text_config
        return ModelFacts(
            name=name,
            template=template,
            num_parameters=count["total"],
            num_active=count["active"],
            num_layers=text_config.num_hidden_layers,
            moe_layers=len(layers),
            num_experts=num_experts,
            experts_per_token=round(layers[0].router.active_experts) if layers else 0,
            is_cut=bool(getattr(text_config, "source_blocks", None)),
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def lines(self) -> list[str]:
        """Short facts for display, the most important first."""
        parameters = f"{_short(self.num_parameters)} parameters"
        if self.moe_layers:
            parameters += f", {_short(self.num_active)} active per token"
            plural = "s" if self.experts_per_token != 1 else ""
            kind = (
                f"{self.num_experts} experts in {self.moe_layers} of {self.num_layers} layers, "
                f"{self.experts_per_token} expert{plural} per token"
            )
        else:
            kind = f"dense, {self.num_layers} layers"
        return [parameters, kind, f"template {self.template}", f"{self.dtype} on {self.device}"]

    def notes(self) -> list[str]:
        """What the model is not, where it could be taken for more than it is."""
        notes = []
        if self.is_cut:
            notes.append(
                f"A demonstration, not a general chat model: its decoder keeps only {self.num_layers} blocks of the "
                "language model it was made from. Ask it what it was trained on."
            )
        if self.template == "plain":
            notes.append(
                "A checkpoint of the caption stage: it takes one picture and one question, and does not read the "
                "question's words."
            )
        return notes


def _short(count: int) -> str:
    for scale, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= scale:
            return f"{count / scale:.1f} {suffix}"
    return str(count)


class _StopWhen(StoppingCriteria):
    """Ends a generation that nobody listens to any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class Engine:
    """One model and its processor. Answers are made one at a time, whoever asks.

    Attributes:
        facts: what to tell people about the model.
    """

    def __init__(self, model: Any, processor: LlavaMoeProcessor, name: str) -> None:
        self.model = model.eval()
        self.processor = processor
        self.facts = ModelFacts.read(model, processor.template, name)
        # The model holds the routing state of the forward at hand, so two generations must not overlap.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | None = None, dtype: torch.dtype | str | None = None) -> Engine:
        """Loads a checkpoint directory.

        Args:
            device: "cpu", "cuda", "cuda:1", ...; by default a GPU if there is one.
            dtype: by default bfloat16 on a GPU and float32 on a CPU.

        Raises:
            ValueError: the directory is no whole checkpoint, or device or dtype do not exist here.
        """
        target = _device(device)
        processor = load_processor(checkpoint)
        model: Any = load_model(checkpoint, dtype=_dtype(dtype, target))
        return cls(model.to(target), processor, _name(Path(checkpoint)))

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image.Image] = (),
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """Answers the last turn.

        Closing the iterator stops the model at the next token.

        Args:
            turns: alternating, from the user's first to the user's last, with one marker for each picture.
            images: the pictures in the order of their markers.
            max_new_tokens: upper limit of the answer's length.
            temperature: 0 always takes the likeliest token.
            top_p: with a temperature, only the likeliest tokens that together reach this probability are drawn.

        Yields:
            The answer so far, each time longer. Nothing at all if the answer is empty.

        Raises:
            ChatError: a setting makes no sense, or the conversation is too long for the model.
            DataError: the conversation does not fit the template or the pictures.
        """
        options = self._options(max_new_tokens, temperature, top_p)
        if self.processor.template == "plain" and (len(turns) != 1 or not images):
            raise ChatError("this checkpoint captions pictures and does nothing else: start a new chat with a picture")
        prompt = self.processor.encode_prompt(place_markers(tuple(turns), len(images), "this chat"), images)
        self._check_length(len(prompt["input_ids"]), max_new_tokens)
        inputs = self._on_device(self.processor.pad_prompts([prompt]))
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failures = threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                with self._lock, torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        **self._ends(),
                        generation_config=options,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_StopWhen(stop)]),
                    )
            except BaseException as error:  # raised again by the caller below
                failures.append(error)
                streamer.end()

        worker = threading.Thread(target=work, name="generate", daemon=True)
        worker.start()
        try:
            yield from _growing(streamer)
        finally:
            stop.set()
            worker.join()
        if failures:
            raise failures[0]

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Tensors where the model is, pictures in its dtype; numbers of tiles stay as they are."""
        return {
            key: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in inputs.items()
        }

    def _ends(self) -> dict[str, Any]:
        """For templates whose end is no token of its own."""
        texts = self.processor.stop_strings
        return {"stop_strings": texts, "tokenizer": self.processor.tokenizer} if texts else {}

    def _options(self, max_new_tokens: int, temperature: float, top_p: float) -> GenerationConfig:
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ChatError(
                f"max_new_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]; "
                f"got {max_new_tokens}, {temperature} and {top_p}"
            )
        # top_k=0: what is drawn depends on top_p alone, not on a default that nobody sees
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.processor.stop_token_ids,
            pad_token_id=self.processor.pad_token_id,
            use_cache=True,
            **{"do_sample": False, **sampling},
        )

    def _check_length(self, prompt_length: int, max_new_tokens: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and prompt_length + max_new_tokens > limit:
            raise ChatError(
                f"the chat is too long for this model: {prompt_length} tokens and up to {max_new_tokens} for the "
                f"answer, but it reads {limit} at most; start a new chat or ask for a shorter answer"
            )


def _growing(pieces: Iterator[str]) -> Iterator[str]:
    """Joins pieces; yields the text without surrounding white space whenever there is more of it."""
    text = shown = ""
    for piece in pieces:
        text += piece
        if text.strip() != shown:
            shown = text.strip()
            yield shown


def _name(checkpoint: Path) -> str:
    """The last two folders of a checkpoint's path that say something: runs/quickstart/moe/model -> quickstart/moe."""
    parts = [part for part in checkpoint.resolve().parts if part != "/"]
    named = parts[:-1] if parts[-1:] == ["model"] and len(parts) > 1 else parts
    return "/".join(named[-2:])


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ChatError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ChatError(f"unknown dtype {dtype!r}; {near_misses(dtype, list(DTYPES))}")
    return DTYPES[dtype]


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model answers, and where it runs."""
    parser.add_argument("checkpoint", help="a checkpoint directory")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
