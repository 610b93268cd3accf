"""Vision towers that transformers does not have by itself: any timm model whose feature grid stands for patches.

SigLIP, CLIP and DINOv2 towers are transformers' own classes and need nothing here; all kinds have the same interface
(`pixel_values` in, `hidden_states` out), so the rest of the model does not know which one it holds.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


@strict
class TimmTowerConfig(PretrainedConfig):  # type: ignore[misc]  # transformers types it as Any
    """A timm backbone as a tower.

    Attributes:
        architecture: a timm model name.
        image_size: side of the square input in pixels.
        patch_size: pixels per grid cell, the stride of the final feature map.
        hidden_size: channels C of the grid.
        feature_norm: normalise every feature vector to mean 0 and variance 1; CNN features after a ReLU are sparse,
            positive and of very unequal scale, which a projector learns slowly from.
        layer: the block (vision transformer) or stage (convolutions) of timm's whose output is read; those behind it
            are not computed. None reads the final features, behind the last norm.
    """

    model_type = "llava_moe_timm"

    architecture: str = "tf_efficientnet_lite0"
    image_size: int = 128
    patch_size: int = 32
    hidden_size: int = 1280
    feature_norm: bool = True
    layer: int | None = None


class TimmTower(PreTrainedModel):  # type: ignore[misc]  # transformers types it as Any
    """(B, 3, H, W) pixels to (B, N, C) features, N = (H / patch) * (W / patch), row-major."""

    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "backbone"
    # timm chooses its own attention; whatever is asked of the decoder must not stop at the tower.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: TimmTowerConfig) -> None:
        super().__init__(config)
        self.backbone: Any = timm.create_model(config.architecture, pretrained=False, num_classes=0, global_pool="")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """timm initialises its own modules."""

    def train(self, mode: bool = True) -> TimmTower:
        # Batch statistics of a few composed pictures would wreck the running averages: the tower's norms stay frozen.
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Any = None, return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Computes the final grid; `hidden_states` has one entry, so only the feature layer -1 exists."""
        # channels_last makes the convolutions of this tower 1.5 times faster on a CPU, with the weights as they are
        features = self._features(pixel_values.contiguous(memory_format=torch.channels_last))
        if self.config.feature_norm:
            features = F.layer_norm(features.float(), features.shape[-1:]).to(features.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))

    def _features(self, pixels: Tensor) -> Tensor:
        if self.config.layer is not None:
            grids = self.backbone.forward_intermediates(
                pixels, indices=[self.config.layer], stop_early=True, intermediates_only=True, output_fmt="NCHW"
            )
            return grids[0].flatten(2).transpose(1, 2)
        grid = self.backbone.forward_features(pixels)
        if grid.ndim == 3:
            return grid[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":  # Swin and its like
            return grid.flatten(1, 2)
        return grid.flatten(2).transpose(1, 2)


def timm_tower_config(
    architecture: str, image_size: int, feature_norm: bool = True, layer: int | None = None
) -> TimmTowerConfig:
    """Finds patch size and channels of a timm model by looking at the shape of what it returns.

    Raises:
        ValueError: timm does not know the architecture, it has no such layer, it takes no pictures of the size, or the
            image size is no multiple of its stride.
    """
    if architecture not in timm.list_models():
        near = timm.list_models(f"*{architecture.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {architecture!r}; similar names: {', '.join(near) or 'none'}")
    config = TimmTowerConfig(architecture=architecture, image_size=image_size, feature_norm=feature_norm, layer=layer)
    with torch.device("meta"), torch.no_grad():  # shapes alone: a large model would take minutes and gigabytes
        tower = TimmTower(config).eval()
        _check_layer(tower, layer)
        try:
            features = tower(torch.zeros(1, 3, image_size, image_size)).last_hidden_state
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            raise ValueError(f"timm:{architecture} takes no pictures of {image_size} px: {reason}") from error
    side = round(features.shape[1] ** 0.5)
    if side * side != features.shape[1] or image_size % side:
        raise ValueError(
            f"{architecture} gives {features.shape[1]} features for {image_size} px, which is no square grid of whole "
            "patches; choose an image size that is a multiple of its stride"
        )
    config.patch_size = image_size // side
    config.hidden_size = features.shape[-1]
    return config


def _check_layer(tower: TimmTower, layer: int | None) -> None:
    """Raises ValueError when the timm model does not let a layer be read, or has no such one."""
    if layer is None:
        return
    where = f"model.vision_tower=timm:{tower.config.architecture}@{layer}"
    if not hasattr(tower.backbone, "forward_intermediates"):
        raise ValueError(f"{where}: timm reads no inner layers of this model; leave out @{layer}")
    count = len(tower.backbone.feature_info)
    if not -count <= layer < count:
        raise ValueError(f"{where}: it has the layers 0 to {count - 1}, or -{count} to -1")
