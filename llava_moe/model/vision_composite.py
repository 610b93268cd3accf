"""Towers made of towers: two that see the same picture, and one that sees it at several scales.

Both have the interface of every other tower (`pixel_values` in, `hidden_states` out) and choose the feature layer of
the towers inside themselves: `hidden_states` has one entry, so the recipe says vision_feature_layer=-1 and
vision_feature_select_strategy=full. Tokens beyond the patch grid (class token, registers) are dropped.

Shapes: B pictures, S the side of the patch grid, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_moe.model.vision_skip import skip_unused_layers


@strict
class FusedTowerConfig(PretrainedConfig):  # type: ignore[misc]  # transformers types it as Any
    """Several towers side by side.

    Attributes:
        towers: the config of each, with its model_type.
        feature_layers: the entry of `hidden_states` that is read, of each.
        image_means: channel means that each was trained with; pixels come normalised for the first.
        image_stds: likewise the deviations.
        image_size: side of the input, that of the first tower.
        patch_size: of the first tower.
        hidden_size: channels of all together.
    """

    model_type = "llava_moe_fused"

    towers: list[dict[str, Any]] | None = None
    feature_layers: list[int] | None = None
    image_means: list[list[float]] | None = None
    image_stds: list[list[float]] | None = None
    image_size: int = 384
    patch_size: int = 14
    hidden_size: int = 2176


@strict
class MultiScaleTowerConfig(PretrainedConfig):  # type: ignore[misc]  # transformers types it as Any
    """One tower at several scales.

    Attributes:
        tower: its config, with its model_type.
        feature_layer: the entry of `hidden_states` that is read.
        scales: multiples of the tower's own image size, ascending; 1 is the whole picture.
        image_size: side of the input, that of the largest scale.
        patch_size: side of the input over the side of the grid.
        hidden_size: channels of all scales together.
    """

    model_type = "llava_moe_multi_scale"

    tower: dict[str, Any] | None = None
    feature_layer: int = -2
    scales: list[int] | None = None
    image_size: int = 672
    patch_size: int = 28
    hidden_size: int = 2048


class _CompositeTower(PreTrainedModel):  # type: ignore[misc]  # transformers types it as Any
    """What both kinds share."""

    main_input_name = "pixel_values"
    # The towers inside know which attention they have; what is asked of the decoder must not stop here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        """The towers inside initialise themselves."""


class FusedTower(_CompositeTower):
    """Channels of several towers, cell by cell: SigLIP for meaning, DINOv2 for place (2402.07865, section 4.2).

    (B, 3, H, H) to (B, S * S, C_1 + C_2 + ...). Pixels are normalised anew for each tower, and resized (bicubic) for
    one with another image size.

    Raises:
        ValueError: the grids of the towers differ.
    """

    config_class = FusedTowerConfig

    def __init__(self, config: FusedTowerConfig) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList(AutoModel.from_config(config_of(raw)) for raw in config.towers or [])
        for tower, layer in zip(self.towers, config.feature_layers or [], strict=True):
            skip_unused_layers(tower, layer)
        check_same_grids([tower.config for tower in self.towers])
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Any = None, return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Computes the joined features; `hidden_states` has one entry."""
        features = [
            patch_features(tower, self._pixels_for(index, pixel_values), layer)
            for index, (tower, layer) in enumerate(zip(self.towers, self.config.feature_layers, strict=True))
        ]
        joined = torch.cat(features, dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=joined, hidden_states=(joined,))

    def _pixels_for(self, index: int, pixels: Tensor) -> Tensor:
        means, stds = self.config.image_means, self.config.image_stds
        if (means[index], stds[index]) != (means[0], stds[0]):
            # channel by channel with Python numbers: a tensor of them would be copied to the device every time
            channels = [
                pixels[:, c] * (stds[0][c] / stds[index][c]) + (means[0][c] - means[index][c]) / stds[index][c]
                for c in range(3)
            ]
            pixels = torch.stack(channels, dim=1)
        return resized(pixels, int(self.towers[index].config.image_size))  # type: ignore[union-attr,arg-type]


