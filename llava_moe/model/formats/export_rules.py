"""What transformers' own classes can compute, and what they cannot: each refusal of an export, with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from llava_moe.model.configuration import MoePart
from llava_moe.model.merge import merge_rule
from llava_moe.model.modeling import CheckpointError

STOCK: dict[str, tuple[Any, Any]] = {
    "llava_moe": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next_moe": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_onevision_moe": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}
TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_SUMS_TO_ONE = {"softmax_topk_renorm": True, "topk_softmax": True, "softmax_topk": False}
_ROUNDING = (
    "padding is cut off as transformers does it, and not with LLaVA's rounding (merge.unpad_rounding): pictures of "
    "some sizes get two rows or columns of features more"
)
_FRAMES = "videos: the stock class pools frames in its own way, or takes none"


def check_outside(path: Path, config: Any, parts: list[str]) -> tuple[str, ...]:
    """All but the decoder's experts: what has no counterpart in the stock class. What it does in another way is noted.

    Raises:
        CheckpointError: there is something.
    """
    experts = [part for part in parts if part != "decoder"]
    kind = config.vision_config.model_type
    why = None
    if experts:
        why = (
            f"has experts in its {' and '.join(experts)}, and transformers' LLaVA has dense ones; it is used with "
            "`import llava_moe`"
        )
    elif config.projector != "mlp2x_gelu":
        why = (
            f"its projector is {config.projector!r}, and that of transformers' LLaVA is two linear maps with an "
            "activation between them (mlp2x_gelu)"
        )
    elif kind.startswith("llava_moe"):
        why = f"its vision tower ({kind}) is a class of this project alone"
    elif config.logit_scale is not None or config.logit_softcap is not None or config.logit_bias:
        why = (
            f"its decoder changes its logits after the vocabulary projection (logit_scale={config.logit_scale}, "
            f"logit_softcap={config.logit_softcap}, logit_bias={config.logit_bias}), and transformers' LLaVA does not"
        )
    if why is not None:
        raise CheckpointError(f"{path}: {why}")
    return () if config.model_type == "llava_moe" else _check_tiles(path, config)


def _check_tiles(path: Path, config: Any) -> tuple[str, ...]:
    """Tiles become a sequence in one way in the stock classes: spatial_unpad with the whole picture in front."""
    rule = merge_rule(config)
    if rule.merge != "spatial_unpad" or not rule.base:
        raise CheckpointError(
            f"{path}: its tiles are merged by {rule.merge}{'' if rule.base else ' without the whole picture'}, and in "
            "transformers' classes by spatial_unpad behind the whole picture"
        )
    onevision = config.model_type == "llava_onevision_moe"
    if not onevision and rule.max_tiles is not None:
        raise CheckpointError(
            f"{path}: vision_aspect_ratio={config.vision_aspect_ratio!r} limits the tokens of a picture, which "
            "transformers' LLaVA-NeXT does not (its LLaVA-OneVision does)"
        )
    if onevision and rule.max_tiles is None:
        raise CheckpointError(
            f"{path}: vision_aspect_ratio={config.vision_aspect_ratio!r}, and transformers' LLaVA-OneVision takes "
            "anyres_max_N alone"
        )
    if onevision and config.vision_feature_select_strategy != "full":
        raise CheckpointError(
            f"{path}: drops a class token, for which transformers' LLaVA-OneVision counts a token too few; use a tower "
            "without one (SigLIP)"
        )
    return (_FRAMES,) if rule.unpad_rounding == "exact" else (_ROUNDING, _FRAMES)


def target_of(path: Path, text: Any) -> str:
    """The sparse class of a decoder.

    Raises:
        CheckpointError: there is none.
    """
    target = TARGETS.get(text.model_type)
    if target is None:
        raise CheckpointError(
            f"{path}: a {text.model_type} decoder with experts has no class in transformers; "
            f"those that have: {', '.join(f'{ours} ({theirs})' for ours, theirs in TARGETS.items())}"
        )
    return target


def check_router(path: Path, part: MoePart) -> tuple[int, bool]:
    """k, and whether the weights of the chosen experts sum to 1.

    Raises:
        CheckpointError: transformers has no such router or experts.
    """
    args = {"k": 2, "convention": "softmax_topk_renorm", "bias": False, "scheduled_k": False, **part.router.args}
    why = None
    if part.router.name != "top_k":
        why = f"its router is {part.router.name!r}; transformers' sparse decoders have top_k alone"
    elif args["bias"] or args["scheduled_k"]:
        why = "its router has a bias or a scheduled k, and those of transformers have not"
    elif part.experts.name != "stacked":
        why = f"its experts are {part.experts.name!r}; transformers' are whole feed-forward blocks (stacked)"
    elif len(set(part.num_experts)) > 1:
        why = f"its layers have {list(part.num_experts)} experts, and transformers has one number for all"
    if why is not None:
        raise CheckpointError(f"{path}: {why}")
    return int(args["k"]), _SUMS_TO_ONE[args["convention"]]


def check_decoder(path: Path, text: Any, target: str, part: MoePart, renormalised: bool) -> None:
    """What each target cannot do.

    Raises:
        CheckpointError: this decoder needs it.
    """
    why = None
    dense = [index for index in range(text.num_hidden_layers) if index not in part.layers]
    if target == "mixtral" and dense:
        why = f"layers {dense} are dense, and in a mixtral every layer has experts"
    elif target == "mixtral" and not renormalised:
        why = "the weights of its experts do not sum to 1 (softmax_topk), and those of a mixtral do"
    elif target == "mixtral" and (getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False)):
        why = "its attention or feed-forward maps have biases, and those of a mixtral have not"
    elif target != "mixtral" and getattr(text, "use_sliding_window", False):
        why = f"its attention has a sliding window in some layers, which {target} does not have in the same ones"
    elif part.shared is not None and (target != "qwen2_moe" or part.shared.get("mix", "sum") != "gated"):
        why = f"it has shared experts ({part.shared}), and only a qwen2_moe has such, gated ones"
    if why is not None:
        raise CheckpointError(f"{path}: cannot become a {target} decoder: {why}")
