"""Spares the layers of a tower that lie behind the selected features.

The parameters stay where they are, so a checkpoint keeps every name of the stock one, loads as strictly as before and
is read by other programs; only the work is not done. (Cutting the layers off would leave files that stock LLaVA
classes call incomplete.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llava_moe.model.sites import num_used_layers

# Layers that take and return the hidden states alone, and the lists that hold them.
_LAYERS = frozenset(
    {"SiglipEncoderLayer", "Siglip2EncoderLayer", "CLIPEncoderLayer", "Dinov2Layer", "Dinov2WithRegistersLayer"}
)


def skip_unused_layers(tower: nn.Module, feature_layer: int | list[int]) -> int:
    """Lets the layers behind the features return their input; called inside the model's `__init__`.

    `hidden_states` keeps its length, so indices from either end mean what they meant; entries behind the features
    repeat them. Towers of other classes (timm, fused, multi-scale) choose their layer themselves and are left alone.

    Args:
        tower: of transformers.
        feature_layer: index into `hidden_states`, or several.

    Returns:
        How many layers are spared.
    """
    layers = _tower_layers(tower)
    if layers is None:
        return 0
    unused = layers[num_used_layers(len(layers), feature_layer) :]
    for layer in unused:
        layer.forward = _unchanged
    return len(unused)


def check_computed(tower: nn.Module, feature_layer: int | list[int]) -> None:
    """Raises ValueError when features are asked for whose layers were spared when the model was made."""
    layers = _tower_layers(tower)
    if layers is None:
        return
    computed = sum(vars(layer).get("forward") is not _unchanged for layer in layers)
    if num_used_layers(len(layers), feature_layer) > computed:
        raise ValueError(
            f"vision_feature_layer={feature_layer}: the model was made with an earlier one and computes {computed} of "
            f"{len(layers)} layers of its tower; set it in config.json and load the model again"
        )


def _tower_layers(tower: nn.Module) -> Any:
    """The list of layers of a known tower, or None."""
    encoder = getattr(tower, "encoder", None)
    for name in ("layers", "layer"):
        layers = getattr(encoder, name, None)
        if isinstance(layers, nn.ModuleList) and all(type(layer).__name__ in _LAYERS for layer in layers):
            return layers
    return None


def _unchanged(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
