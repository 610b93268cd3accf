"""What the contract tests of this folder run over: every registered name, with the option values that matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_moe.moe import ROUTERS, MlpSpec, MoELayer, Router, Routing, StackedExperts
from llava_moe.moe.experts import ACTIVATIONS
from llava_moe.moe.kernels import ExpertWeights

HIDDEN, NUM_EXPERTS = 8, 5
# Every router must appear with its defaults; a new one is added by itself.
_EXTRA_ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("top_k", {"k": 1}),
    ("top_k", {"k": 3, "bias": True}),
    ("top_k", {"k": 2, "convention": "softmax_topk"}),
    ("top_k", {"k": 1, "convention": "softmax_topk"}),
    ("top_k", {"k": 2, "convention": "topk_softmax"}),
    ("top_k", {"k": NUM_EXPERTS}),
]
ROUTER_CASES = [(name, {}) for name in ROUTERS.names()] + _EXTRA_ROUTERS
SPECS = {
    "gated": MlpSpec(8, 12, "silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "gated-bias": MlpSpec(8, 12, "gelu", True, True, "gate_proj", "up_proj", "down_proj"),
    "plain": MlpSpec(8, 12, "relu2", False, False, None, "up_proj", "down_proj"),
    "plain-bias": MlpSpec(8, 12, "gelu", False, True, None, "fc1", "fc2"),
    "odd": MlpSpec(7, 9, "silu", True, True, "gate_proj", "up_proj", "down_proj"),
}


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def make_router(case: tuple[str, dict[str, Any]], hidden: int = HIDDEN, num_experts: int = NUM_EXPERTS) -> Router:
    """A router whose logits are of order one, so that near-ties do not decide a test."""
    router = ROUTERS.get(case[0]).build(hidden, num_experts, case[1])
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def make_experts(spec: MlpSpec, num_experts: int = NUM_EXPERTS, kernel: str = "loop") -> StackedExperts:
    """Experts with biases that are not zero."""
    experts = StackedExperts(spec, num_experts, kernel=kernel)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts


def make_layer(
    case: tuple[str, dict[str, Any]] = ("top_k", {}), spec: str = "gated", kernel: str = "grouped", **kwargs: Any
) -> MoELayer:
    return MoELayer(make_router(case, SPECS[spec].hidden), make_experts(SPECS[spec], kernel=kernel), **kwargs)


def expert_weights(experts: StackedExperts) -> ExpertWeights:
    """The arguments that a kernel gets for these experts."""
    first = "gate_up" if experts.spec.gated else "up"
    return ExpertWeights(
        first_EFD=getattr(experts, f"{first}_proj"),
        down_EDF=experts.down_proj,
        first_bias_EF=getattr(experts, f"{first}_bias"),
        down_bias_ED=experts.down_bias,
        activation=ACTIVATIONS[experts.spec.activation],
        gated=experts.spec.gated,
    )


def random_slots(num_tokens: int, k: int, num_experts: int = NUM_EXPERTS, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, (T, K), with positive weights; `empty` puts the index E into some slots."""
    index = torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)]) if num_tokens else None
    index_TK = torch.zeros(0, k, dtype=torch.int64) if index is None else index
    if empty:
        index_TK = torch.where(torch.rand(num_tokens, k) < 0.4, num_experts, index_TK)
    return index_TK, torch.rand(num_tokens, k) + 0.1


def golden_routing() -> Routing:
    """The worked example of four tokens, three experts and k = 2."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    weight, index = probs.topk(2, dim=-1)
    return Routing(probs.log(), probs, index, weight)