class MultiScaleTower(_CompositeTower):
    """The tower on the whole picture and on the tiles of larger copies of it (S2, 2403.13043, section 3).

    (B, 3, H, H) to (B, S * S, C * scales). For each scale s: resize to s times the tower's size, cut into s x s tiles,
    run the tower on each, put the grids together and take means back to S x S; the scales are joined by channel. What
    patches leave over at the edge of a picture (6 of 384 pixels with a patch of 14), they leave over of each tile.
    """

    config_class = MultiScaleTowerConfig

    def __init__(self, config: MultiScaleTowerConfig) -> None:
        super().__init__(config)
        self.tower = AutoModel.from_config(config_of(config.tower or {}))
        skip_unused_layers(self.tower, config.feature_layer)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Any = None, return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Computes the joined features; `hidden_states` has one entry."""
        tiles = [self._tiles(pixel_values, scale) for scale in self.config.scales]
        # All scales in one call: experts inside the tower then see, and record, the tokens of the picture once.
        features = patch_features(self.tower, torch.cat(tiles), self.config.feature_layer)
        split = features.split([len(part) for part in tiles])
        grids = [self._grid(part, scale) for part, scale in zip(split, self.config.scales, strict=True)]
        joined = torch.cat(grids, dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=joined, hidden_states=(joined,))

    def _tiles(self, pixels: Tensor, scale: int) -> Tensor:
        """(B * scale * scale, 3, tower's size, tower's size), the tiles of a picture in reading order."""
        size = int(self.tower.config.image_size)
        tiles = resized(pixels, size * scale).unflatten(3, (scale, size)).unflatten(2, (scale, size))
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def _grid(self, features: Tensor, scale: int) -> Tensor:
        """(B, S * S, C): the tiles' features put together and taken back to the tower's own grid."""
        side = grid_of(self.tower.config)
        # (B, tile row, tile column, row, column, C) to (B, C, tile row * row, tile column * column)
        cells = features.unflatten(1, (side, side)).unflatten(0, (-1, scale, scale))
        grid = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return F.avg_pool2d(grid, scale).flatten(2).transpose(1, 2)


def config_of(raw: dict[str, Any]) -> Any:
    """The config of a tower inside, from its dict."""
    return AutoConfig.for_model(**raw)


def grid_of(config: Any) -> int:
    """The side S of a tower's patch grid."""
    return int(config.image_size) // int(config.patch_size)


def check_same_grids(configs: list[Any]) -> None:
    """Raises ValueError when the towers divide a picture into different grids."""
    sides = {grid_of(config) for config in configs}
    if len(sides) != 1:
        found = ", ".join(
            f"{config.model_type} {config.image_size} px / {config.patch_size} = {grid_of(config)}"
            for config in configs
        )
        raise ValueError(f"fused towers must divide the picture into one grid; found {found}; choose other image sizes")


def patch_features(tower: Any, pixels: Tensor, layer: int) -> Tensor:
    """(B, S * S, C): the selected features without the tokens in front of the patches."""
    # a list of layers: the others are not kept, and where transformers does not know lists it is as good as True
    features: Tensor = tower(pixels, output_hidden_states=[layer]).hidden_states[layer]
    return features[:, features.shape[1] - grid_of(tower.config) ** 2 :]


def resized(pixels: Tensor, size: int) -> Tensor:
    """Square pictures at another size, bicubic and in float32; unchanged where they have it."""
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels.float(), size=(size, size), mode="bicubic", align_corners=False).to(pixels.dtype)


def fused_config(
    towers: list[Any], feature_layers: list[int], means: list[list[float]], stds: list[list[float]]
) -> FusedTowerConfig:
    """The config of several towers side by side, from those of each.

    Raises:
        ValueError: a feature layer does not exist, or the grids differ.
    """
    for config, layer in zip(towers, feature_layers, strict=True):
        _check_layer("fused", config, layer)
    check_same_grids(towers)
    return FusedTowerConfig(
        towers=[_plain(config) for config in towers],
        feature_layers=feature_layers,
        image_means=means,
        image_stds=stds,
        image_size=int(towers[0].image_size),
        patch_size=int(towers[0].patch_size),
        hidden_size=sum(int(config.hidden_size) for config in towers),
    )


def fuse_towers(towers: list[Any], config: FusedTowerConfig) -> FusedTower:
    """One tower from several, with their weights."""
    fused = FusedTower(config)
    for mine, tower in zip(fused.towers, towers, strict=True):
        mine.load_state_dict(tower.state_dict())
    return fused


def multi_scale_config(inner: Any, feature_layer: int, scales: list[int]) -> MultiScaleTowerConfig:
    """The config of a tower at several scales, from its own.

    Raises:
        ValueError: the scales are not ascending whole numbers of at least 1, or the feature layer does not exist.
    """
    if not scales or sorted(set(scales)) != scales or scales[0] < 1:
        raise ValueError(
            f"model.vision_tower=s2: scales {scales} must be ascending numbers of at least 1, as in s2:1,2:"
        )
    _check_layer("s2", inner, feature_layer)
    return MultiScaleTowerConfig(
        tower=_plain(inner),
        feature_layer=feature_layer,
        scales=scales,
        image_size=int(inner.image_size) * scales[-1],
        patch_size=int(inner.patch_size) * scales[-1],
        hidden_size=int(inner.hidden_size) * len(scales),
    )


def scale_tower(tower: Any, config: MultiScaleTowerConfig) -> MultiScaleTower:
    """The same tower at several scales, with its weights."""
    scaled = MultiScaleTower(config)
    scaled.tower.load_state_dict(tower.state_dict())
    return scaled


def _plain(config: Any) -> dict[str, Any]:
    """A config inside another: without what is only true of the files that it came from."""
    of_files = ("_name_or_path", "architectures", "dtype", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in of_files}


def _check_layer(kind: str, config: Any, layer: int) -> None:
    """Raises ValueError when `hidden_states` has no such entry."""
    count = int(config.num_hidden_layers) + 1
    if not -count <= layer < count:
        raise ValueError(
            f"model.vision_tower={kind}: @{layer} of {config.model_type}: it has the feature layers "
            f"0 to {count - 1}, or -{count} to -1"
        )
