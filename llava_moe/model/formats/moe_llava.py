"""MoE-LLaVA (2401.15947): a LLaVA whose feed-forward blocks were replaced by DeepSpeed's MoE layer.

    model.layers.L.mlp.deepspeed_moe.gate.wg.weight
    model.layers.L.mlp.deepspeed_moe.experts.deepspeed_experts.E.<the dense block's names>

DeepSpeed's weights are those of a softmax over all experts, divided by their sum for k = 2, and as they are for k = 1.
Two things of the original are not imported, because they make an answer depend on chance and on its batch: the noise
that DeepSpeed adds when it chooses the second expert, and the capacity that drops tokens (`eval_capacity_factor`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_moe.model.formats.parts import Options, Parts, moe_part, renamed, split
from llava_moe.model.formats.tensors import State, read_json
from llava_moe.model.modeling import CheckpointError

_NAME = re.compile(
    r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.(?:gate\.wg\.weight"
    r"|experts\.deepspeed_experts\.(\d+)\.(\w+)\.(weight|bias))"
)
_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "fc1": "up", "fc2": "down"}


def read_moe_llava(path: Path, state: State, options: Options) -> Parts:
    """A whole model, with one entry of `moe.decoder` for each of its sparse layers.

    Raises:
        CheckpointError: it uses residual experts, or more experts for a token than DeepSpeed's gates know.
    """
    raw = read_json(path / "config.json")
    moe: dict[str, Any] = raw.get("moe") or {}
    residual = [name for name in state if re.search(r"\.mlp\.(coefficient|mlp)\.", name)]
    if residual:
        raise CheckpointError(
            f"{state[residual[0]].origin}: residual experts (use_residual) mix by a learned two-way softmax, which has "
            "no counterpart here"
        )
    k = moe.get("top_k_experts")
    if k not in (1, 2):
        raise CheckpointError(f"{path / 'config.json'}: moe.top_k_experts is {k!r}; MoE-LLaVA has 1 or 2")
    raw = {**raw, "mm_vision_tower": raw.get("mm_image_tower") or raw.get("mm_vision_tower")}
    parts = split(state, raw, path, path)
    counts: dict[int, int] = {}
    for name, lazy in parts.decoder.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        if match[3] is not None and match[3] not in _PARTS:
            raise CheckpointError(f"{lazy.origin}: {match[3]} is no known part of an expert ({', '.join(_PARTS)})")
        expert = -1 if match[2] is None else int(match[2])
        counts[int(match[1])] = max(counts.get(int(match[1]), 0), expert + 1)
    parts.decoder = renamed(parts.decoder, _NAME, _our_name)
    parts.moe["decoder"] = moe_part(counts, k, "softmax_topk_renorm" if k == 2 else "softmax_topk")
    return parts


def _our_name(match: re.Match[str]) -> str:
    block = f"model.layers.{match[1]}.mlp"
    if match[2] is None:
        return f"{block}.router.scorer.weight"
    return f"{block}.experts.{match[2]}.{_PARTS[match[3]]}.{match[4]}"
