"""A stage: which parts of the model learn, and at which rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava_moe.config import StageSection
from llava_moe.model.sites import num_used_layers
from llava_moe.registry import near_misses

# First match wins; every parameter of a model belongs to exactly one part.
# Routers and experts come first: wherever they sit, in decoder, tower or projector, they have rates of their own.
_PARTS: dict[str, tuple[str, ...]] = {
    "router": (".router.",),
    "experts": (".experts.", ".shared.", ".side."),
    "vision_tower": (".vision_tower.",),
    "projector": (".multi_modal_projector.",),
    "embeddings": (".embed_tokens.", "lm_head."),
    "decoder": (".language_model.",),
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to.

    Raises:
        ValueError: no part claims the parameter.
    """
    for part, fragments in _PARTS.items():
        if any(fragment in name for fragment in fragments):
            return part
    raise ValueError(f"parameter {name} belongs to no known part ({', '.join(_PARTS)})")


def apply_stage(model: nn.Module, stage: StageSection) -> list[dict[str, Any]]:
    """Freezes what the stage does not name, and returns the optimiser's parameter groups.

    Biases and norms (fewer than two dimensions) get no weight decay.

    Raises:
        ValueError: the stage names an unknown part, a part that this model does not have, or none at all.
    """
    for part in stage.learning_rates:
        if part not in _PARTS:
            raise ValueError(f"stage.learning_rates has no part {part!r}; {near_misses(part, list(_PARTS))}")
    if not stage.learning_rates:
        raise ValueError(f"stage {stage.name}: learning_rates is empty, so nothing would learn")
    unused = _unused_tower_parameters(model)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in _PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # The base under LoRA or MoV experts stays as it is: that is what makes the method.
        learns = part in stage.learning_rates and name not in unused and ".experts.base_" not in name
        parameter.requires_grad_(learns)
        members[part].append((name, parameter))
    absent = [part for part in stage.learning_rates if not members[part]]
    if absent:
        raise ValueError(
            f"stage {stage.name} trains {', '.join(absent)}, which this checkpoint does not have (it has "
            f"{', '.join(p for p, m in members.items() if m)}); is the start point of the right kind?"
        )
    return [group for part, rate in stage.learning_rates.items() for group in _groups(members[part], rate, stage)]


def _groups(members: list[tuple[str, nn.Parameter]], rate: float, stage: StageSection) -> list[dict[str, Any]]:
    trainable = [p for _, p in members if p.requires_grad]

    # ds_shape is the full shape of a parameter that ZeRO-3 has partitioned away
    def dims(p: nn.Parameter) -> int:
        return len(getattr(p, "ds_shape", p.shape))

    decayed = {"params": [p for p in trainable if dims(p) >= 2], "lr": rate, "weight_decay": stage.weight_decay}
    plain = {"params": [p for p in trainable if dims(p) < 2], "lr": rate, "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def _unused_tower_parameters(model: nn.Module) -> set[str]:
    """Parameters of the tower behind the selected feature layer; they would never get a gradient."""
    config: Any = model.config
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        return set()
    prefix = "model.vision_tower."
    tower = model.get_submodule("model.vision_tower")
    blocks = next((m for n, m in tower.named_modules() if n.endswith(("encoder.layers", "encoder.layer"))), None)
    names = {prefix + n for n, _ in tower.named_parameters() if "post_layernorm" in n or ".head." in n}
    if isinstance(blocks, nn.ModuleList):
        used = num_used_layers(len(blocks), layer)
        for index, block in enumerate(blocks):
            if index >= used:
                block_ids = {id(p) for p in block.parameters()}
                names |= {prefix + n for n, p in tower.named_parameters() if id(p) in block_ids}
    return names


def count_trainable(model: nn.Module) -> int:
    """Number of values that the optimiser updates."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad)


def resolve_bf16(value: Any) -> bool:
    """`auto` is true where the hardware multiplies bfloat16 natively.

    Raises:
        ValueError: the value is neither a boolean nor `auto`.
    """
    if isinstance(value, bool):
        return value
    if value != "auto":
        raise ValueError(f"train.bf16={value!r}: must be true, false or auto")
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
