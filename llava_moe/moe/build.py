"""Makes a whole MoE layer from names and options: what a recipe, a config.json and a lone user all go through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llava_moe.moe.capacity import Capacity
from llava_moe.moe.experts import EXPERTS
from llava_moe.moe.experts.shared import SharedExperts
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.routers import ROUTERS
from llava_moe.moe.scope import RoutingScope
from llava_moe.moe.soft import SoftMoELayer
from llava_moe.moe.types import MlpSpec
from llava_moe.registry import Registry

# Routers that assign no tokens bring a layer of their own, under their name: (plan, spec, layer, part, scope) -> layer.
LAYERS: Registry[Any] = Registry("layer kind")
LAYERS.register("soft_moe", SoftMoELayer)


@dataclass(frozen=True)
class LayerPlan:
    """What one MoE layer is made of.

    Attributes:
        num_experts: feed-forward experts; a kind of experts may add others.
        router, experts: registry names with their options.
        shared: options of `SharedExperts`, or None.
        capacity: options of `Capacity`, or None for dropless.
        expert_width: width of one expert; None takes that of the dense block.
    """

    num_experts: int
    router: str = "top_k"
    router_args: Mapping[str, Any] = field(default_factory=dict)
    experts: str = "stacked"
    experts_args: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] | None = None
    capacity: Mapping[str, Any] | None = None
    expert_width: int | None = None


def build_layer(
    plan: LayerPlan, spec: MlpSpec, layer: int = 0, part: str = "decoder", scope: RoutingScope | None = None
) -> nn.Module:
    """The layer that replaces a dense block of this `spec`.

    Raises:
        ValueError: a name or an option is unknown or refused; or the router may not be used in this part.
    """
    if plan.num_experts < 1:
        raise ValueError(f"num_experts={plan.num_experts} must be at least 1")
    if plan.expert_width is not None:
        if plan.expert_width < 1:
            raise ValueError(f"expert_width={plan.expert_width} must be at least 1")
        spec = spec.with_width(plan.expert_width)
    if plan.router in LAYERS:
        return LAYERS.get(plan.router)(plan, spec, layer, part, scope)
    experts = EXPERTS.get(plan.experts).build(spec, plan.num_experts, plan.experts_args)
    router = ROUTERS.get(plan.router).build(spec.hidden, experts.num_experts, plan.router_args)
    shared = None if plan.shared is None else SharedExperts.build(spec, plan.shared)
    capacity = None if plan.capacity is None else Capacity(Capacity.parse(plan.capacity))
    return MoELayer(router, experts, layer, scope, part, shared, capacity)
