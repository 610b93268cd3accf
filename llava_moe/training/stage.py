"""A stage: which parts of the model learn, and at which rate."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from llava_moe.config import StageSection
from llava_moe.model.vision_unused import unused_parameters
from llava_moe.moe import MoELayer
from llava_moe.registry import near_misses
from llava_moe.training import distributed

LORA = "lora"
# First match wins; every parameter of a model belongs to exactly one part.
# Routers and experts come first: wherever they sit, in decoder, tower or projector, they have rates of their own.
_PARTS: dict[str, tuple[str, ...]] = {
    LORA: (".lora_A.", ".lora_B."),  # peft's adapters, see training/lora.py
    # Behind ours are the names in decoders that transformers builds with experts, see model/native.py.
    "router": (".router.", ".mlp.gate.", ".block_sparse_moe.gate.", ".feed_forward.gate."),
    "experts": (".experts.", ".shared.", ".side.", ".shared_expert.", ".shared_experts.", ".shared_expert_gate."),
    "vision_tower": (".vision_tower.",),
    "projector": (".multi_modal_projector.", ".image_newline"),
    "embeddings": (".embed_tokens.", "lm_head."),
    "decoder": (".language_model.",),
}
_TOWER = "vision_tower"
_FUSED = re.compile(r"\.vision_tower\.towers\.(\d+)\.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to; fused towers are parts of their own, `vision_tower.0` and so on.

    Raises:
        ValueError: no part claims the parameter.
    """
    for part, fragments in _PARTS.items():
        if any(fragment in name for fragment in fragments):
            number = _FUSED.search(name) if part == _TOWER else None
            return part if number is None else f"{part}.{number[1]}"
    raise ValueError(f"parameter {name} belongs to no known part ({', '.join(_PARTS)})")


def apply_stage(model: nn.Module, stage: StageSection) -> list[dict[str, Any]]:
    """Freezes what the stage does not name, and returns the optimiser's parameter groups.

    `vision_tower` speaks of all fused towers that are not named by themselves. Biases and norms (fewer than two
    dimensions) get no weight decay.

    Raises:
        ValueError: the stage names an unknown part, a part that this model does not have, or none at all.
    """
    rates = stage.learning_rates
    stage.check_decay()
    if not rates:
        raise ValueError(f"stage {stage.name}: learning_rates is empty, so nothing would learn")
    found = list(dict.fromkeys(part_of(name) for name, _ in model.named_parameters()))
    for part in rates:
        if part not in _PARTS and not re.fullmatch(rf"{_TOWER}\.\d+", part):
            known = [*_PARTS, *(p for p in found if p not in _PARTS)]
            raise ValueError(f"stage.learning_rates has no part {part!r}; {near_misses(part, known)}")
    unused = _unused_tower_parameters(model) if any(part.startswith(_TOWER) for part in rates) else frozenset()
    members: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        key = part if part in rates else part.split(".")[0]
        # The base under LoRA or MoV experts stays as it is: that is what makes the method.
        learns = key in rates and name not in unused and (part == LORA or ".experts.base_" not in name)
        parameter.requires_grad_(learns)
        members.setdefault(key, []).append(parameter)
    absent = [part for part in rates if not members[part]]
    fixed = sorted({type(m.router).__name__ for m in model.modules() if isinstance(m, MoELayer)})
    if absent == ["router"] and fixed:
        raise ValueError(
            f"stage {stage.name} trains router, but {', '.join(fixed)} has nothing that learns; leave router out of "
            "stage.learning_rates"
        )
    if absent:
        raise ValueError(
            f"stage {stage.name} trains {', '.join(absent)}, which this checkpoint does not have (it has "
            f"{', '.join(found)}); is the start point of the right kind?"
        )
    return [group for part, rate in rates.items() for group in _groups(members[part], rate, stage.decay_of(part))]


def _groups(members: list[nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
    trainable = [p for p in members if p.requires_grad]

    # ds_shape is the full shape of a parameter that ZeRO-3 has partitioned away
    def dims(p: nn.Parameter) -> int:
        return len(getattr(p, "ds_shape", p.shape))

    decayed = {"params": [p for p in trainable if dims(p) >= 2], "lr": rate, "weight_decay": decay}
    plain = {"params": [p for p in trainable if dims(p) < 2], "lr": rate, "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def _unused_tower_parameters(model: nn.Module) -> frozenset[str]:
    """Parameters of the tower that the selected features do not depend on; they would never get a gradient."""
    config: Any = model.config
    with distributed.unpartitioned():  # under ZeRO-3 transformers would split the hollow copy among the ranks
        names = unused_parameters(config.vision_config, config.vision_feature_layer)
    return frozenset(f"model.vision_tower.{name}" for name in names)


def count_trainable(model: nn.Module) -> int:
    """Number of values that the optimiser updates."""
    # ds_numel under ZeRO-3; full_numel where ranks share experts
    return sum(
        int(getattr(p, "full_numel", getattr(p, "ds_numel", p.numel()))) for p in model.parameters() if p.requires_grad
    )


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
