"""The processor of a checkpoint: tokenizer, image processor, template and image mode, saved and loaded as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.llava.processing_llava import LlavaProcessor

from llava_moe.data.conversation import ImageTokens, SegmentTokenizer, TextEncoder
from llava_moe.data.image import IMAGE_MODES
from llava_moe.data.processor_parts import (
    build_tiling,
    check_directory,
    check_mode,
    check_parts,
    plain_image_processor,
    stock_settings,
)
from llava_moe.data.schema import IMAGE_MARKER, DataError, Turn
from llava_moe.data.templates import TEMPLATES
from llava_moe.data.visuals import (
    Shape,
    TilePlanner,
    Visual,
    frames_of,
    join_visuals,
    plan_entries,
    shape_of,
)

DEFAULT_NUM_FRAMES = 8
_Nested = TypeVar("_Nested")


class LlavaMoeProcessor(LlavaProcessor):
    """LLaVA's processor that also knows its conversation template and its image mode.

    Both are part of `processor_config.json`: a model scored with another template than it was trained with is the most
    common silent fault of LLaVA checkpoints. Image processors are always the PIL ones, because the torchvision ones
    differ by enough to change borderline answers.

    Args:
        template: a name in `TEMPLATES`.
        template_options: options of that template, see its `Config`.
        image_mode: a name in `IMAGE_MODES`; for a model with tiles also "anyres" or "anyres_max_N".
        tiling: grids and merge of a model with tiles, see `llava_moe.data.tiled_processor`; None for other models.
        num_frames: so many frames of a video are shown at most.
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
        tiling: Mapping[str, Any] | None = None,
        num_frames: int = DEFAULT_NUM_FRAMES,
        **kwargs: Any,
    ) -> None:
        check_parts(image_processor, tokenizer, patch_size, vision_feature_select_strategy, image_token)
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
        check_mode(image_mode, tiling, num_frames)
        self.template = template
        self.template_options = dict(template_options or {})
        self.image_mode = image_mode
        self.tiling = None if tiling is None else dict(tiling)
        self.num_frames = num_frames
        self._built: tuple[tuple[str, dict[str, Any]], TextEncoder] | None = None
        self._image_shape: tuple[int, int, int] | None = None
        self._planner: TilePlanner | None = None
        self.text_encoder  # noqa: B018  a template that does not fit the tokenizer is refused now, not at the first sample
        self.planner  # noqa: B018  likewise grids that do not fit the tiles

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> LlavaMoeProcessor:
        """As in transformers, with the PIL image processor; a stock LLaVA-NeXT or LLaVA-OneVision one becomes ours.

        `template=`, `template_options=`, `image_mode=`, `tiling=` and `num_frames=` override what was saved. Another
        template does not inherit the options of the saved one; keys of `tiling` replace the saved ones.
        """
        names = ("template", "template_options", "image_mode", "num_frames")
        own: dict[str, Any] = {key: kwargs.pop(key) for key in names if key in kwargs}
        tiling = kwargs.pop("tiling", None)
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "template" in own and own["template"] != saved.get("template"):
            own.setdefault("template_options", {})
        image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kwargs)
        saved = {**saved, **stock_settings(Path(pretrained_model_name_or_path), saved, image_processor)}
        if tiling is not None:
            if saved.get("tiling") is None:
                raise DataError("tiling is given, but this checkpoint's model has no tiles; assemble one that has")
            own["tiling"] = {**saved["tiling"], **tiling}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls.from_args_and_dict([plain_image_processor(image_processor), tokenizer], {**saved, **own})

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
    def planner(self) -> TilePlanner | None:
        """How images are cut; None for a model without tiles."""
        if self.tiling is None:
            return None
        if self._planner is None:
            tiling = build_tiling(self.tiling, self.image_mode, self.image_shape[1], self.num_image_tokens)
            self._planner = TilePlanner(self.image_mode, tiling)
        return self._planner

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
        """(3, H, W) of a processed image; the same for every image, and for every tile."""
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
        """Placeholders for each image, or tokens of each tile: patches + additional tokens, less the class token.

        The class token is taken off under strategy "default".
        """
        _, height, width = self.image_shape
        num_tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return num_tokens - 1 if self.vision_feature_select_strategy == "default" else num_tokens

    def image_tokens(self, shapes: Sequence[Shape]) -> list[int]:
        """Placeholders for each visual of a sample, from (height, width) of images and numbers of frames of videos."""
        if self.planner is not None:
            return [plan.num_tokens for plan in self.planner.plan(shapes)]
        return [self.num_image_tokens * (shape if isinstance(shape, int) else 1) for shape in shapes]

    def encode_text(
        self, turns: Sequence[Turn], num_images: int, image_tokens: ImageTokens | None = None
    ) -> dict[str, torch.Tensor]:
        """A training sequence without its pixels.

        Args:
            turns: with one marker for each visual.
            num_images: how many visuals there are.
            image_tokens: of `image_tokens`; not needed where all images have `num_image_tokens`.

        Returns:
            input_ids (S,) with the placeholders, labels (S,) with -100 off the answers. The length is not limited; that
            is the data set's policy.
        """
        counts = self._counts(num_images, image_tokens)
        ids, labels = self.text_encoder.encode(turns, num_images, counts, mode="train")
        return {"input_ids": torch.tensor(ids, dtype=torch.long), "labels": torch.tensor(labels, dtype=torch.long)}

    def max_encoded_length(
        self, turns: Sequence[Turn], num_images: int, image_tokens: ImageTokens | None = None
    ) -> int:
        """An upper bound for the length of `encode_text`, without tokenising; checks the template on the way."""
        return self.text_encoder.max_length(turns, num_images, self._counts(num_images, image_tokens))

    def answer_start(self, turns: Sequence[Turn], image_tokens: ImageTokens | None = None) -> int:
        """Where the first answer begins in the ids of `encode_text`; shorter cuts leave nothing to learn."""
        num_images = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
        return self.text_encoder.answer_start(turns, self._counts(num_images, image_tokens))

    def _counts(self, num_images: int, image_tokens: ImageTokens | None) -> ImageTokens:
        if image_tokens is not None:
            return image_tokens
        if self.tiling is not None and num_images:
            raise DataError("images are cut into tiles and differ in their tokens; give the numbers of image_tokens()")
        return self.num_image_tokens

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images through the image mode and the image processor: (n, 3, H, W) float32; for models without tiles."""
        if self.tiling is not None:
            raise DataError("images are cut into tiles; use encode_visuals()")
        return self._pixels(self._shaped(list(images)))

    def encode_visuals(self, visuals: Sequence[Visual]) -> dict[str, Any]:
        """What the model gets to see of a sample's images and videos; see `llava_moe.data.visuals`.

        Returns:
            pixel_values (n, 3, H, W) float32, and beside it for a model with tiles image_sizes, num_tiles, is_video and
            image_tokens, one entry for each visual. Empty without visuals.

        Raises:
            DataError: a video has no frame, or this checkpoint takes no videos.
        """
        if not visuals:
            return {}
        if self.planner is None:
            return {"pixel_values": self.encode_images([frame for visual in visuals for frame in frames_of(visual)])}
        return self._cut(visuals, self.planner)

    def _cut(self, visuals: Sequence[Visual], planner: TilePlanner) -> dict[str, Any]:
        pictures, plans = planner.cut(visuals, self.image_processor.image_mean)
        return {"pixel_values": self._pixels(pictures), **plan_entries(visuals, plans)}

    def _pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        pixel_values = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        if tuple(pixel_values.shape) != (len(pictures), *self.image_shape):
            raise DataError(
                f"the image processor gave {tuple(pixel_values.shape)} for {len(pictures)} image(s), expected "
                f"{(len(pictures), *self.image_shape)}; set its size (and crop_size) to a fixed square"
            )
        return pixel_values.to(torch.float32)

    def encode_sample(self, turns: Sequence[Turn], visuals: Sequence[Visual]) -> dict[str, Any]:
        """A training sequence: input_ids (S,), labels (S,), and the entries of `encode_visuals`."""
        counts = self.image_tokens([shape_of(visual) for visual in visuals])
        return {**self.encode_text(turns, len(visuals), counts), **self.encode_visuals(visuals)}

    def encode_prompt(self, turns: Sequence[Turn], visuals: Sequence[Visual]) -> dict[str, Any]:
        """A prompt that ends with the header of the answer: input_ids (S,), and the entries of `encode_visuals`.

        Its ids are those of the training sequence up to the answer.
        """
        counts = self.image_tokens([shape_of(visual) for visual in visuals])
        ids, _ = self.text_encoder.encode(turns, len(visuals), counts, mode="generate")
        return {"input_ids": torch.tensor(ids, dtype=torch.long), **self.encode_visuals(visuals)}

    def encode_raw(self, text: str, image: Image.Image) -> dict[str, Any]:
        """Plain text without a template behind an image that is one tile, for programs that only want real tokens.

        Returns:
            The batch of `pad_prompts`, with one row.

        Raises:
            DataError: this is the processor of a model without tiles; call it as a function instead.
        """
        if self.planner is None:
            raise DataError("this checkpoint's model has no tiles; call its processor as a function")
        shown = self._cut([image], dataclasses.replace(self.planner, image_mode="square"))
        count = shown["image_tokens"][0]
        ids = self.tokenizer(f"{self.image_token}\n{text}")["input_ids"]
        expanded = [id for token in ids for id in [token] * (count if token == self.image_token_id else 1)]
        return self.pad_prompts([{"input_ids": torch.tensor(expanded), **shown}])

    def pad_prompts(self, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batches results of `encode_prompt` for generation.

        Returns:
            input_ids and attention_mask (B, S), padded on the left, and the visuals of all prompts if there are any;
            see `llava_moe.data.visuals.join_visuals`.
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
        return {"input_ids": input_ids, "attention_mask": attention_mask, **join_visuals(prompts)}

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
        """Hook of the stock `__call__`: images go through the image mode there too.

        Raises:
            DataError: the model has tiles, whose numbers the stock call does not know.
        """
        if images is not None and self.tiling is not None:
            raise DataError(
                "calling this processor as a function gives every image one number of tokens, but images are cut into "
                "tiles here; use encode_prompt and pad_prompts, or encode_sample"
            )
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


def load_processor(
    path: str | Path,
    *,
    template: str | None = None,
    image_mode: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    tiling: Mapping[str, Any] | None = None,
    num_frames: int | None = None,
) -> LlavaMoeProcessor:
    """Loads the processor of a checkpoint directory: one of ours, or a stock llava-hf one.

    A stock checkpoint says nothing about templates; the chat template it ships is used.

    Args:
        path: a directory on disk.
        template: replaces the saved template.
        image_mode: replaces the saved image mode.
        template_options: replace the saved options of the template.
        tiling: its keys replace those saved, see `llava_moe.data.processor_parts`.
        num_frames: replaces the saved number.

    Raises:
        DataError: the directory or a file in it is missing, or the parts do not fit each other.
    """
    path = Path(path)
    check_directory(path)
    own = {
        "template": template,
        "image_mode": image_mode,
        "template_options": template_options,
        "tiling": tiling,
        "num_frames": num_frames,
    }
    try:
        return LlavaMoeProcessor.from_pretrained(
            path, local_files_only=True, **{key: value for key, value in own.items() if value is not None}
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: the processor cannot be loaded; {error}") from error
