"""What the tests of the controllers run over: every registered one, on layers that have its knob."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.moe import CONTROLLERS, ROUTERS, Capacity, Controller, MoELayer, SiteKey
from llava_moe.moe.controllers import LayerStats, StepStats
from tests.moe.cases import SPECS, make_experts

HIDDEN, NUM_EXPERTS, NUM_STEPS = 8, 4, 10
Layers = dict[SiteKey, MoELayer]
SCHEDULED_K = {"selector_args": {"k": 3, "scheduled_k": True}}
GROUPED = {"selector": "group_limited", "selector_args": {"k": 2}}
# Each controller with options, a router that has its knob, and whether that is the capacity; all of them are run.
Case = tuple[str, dict[str, Any], str, dict[str, Any], bool]
CASES: list[Case] = [
    ("loss_free_bias", {"rate": 0.1}, "scored", GROUPED, False),
    ("remoe_lambda", {"initial": 1e-3}, "scored", {"selector": "relu"}, False),
    ("skywork_alpha", {"decay": 0.5}, "top_k", {}, True),
    ("temperature", {}, "scored", {"selector": "dts"}, False),
    ("temperature", {"shape": "exponential", "fraction": 0.5}, "scored", {"selector": "dts"}, False),
    ("k_schedule", {"start": 1, "end": 3}, "scored", SCHEDULED_K, False),
    ("competition", {"rate": 0.4}, "compete_smoe", {}, False),
    ("capacity", {}, "top_k", {}, True),
    ("capacity", {"rule": "etr", "smallest": 0.2}, "expert_token_resonance", {}, False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")


def make_layers(
    router: str = "top_k", args: dict[str, Any] | None = None, num: int = 3, capacity: bool = False
) -> Layers:
    """Layers of the decoder, and one of the vision tower."""
    sites = [("decoder", i) for i in range(num - 1)] + [("vision", 1)] if num > 1 else [("decoder", 0)]
    return {
        (part, layer): MoELayer(
            ROUTERS.get(router).build(HIDDEN, NUM_EXPERTS, args or {}),
            make_experts(SPECS["gated"], NUM_EXPERTS),
            layer,
            part=part,
            capacity=Capacity(Capacity.Config(1.25)) if capacity else None,
        )
        for part, layer in sites
    }


def made(case: Case) -> tuple[Controller, Layers]:
    name, options, router, args, capacity = case
    layers = make_layers(router, args, capacity=capacity)
    return CONTROLLERS.get(name).build(options, layers), layers


def layer_stats(load: list[float], tokens: float = 8.0, dropped: float = 0.0, max_logit: float = 0.5) -> LayerStats:
    return LayerStats(torch.tensor(load), torch.tensor(tokens), torch.tensor(dropped), torch.tensor(max_logit))


def step_stats(layers: Layers, step: int, **changes: Any) -> StepStats:
    """Different numbers for each step and layer, the same for every caller."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for site in layers:
        load = torch.randint(0, 9, (NUM_EXPERTS,), generator=generator).tolist()
        dropped = float(torch.randint(0, 5, (), generator=generator))
        cosine = float(torch.rand((), generator=generator))
        found[site] = layer_stats([float(v) for v in load], dropped=dropped, max_logit=cosine, **changes)
    return StepStats(step, NUM_STEPS, found)


def run(controller: Controller, layers: Layers, first: int, last: int) -> None:
    for step in range(first, last + 1):
        controller.start(step, NUM_STEPS)
        controller.step(step_stats(layers, step))


def buffers(layers: Layers) -> dict[str, Tensor]:
    return {f"{site}.{n}": b.clone() for site, layer in layers.items() for n, b in layer.named_buffers()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
