"""LLaVA-NeXT and LLaVA-OneVision: images as tiles, videos as frames, one sequence for each.

Both are the stock classes with the same mixins as LLaVA, and with one forward for the visuals of both: tower and
projector see single tiles, and `llava_moe.model.merge` makes the sequences. What a tile is was decided by the processor
(`num_tiles`); called with the stock inputs alone, the models decide it as the stock classes do.

Sizes are (height, width) as in transformers, and Python numbers: they decide shapes, and a GPU would have to be waited
for. Suffixes: T tiles and frames of all visuals, N features of one, C channels of the tower, D width of the decoder,
M tokens of a visual.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from llava_moe.model.configuration import LlavaNextMoeConfig, LlavaOnevisionMoeConfig
from llava_moe.model.head import vocabulary_projection
from llava_moe.model.merge import frame_rule, merge_images, merge_rule, merge_video, pool_frames, tile_grid
from llava_moe.model.modeling import MoeMixin, MoeModelMixin
from llava_moe.model.projectors import PROJECTORS

_VISUALS = ("image_sizes", "num_tiles", "is_video", "batch_num_images")
_CHOICES = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
Numbers = Sequence[Any] | Tensor


def _listed(values: Numbers | None) -> Any:
    """Python numbers; a tensor on a GPU is waited for."""
    return values.tolist() if isinstance(values, Tensor) else values


class TiledModelMixin(MoeModelMixin):
    """An inner model whose images come as tiles. The newline vector exists only where the merge has newlines."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rule = merge_rule(config)
        if rule.merge != "flat" and not PROJECTORS.get(config.projector).keeps_grid:
            raise ValueError(
                f"config.json: the embeddings of projector {config.projector!r} are no grid, and merge {rule.merge!r} "
                "puts the grids of all tiles together; use merge flat or another projector"
            )
        if not rule.has_newline:
            self.image_newline = None

    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        image_sizes: Numbers | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        num_tiles: Numbers | None = None,
        is_video: Numbers | None = None,
        batch_num_images: Numbers | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The sequence of every visual, in the order of their markers, as `pooler_output` of shapes (M, D).

        Args:
            pixel_values: (T, 3, H, W), the tiles of one visual after another; (visuals, most tiles, 3, H, W) padded, as
                stock processors give them; or (T, N, C), features of the tower.
            image_sizes: (height, width) of every visual in pixels.
            num_tiles: of every visual; None: as the stock class decides, from the size, and one tile for each image
                of a sample with several if `batch_num_images` is given.
            is_video: for every visual; its tiles are frames then.
            batch_num_images: visuals of every sample.
            vision_feature_layer, vision_feature_select_strategy, vision_aspect_ratio: in the place of the config's.

        Raises:
            ValueError: sizes are missing, or the numbers do not fit each other.
        """
        sizes, counts, videos = _listed(image_sizes), _listed(num_tiles), _listed(is_video)
        if sizes is None:
            raise ValueError("image_sizes is missing: a model with tiles must know the (height, width) of every image")
        if counts is None:
            counts = self._stock_counts(sizes, _listed(batch_num_images))
        if pixel_values.ndim == 5:
            pixel_values = torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts, strict=True)])
        if sum(counts) != pixel_values.shape[0] or len(counts) != len(sizes):
            raise ValueError(
                f"{pixel_values.shape[0]} pictures for {len(sizes)} sizes and num_tiles={counts}, which must be one "
                "number for each size and sum to the pictures"
            )
        found = self.picture_features(
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )
        merged = self._merged(found.pooler_output, counts, sizes, videos, vision_aspect_ratio)
        found.pooler_output = merged  # type: ignore[assignment]  # a list, as stock code has it
        return found

    def _stock_counts(self, sizes: Sequence[Any], batch_num_images: Sequence[int] | None) -> list[int]:
        numbers = [1] * len(sizes) if batch_num_images is None else batch_num_images
        alone = [number == 1 for number in numbers for _ in range(number)]
        tile, grids = int(self.config.vision_config.image_size), self.config.image_grid_pinpoints
        counts = []
        for size, is_cut in zip(sizes, alone, strict=True):
            rows, cols = tile_grid(size, grids, tile) if is_cut else (0, 0)
            counts.append(1 + rows * cols)
        return counts

    def _merged(
        self, features: Any, counts: list[int], sizes: Any, videos: Sequence[bool] | None, ratio: str | None
    ) -> list[Tensor]:
        """features: (N, D) of every picture."""
        rule, frames = merge_rule(self.config, ratio), frame_rule(self.config)
        pictures = iter(features)
        of_visuals = [torch.stack(list(itertools.islice(pictures, count))) for count in counts]
        tile, grids = int(self.config.vision_config.image_size), self.config.image_grid_pinpoints
        merged = []
        for index, (features_TND, size) in enumerate(zip(of_visuals, sizes, strict=True)):
            if videos is not None and videos[index]:
                pooled_TND = pool_frames(features_TND, frames.stride, frames.mode)
                newline = None if frames.newline == "none" else self.image_newline
                merged.append(merge_video(pooled_TND, frames.newline, newline))
            else:
                merged += merge_images([features_TND], [size], grids, tile, rule, self.image_newline)
        return merged

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward; the visuals are encoded here, with the inputs that the stock one does not know.

        Raises:
            ValueError: pixels are given together with what they were encoded to.
        """
        encoded = dict(mm_encoder_outputs or {})
        visuals = {key: kwargs.pop(key, None) for key in _VISUALS}
        choices = {key: kwargs.pop(key, None) for key in _CHOICES}
        if pixel_values is not None:
            if encoded.get("image") is not None:
                raise ValueError("give pixel_values or mm_encoder_outputs, not both")
            encoded["image"] = self.get_image_features(pixel_values, **visuals, **choices, return_dict=True)
        videos = kwargs.pop("pixel_values_videos", None)
        if videos is not None:
            del choices["vision_aspect_ratio"]
            encoded["video"] = self.get_video_features(videos, **choices, return_dict=True)
        return super().forward(input_ids=input_ids, mm_encoder_outputs=encoded, **kwargs)


