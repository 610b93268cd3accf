"""Routers, layers and contexts for the tests of the routers that are more than a scorer and a selector."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llava_moe.moe import EXPERTS, ROUTERS, LayerPlan, MlpSpec, Router, Routing, RoutingContext, build_layer

HIDDEN, NUM_EXPERTS, TOKENS = 8, 6, 14
SPEC = MlpSpec(HIDDEN, 12, "silu", True, False, "gate_proj", "up_proj", "down_proj")


def make(case: tuple[str, dict[str, Any]], num_experts: int = NUM_EXPERTS) -> Router:
    """A router with logits of order one; MoE++ is attached to four feed-forward, one zero and one copy expert."""
    router = ROUTERS.get(case[0]).build(HIDDEN, num_experts, case[1])
    if case[0] == "moe_plus_plus":
        args = {"num_zero": 1, "num_copy": 1, "num_constant": 0}
        router.attach(EXPERTS.get("special").build(SPEC, num_experts - 2, args))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def full_context(num_tokens: int = TOKENS, num_experts: int = NUM_EXPERTS) -> RoutingContext:
    """Two sequences, the second with two tokens of padding; some tokens are image tokens; a layer came before."""
    logits = torch.randn(num_tokens, num_experts)
    index = torch.zeros(num_tokens, 1, dtype=torch.int64)
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[-2:] = False
    return RoutingContext(
        token_mask_T=mask,
        sequence_T=(torch.arange(num_tokens) >= num_tokens // 2).long(),
        modality_T=(torch.arange(num_tokens) % 3 == 0).long(),
        token_ids_T=torch.arange(num_tokens),
        previous=Routing(logits, logits.softmax(-1), index, torch.ones(num_tokens, 1)),
        run_experts=lambda x_TD: x_TD.unsqueeze(1) * torch.arange(1.0, num_experts + 1).reshape(1, -1, 1),
    )


def trivial(num_tokens: int, **fields: Any) -> RoutingContext:
    return dataclasses.replace(RoutingContext.trivial(num_tokens), **fields)


def layer_of(router: str, experts: str = "stacked", num_experts: int = 4, **args: Any) -> Any:
    """A layer with weights of order one."""
    kinds = {"num_constant": 0} if experts == "special" else {}
    plan = LayerPlan(num_experts, router=router, router_args=args, experts=experts, experts_args=kinds)
    layer = build_layer(plan, SPEC, part="vision")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer
