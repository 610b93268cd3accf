"""What the tests of the balance losses run over: every registered one, and routings that have all they ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.moe import BALANCE_LOSSES, BalanceLoss, Routing, RoutingContext
from tests.reference import oracles

NUM_EXPERTS = 6
# Every loss with its defaults, and with the option values that change its formula.
_REQUIRED: dict[str, dict[str, Any]] = {"locality": {"num_nodes": 2}}
_MORE: list[tuple[str, dict[str, Any]]] = [
    ("switch", {"per": "token"}),
    ("sequence", {"scores": "sigmoid"}),
    ("heterogeneous", {"tau": 0.1}),
    ("localised", {"delta": 0.4, "image_experts": [0, 3]}),
    ("localised", {"delta": 0.0}),
    ("locality", {"num_nodes": 3, "epsilon": 0.2}),
    ("relu_l1", {"k": 2}),
    ("relu_l1", {"load_weighted": False}),
]
CASES = [(name, _REQUIRED.get(name, {})) for name in BALANCE_LOSSES.names()] + _MORE
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
# The formula of Switch with other counts; one process and one micro-batch.
SWITCH_LIKE = ["switch", "gshard", "sequence", "global_batch", "heterogeneous"]
# Losses whose gradient through the logits alone must fall on the expert that takes too much.
BALANCING = [*SWITCH_LIKE, "importance_load", "entropy", "relu_l1"]


def make_loss(case: tuple[str, dict[str, Any]]) -> BalanceLoss:
    return BALANCE_LOSSES.get(case[0]).build(case[1])


def by_default(name: str) -> BalanceLoss:
    return make_loss((name, _REQUIRED.get(name, {})))


def routing_of(logits: Tensor, k: int = 2, index: Tensor | None = None) -> Routing:
    """Softmax top-k with every extra that a loss may ask for, all of them smooth functions of the logits."""
    probs = logits.softmax(-1)
    index = probs.topk(k, dim=-1).indices if index is None else index
    num_tokens, num_experts = logits.shape
    filled = index < num_experts
    weight = probs.gather(-1, index.clamp(max=num_experts - 1)) * filled
    steps = torch.arange(num_experts * k * 3, device=logits.device)
    direction_EKD = torch.sin(1.7 * steps.square() + 1.0).reshape(num_experts, -1)
    outputs = (probs @ direction_EKD.to(probs.dtype)).reshape(num_tokens, k, 3)
    extras = {
        "zero_compute_E": torch.arange(num_experts, device=logits.device) >= num_experts - 2,
        "load_prob_TE": logits.sigmoid(),
        "affinity_TE": torch.cos(torch.arange(logits.numel(), device=logits.device)).reshape(logits.shape),
        "competes_T": (torch.arange(num_tokens, device=logits.device) % 3 > 0).to(logits.dtype),
        "outputs_TKD": outputs,
        "null_prob_T": 1 - probs.amax(dim=-1),
    }
    return Routing(logits, probs, index, weight, extras)


def context_of(num_tokens: int, mask: Tensor | None = None, device: str = "cpu") -> RoutingContext:
    """Three sequences of both modalities, interleaved."""
    tokens = torch.arange(num_tokens, device=device)
    return RoutingContext(
        token_mask_T=torch.ones(num_tokens, dtype=torch.bool, device=device) if mask is None else mask,
        sequence_T=tokens % min(3, max(num_tokens, 1)),
        modality_T=tokens // 2 % 2,
    )


def oracle(case: tuple[str, dict[str, Any]], routing: Routing, context: RoutingContext) -> float:
    fields = {
        "logits": routing.logits_TE,
        "probs": routing.probs_TE,
        "index": routing.index_TK,
        "weight": routing.weight_TK,
        **routing.extras,
    }
    told = {"mask": context.token_mask_T, "sequence": context.sequence_T, "modality": context.modality_T}
    numpy = [{k: v.detach().numpy() for k, v in group.items()} for group in (fields, told)]
    return oracles.BALANCE_LOSSES[case[0]](*numpy, make_loss(case).config)
