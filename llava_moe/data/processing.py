"""The processor of a checkpoint: tokenizer, image processor, template and image mode, saved and loaded as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.llava.processing_llava import LlavaProcessor

from llava_moe.data.conversation import SegmentTokenizer, TextEncoder
from llava_moe.data.image import IMAGE_MODES
from llava_moe.data.schema import DataError, Turn
from llava_moe.data.templates import TEMPLATES

_Nested = TypeVar("_Nested")


class LlavaMoeProcessor(LlavaProcessor):
    """LLaVA's processor that also knows its conversation template and its image mode.

    Both are part of `processor_config.json`: a model scored with another template than it was trained with is the most
    common silent fault of LLaVA checkpoints. Image processors are always the PIL ones, because the torchvision ones
    differ by enough to change borderline answers.

    Args:
        template: a name in `TEMPLATES`.
        template_options: options of that template, see its `Config`.
        image_mode: a name in `IMAGE_MODES`.
        (the others as in `LlavaProcessor`)

    Raises:
        DataError: a part is missing or does not fit the others.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        template: str = "chat_template",
        image_mode: str = "square",
        template_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_parts(image_processor, tokenizer, patch_size, vision_feature_select_strategy, image_token)
        if chat_template is not None:
            # a processor's chat template knows images; the language model's own, where both exist, does not
            tokenizer.chat_template = chat_template
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        IMAGE_MODES.get(image_mode)
        self.template = template
        self.template_options = dict(template_options or {})
        self.image_mode = image_mode
        self._built: tuple[tuple[str, dict[str, Any]], TextEncoder] | None = None
        self._image_shape: tuple[int, int, int] | None = None
        self.text_encoder  # noqa: B018  a template that does not fit the tokenizer is refused now, not at the first sample

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> LlavaMoeProcessor:
        """As in transformers, with the PIL image processor.

        `template=`, `template_options=` and `image_mode=` override what was saved. Another template does not inherit
        the options of the saved one.
        """
        names = ("template", "template_options", "image_mode")
        own: dict[str, Any] = {key: kwargs.pop(key) for key in names if key in kwargs}
        processor_dict, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "template" in own and own["template"] != processor_dict.get("template"):
            own.setdefault("template_options", {})
        image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls.from_args_and_dict([image_processor, tokenizer], {**processor_dict, **own})

    def to_dict(self) -> dict[str, Any]:
        """The content of processor_config.json; the stock method would deep-copy the tokenizer inside the encoder."""
        built, self._built = self._built, None
        try:
            return super().to_dict()
        finally:
            self._built = built

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder of the present template; rebuilt after `template` or `template_options` was changed."""
        wanted = (self.template, dict(self.template_options))
        if self._built is None or self._built[0] != wanted:
            template = TEMPLATES.get(self.template)(self.tokenizer, self.template_options)
            segments = SegmentTokenizer(self.tokenizer, self.image_token, self.image_token_id)
            self._built = (wanted, TextEncoder(template, segments))
        return self._built[1]

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end an answer."""
        return self.text_encoder.stop_token_ids

    @property
    def stop_strings(self) -> list[str]:
        """Texts that end an answer without being a token of their own; `generate(stop_strings=..., tokenizer=...)`."""
        return self.text_encoder.stop_strings

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of a processed image; the same for every image."""
        if self._image_shape is None:
            # two shapes, so that a processor that keeps the aspect ratio is found out
            probes = [Image.new("RGB", size) for size in ((48, 32), (32, 48))]
            shapes = {
                tuple(self.image_processor(probe, return_tensors="pt")["pixel_values"].shape[1:]) for probe in probes
            }
            shape = shapes.pop()
            if shapes or len(shape) != 3 or shape[0] != 3:
                raise DataError(
                    f"the image processor ({type(self.image_processor).__name__}) gives images of the shapes "
                    f"{sorted({shape, *shapes})}, not of one shape (3, H, W); set its size (and crop_size) to a fixed "
                    "square"
                )
            self._image_shape = shape
        return self._image_shape

    @property
    def num_image_tokens(self) -> int:
        """Placeholders for each image: patches + additional tokens, less the class token under strategy "default"."""
        _, height, width = self.image_shape
        num_tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return num_tokens - 1 if self.vision_feature_select_strategy == "default" else num_tokens

    def encode_text(self, turns: Sequence[Turn], num_images: int) -> dict[str, torch.Tensor]:
        """A training sequence without its pixels.

        Returns:
            input_ids (S,) with `num_image_tokens` placeholders for each image, labels (S,) with -100 off the answers.
            The length is not limited; that is the data set's policy.
        """
        ids, labels = self.text_encoder.encode(turns, num_images, self.num_image_tokens, mode="train")
        return {"input_ids": torch.tensor(ids, dtype=torch.long), "labels": torch.tensor(labels, dtype=torch.long)}

    def max_encoded_length(self, turns: Sequence[Turn], num_images: int) -> int:
        """An upper bound for the length of `encode_text`, without tokenising; checks the template on the way."""
        return self.text_encoder.max_length(turns, num_images, self.num_image_tokens)

    def answer_start(self, turns: Sequence[Turn]) -> int:
        """Where the first answer begins in the ids of `encode_text`; shorter cuts leave nothing to learn."""
        return self.text_encoder.answer_start(turns, self.num_image_tokens)

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images through the image mode and the image processor: (n, 3, H, W) float32."""
        pixel_values = self.image_processor(self._shaped(list(images)), return_tensors="pt")["pixel_values"]
        if tuple(pixel_values.shape) != (len(images), *self.image_shape):
            raise DataError(
                f"the image processor gave {tuple(pixel_values.shape)} for {len(images)} image(s), expected "
                f"{(len(images), *self.image_shape)}; set its size (and crop_size) to a fixed square"
            )
        return pixel_values.to(torch.float32)

    def encode_sample(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """A training sequence: input_ids (S,), labels (S,), and pixel_values (n, 3, H, W) if there are images."""
        encoded = self.encode_text(turns, len(images))
        return {**encoded, "pixel_values": self.encode_images(images)} if images else encoded

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """A prompt that ends with the header of the answer: input_ids (S,), and pixel_values (n, 3, H, W) if any.

        Its ids are those of the training sequence up to the answer.
        """
        ids, _ = self.text_encoder.encode(turns, len(images), self.num_image_tokens, mode="generate")
        encoded = {"input_ids": torch.tensor(ids, dtype=torch.long)}
        return {**encoded, "pixel_values": self.encode_images(images)} if images else encoded

    def pad_prompts(self, prompts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Batches results of `encode_prompt` for generation.

        Returns:
            input_ids and attention_mask (B, S), padded on the left, and pixel_values (sum of n, 3, H, W) if any.
        """
        if not prompts:
            raise DataError("pad_prompts was given no prompts")
        pad_id = self.pad_token_id
        length = max(len(prompt["input_ids"]) for prompt in prompts)
        input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            start = length - len(prompt["input_ids"])
            input_ids[row, start:] = prompt["input_ids"]
            attention_mask[row, start:] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        pixels = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
        return {**batch, "pixel_values": torch.cat(pixels)} if pixels else batch

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding id."""
        if self.tokenizer.pad_token_id is None:
            raise DataError(
                "the tokenizer has no pad_token; set it (for Llama: the unk_token) and save the processor again"
            )
        return int(self.tokenizer.pad_token_id)

    def prepare_inputs_layout(  # type: ignore[override]
        self, images: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Hook of the stock `__call__`: images go through the image mode there too."""
        images, text, videos, audio = super().prepare_inputs_layout(images=images, **kwargs)
        return self._shaped(images), text, videos, audio

    def _shaped(self, images: _Nested) -> _Nested:
        if images is None or self.image_mode == "square":
            return images
        if isinstance(images, (list, tuple)):
            return [self._shaped(image) for image in images]  # type: ignore[return-value]
        if not isinstance(images, Image.Image):
            raise DataError(f"image mode {self.image_mode!r} needs PIL images, found {type(images).__name__}")
        return IMAGE_MODES.get(self.image_mode)(images.convert("RGB"), self.image_processor.image_mean)  # type: ignore


def _check_parts(image_processor: Any, tokenizer: Any, patch_size: Any, strategy: Any, image_token: str) -> None:
    if image_processor is None or tokenizer is None:
        raise DataError("a LlavaMoeProcessor needs an image_processor and a tokenizer")
    if getattr(image_processor, "backend", "pil") != "pil":
        raise DataError(
            f"{type(image_processor).__name__} uses the {image_processor.backend} backend; use its PIL twin "
            "(AutoImageProcessor.from_pretrained(..., backend='pil')), which gives the same pixels on every machine"
        )
    if not isinstance(patch_size, int) or strategy not in ("default", "full"):
        raise DataError(
            f"patch_size is {patch_size!r} and vision_feature_select_strategy {strategy!r}; set both in "
            "processor_config.json to the vision tower's patch size and to 'default' or 'full' as in config.json"
        )
    token = getattr(tokenizer, "image_token", None) or image_token
    if len(tokenizer.encode(token, add_special_tokens=False)) != 1 or token not in tokenizer.get_vocab():
        raise DataError(f"the tokenizer has no image token {token!r}; add it with add_special_tokens before assembling")


def load_processor(
    path: str | Path,
    *,
    template: str | None = None,
    image_mode: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> LlavaMoeProcessor:
    """Loads the processor of a checkpoint directory: one of ours, or a stock llava-hf one.

    A stock checkpoint says nothing about templates; the chat template it ships is used.

    Args:
        path: a directory on disk.
        template: replaces the saved template.
        image_mode: replaces the saved image mode.
        template_options: replace the saved options of the template.

    Raises:
        DataError: the directory or a file in it is missing, or the parts do not fit each other.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a directory; give a checkpoint directory with a processor and a tokenizer")
    if not any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise DataError(
            f"{path} holds no processor_config.json or preprocessor_config.json; give a vision-language checkpoint, "
            "not a language model or a training output without processor"
        )
    if not any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        raise DataError(
            f"{path} holds no tokenizer (tokenizer_config.json); copy the tokenizer files of its language model"
        )
    own = {"template": template, "image_mode": image_mode, "template_options": template_options}
    try:
        return LlavaMoeProcessor.from_pretrained(
            path, local_files_only=True, **{key: value for key, value in own.items() if value is not None}
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: the processor cannot be loaded; {error}") from error