class LlavaNextMoeModel(TiledModelMixin, LlavaNextModel):  # type: ignore[misc]  # transformers types it as Any
    """LLaVA-NeXT's inner model."""


class LlavaOnevisionMoeModel(TiledModelMixin, LlavaOnevisionModel):  # type: ignore[misc]
    """LLaVA-OneVision's inner model."""

    def get_placeholder_mask(  # type: ignore[override]  # stock classes differ in it among themselves
        self, input_ids: Any, inputs_embeds: Tensor, **features: Any
    ) -> Any:
        """As in `MoeModelMixin`; the stock class returns a second mask, of its own kind of videos."""
        if features.get("image_features") is not None and self._is_dummy(input_ids):
            nothing = torch.zeros_like(input_ids, dtype=torch.bool).unsqueeze(-1)
            return nothing, nothing
        return LlavaOnevisionModel.get_placeholder_mask(self, input_ids, inputs_embeds=inputs_embeds, **features)


class LlavaNextMoeForConditionalGeneration(MoeMixin, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-NeXT (LLaVA-1.6), dense or sparse; with grids, merges and videos that the stock class does not have."""

    config_class = LlavaNextMoeConfig
    extra_inputs: ClassVar[tuple[str, ...]] = _VISUALS

    def __init__(self, config: LlavaNextMoeConfig) -> None:
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = LlavaNextMoeModel(config)
        self.lm_head = vocabulary_projection(config)
        self.post_init()


class LlavaOnevisionMoeForConditionalGeneration(  # type: ignore[misc]
    MoeMixin, LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision (2408.03326), dense or sparse."""

    config_class = LlavaOnevisionMoeConfig
    extra_inputs: ClassVar[tuple[str, ...]] = _VISUALS

    def __init__(self, config: LlavaOnevisionMoeConfig) -> None:
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = LlavaOnevisionMoeModel(config)
        self.lm_head = vocabulary_projection(config)
        self.post_init()
