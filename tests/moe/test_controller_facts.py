"""Controllers one by one: what each does to its knob, against worked numbers and small simulations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.moe import CONTROLLERS, Controller, RoutingContext, SiteKey
from llava_moe.moe.capacity_bounds import ec_min_exp
from llava_moe.moe.controllers import LayerStats, StepStats, knobs
from llava_moe.moe.controllers.capacity import resonance_bound
from llava_moe.moe.controllers.competition import CompetitionSchedule, spread
from llava_moe.moe.losses import BALANCE_LOSSES
from tests.moe.controller_cases import GROUPED, HIDDEN, NUM_EXPERTS, SCHEDULED_K, Layers, layer_stats, make_layers

# --- loss-free bias


def biased(num: int = 1, **options: Any) -> tuple[Controller, Layers, list[Tensor]]:
    layers = make_layers("scored", GROUPED, num=num)
    owners = [owner for found in knobs(layers, "selection_bias_E").values() for owner in found]
    return (
        CONTROLLERS.get("loss_free_bias").build(options, layers),
        layers,
        [owner.get_buffer("selection_bias_E") for owner in owners],
    )


def test_bias_moves_by_exactly_the_rate_towards_balance() -> None:
    controller, layers, (bias,) = biased(rate=0.01)
    stats = {site: layer_stats([8.0, 2.0, 5.0, 5.0]) for site in layers}
    told = controller.step(StepStats(1, 10, stats))
    torch.testing.assert_close(bias, torch.tensor([-0.01, 0.01, 0, 0]))
    assert float(told["largest_bias"]) == pytest.approx(0.01)
    controller.step(StepStats(2, 10, stats))
    torch.testing.assert_close(bias, torch.tensor([-0.02, 0.02, 0, 0]))


def test_bias_rests_in_the_last_part_of_the_run() -> None:
    controller, layers, (bias,) = biased(rate=0.01, stop_fraction=0.3)
    moves = []
    for step in range(1, 11):
        before = bias.clone()
        controller.step(StepStats(step, 10, {site: layer_stats([8.0, 2.0, 5.0, 5.0]) for site in layers}))
        moves.append(not torch.equal(bias, before))
    assert moves == [True] * 7 + [False] * 3


def test_bias_evens_out_a_skewed_router() -> None:
    """MaxVio of a router that favours one expert falls to near 0, by the bias alone."""
    controller, layers, (bias,) = biased(rate=0.02)
    (site, layer), context = next(iter(layers.items())), RoutingContext.trivial(256)
    x = torch.randn(256, HIDDEN) + 0.3
    with torch.no_grad():
        layer.router.scorer.weight.normal_(std=0.3)
        layer.router.scorer.weight[0] += 0.5
    violations = []
    for step in range(1, 101):
        load = layer.router(x, context).load_E()
        violations.append(float(load.max() / load.mean() - 1))
        controller.step(StepStats(step, 100, {site: LayerStats(load, *torch.ones(3).unbind())}))
    means = [sum(violations[i : i + 25]) / 25 for i in range(0, 100, 25)]
    assert violations[0] > 0.4
    assert means[0] > means[1]
    assert means[-1] < 0.15
    assert not bias.requires_grad
    assert all("bias" not in name for name, _ in layer.named_parameters())


def test_a_bias_over_some_of_the_experts_is_refused() -> None:
    layers = make_layers("scored", GROUPED, num=1)
    layer = layers["decoder", 0]
    layer.router.selector.selection_bias_E = torch.zeros(2)
    with pytest.raises(ValueError, match="not for all 4 experts"):
        CONTROLLERS.get("loss_free_bias").build({}, layers)


# --- ReMoE lambda


def relu_stats(layers: Layers, open_gates: float) -> dict[SiteKey, LayerStats]:
    return {site: layer_stats([open_gates * 2.0] * NUM_EXPERTS, tokens=8.0) for site in layers}


def test_lambda_trajectory() -> None:
    layers = make_layers("scored", {"selector": "relu"})
    controller = CONTROLLERS.get("remoe_lambda").build({}, layers)
    for step in range(1, 51):
        controller.step(StepStats(step, 100, relu_stats(layers, 2.0)))
    assert float(controller.state_dict()["lambda"]) == pytest.approx(9.1004e-5, rel=1e-4)
    assert float(controller.factor("relu_l1", ("decoder", 0))) == pytest.approx(9.1004e-5, rel=1e-4)
    told = controller.step(StepStats(51, 100, relu_stats(layers, 1.0)))  # exactly one open gate for each token
    assert float(told["lambda"]) == pytest.approx(9.1004e-5 / 1.2, rel=1e-4)
    assert float(told["sparsity"]) == pytest.approx(0.75)
    controller.step(StepStats(52, 100, relu_stats(layers, 0.9)))
    assert float(controller.state_dict()["lambda"]) == pytest.approx(9.1004e-5 / 1.44, rel=1e-4)


def test_lambda_is_zero_where_there_are_no_relu_gates() -> None:
    layers = {**make_layers("scored", {"selector": "relu"}, num=1), **{("vision", 0): make_layers(num=1)["decoder", 0]}}
    controller = CONTROLLERS.get("remoe_lambda").build({"initial": 0.5}, layers)
    assert float(controller.factor("relu_l1", ("decoder", 0))) == 0.5
    assert controller.factor("relu_l1", ("vision", 0)) == 0.0
    stats = {("decoder", 0): layer_stats([8.0] * 4), ("vision", 0): layer_stats([0.0] * 4)}
    controller.step(StepStats(1, 2, stats))  # all gates of the decoder are open; the tower does not count
    assert float(controller.factor("relu_l1", ("decoder", 0))) == pytest.approx(0.6)


def test_lambda_leads_to_k_open_gates() -> None:
    """The task wants nearly three open gates; with the loss it is one in the mean."""
    layers = make_layers("scored", {"selector": "relu", "scorer_args": {"bias": True}}, num=1)
    (site, layer), context = next(iter(layers.items())), RoutingContext.trivial(256)
    controller = CONTROLLERS.get("remoe_lambda").build({"initial": 1e-3, "rate": 1.1}, layers)
    loss, x = BALANCE_LOSSES.get("relu_l1").build({}), torch.randn(256, HIDDEN)
    wanted = (x @ torch.randn(HIDDEN, NUM_EXPERTS) * 0.3 + 0.5).relu()
    optimiser = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    open_gates = []
    for step in range(1, 301):
        routing = layer.router(x, context)
        task = (routing.gates_TE() - wanted).square().mean()
        (task + controller.factor("relu_l1", site) * loss(routing, context)).backward()
        optimiser.step()
        optimiser.zero_grad()
        controller.step(StepStats(step, 300, {site: LayerStats.measure(routing, context.token_mask_T)}))
        open_gates.append(float(routing.load_E().sum()) / 256)
    assert max(open_gates) > 2.5
    assert sum(open_gates[-60:]) / 60 == pytest.approx(1.0, abs=0.15)


# --- Skywork alpha


def test_alpha_is_a_moving_average_of_the_drop_rate() -> None:
    layers = make_layers(capacity=True)
    controller = CONTROLLERS.get("skywork_alpha").build({"decay": 0.9, "maximum": 0.05}, layers)
    assert controller.drives == ("switch",)
    sites, alpha = sorted(layers), [0.0, 0.0, 0.0]
    for step in range(1, 6):
        rates = [0.1, 0.0, 0.5]  # 0.2 * 0.5 is above the maximum
        stats = {site: layer_stats([25.0 * (1 - d)] * 4, dropped=100 * d) for site, d in zip(sites, rates, strict=True)}
        controller.step(StepStats(step, 9, stats))
        alpha = [0.9 * a + 0.1 * min(0.2 * d, 0.05) for a, d in zip(alpha, rates, strict=True)]
    found = [float(controller.factor("switch", site)) for site in sites]
    assert found == pytest.approx(alpha, rel=1e-5)
    assert found[1] == 0
    assert max(found) <= 0.05


def test_alpha_falls_to_nothing_without_drops() -> None:
    layers = make_layers(capacity=True)
    controller = CONTROLLERS.get("skywork_alpha").build({"initial": 0.01, "loss": "gshard"}, layers)
    for step in range(1, 501):
        controller.step(StepStats(step, 500, {site: layer_stats([5.0] * 4) for site in layers}))
    assert float(controller.factor("gshard", ("vision", 1))) == pytest.approx(0.01 * 0.99**500, rel=1e-3)
    assert controller.factor("switch", ("vision", 1)) == 1.0


def test_alpha_of_another_number_of_layers_is_refused() -> None:
    controller = CONTROLLERS.get("skywork_alpha").build({}, make_layers(capacity=True))
    with pytest.raises(ValueError, match=r"'alpha_L' of shape \(3,\)"):
        controller.load_state_dict({"alpha_L": torch.zeros(2)})


# --- schedules


def values(name: str, options: dict[str, Any], router: dict[str, Any], knob: str, num_steps: int = 8) -> list[float]:
    """The knob in each forward of a run, and at last that of the model that is saved."""
    layers = make_layers("scored", router)
    controller = CONTROLLERS.get(name).build(options, layers)
    owners = [owner for found in knobs(layers, knob).values() for owner in found]
    assert len(owners) == 3
    seen = []
    for step in range(1, num_steps + 1):
        controller.start(step, num_steps)
        assert len({float(owner.get_buffer(knob)) for owner in owners}) == 1
        seen.append(float(owners[0].get_buffer(knob)))
        controller.step(StepStats(step, num_steps, {}))
    return [*seen, float(owners[0].get_buffer(knob))]


def test_temperature_schedules() -> None:
    dts = {"selector": "dts"}
    linear = values("temperature", {"start": 1.0, "end": 0.5, "fraction": 0.5}, dts, "temperature")
    assert linear == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5, 0.5])
    exponential = values("temperature", {"start": 2.0, "end": 0.5, "shape": "exponential"}, dts, "temperature", 4)
    assert exponential == pytest.approx([2.0, 2 * 0.25**0.25, 1.0, 2 * 0.25**0.75, 0.5])


def test_k_schedules() -> None:
    rising = values("k_schedule", {"start": 1, "end": 3}, SCHEDULED_K, "active_k")
    assert rising == [1, 1, 2, 2, 2, 2, 3, 3, 3]
    falling = values("k_schedule", {"start": 3, "end": 1, "fraction": 0.25}, SCHEDULED_K, "active_k")
    assert falling == [3, 2, 1, 1, 1, 1, 1, 1, 1]


def test_a_scheduled_k_changes_the_routing() -> None:
    layers = make_layers("scored", SCHEDULED_K, num=1)
    controller, router = (
        CONTROLLERS.get("k_schedule").build({"start": 1, "end": 3}, layers),
        layers["decoder", 0].router,
    )
    filled = []
    for step in (1, 5, 9):
        controller.start(step, 8)
        routing = router(torch.randn(5, HIDDEN), RoutingContext.trivial(5))
        filled.append(int(routing.load_E().sum()) // 5)
    assert filled == [1, 2, 3]


def test_linear_capacity() -> None:
    layers = make_layers(capacity=True)
    controller = CONTROLLERS.get("capacity").build({"largest": 2.0, "smallest": 1.0, "fraction": 0.5}, layers)
    seen = []
    for step in range(1, 9):
        controller.start(step, 8)
        seen.append(float(layers["vision", 1].capacity.factor))
        controller.step(StepStats(step, 8, {}))
    assert seen == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("hidden", "experts", "golden"), [(4096, 16, 0.3951), (5120, 16, 0.6265)])
def test_resonance_bound(hidden: int, experts: int, golden: float) -> None:
    found = float(resonance_bound(hidden, experts, torch.tensor(0.03)))
    assert found == pytest.approx(golden, abs=1e-4)
    assert found == pytest.approx(ec_min_exp(experts, hidden, 0.03), rel=1e-5)
    assert float(resonance_bound(hidden, experts, torch.tensor(-math.inf))) == pytest.approx(1 / experts)
    assert math.isfinite(float(resonance_bound(hidden, experts, torch.tensor(1.0))))


def test_resonance_follows_the_largest_cosine_of_each_layer() -> None:
    layers = make_layers("expert_token_resonance")
    options = {"rule": "etr", "largest": 3.0, "smallest": 0.3}
    controller, sites = CONTROLLERS.get("capacity").build(options, layers), sorted(layers)
    controller.start(1, 10)
    assert [float(layers[site].router.factor) for site in sites] == [3.0] * 3
    cosines = (0.0, 0.6, 0.99)
    stats = {site: layer_stats([2.0] * 4, max_logit=c) for site, c in zip(sites, cosines, strict=True)}
    controller.step(StepStats(1, 10, stats))
    bounds = [min(max(ec_min_exp(NUM_EXPERTS, HIDDEN, c), 0.3), 3.0) for c in cosines]
    assert bounds[0] == 0.3 < bounds[1] < bounds[2] == 3.0
    assert [float(layers[site].router.factor) for site in sites] == pytest.approx(bounds)
    controller.start(2, 10)  # a later step keeps what was measured
    assert [float(layers[site].router.factor) for site in sites] == pytest.approx(bounds)


def test_resonance_leaves_capacities_alone() -> None:
    layers = make_layers("expert_token_resonance", capacity=True)
    controller = CONTROLLERS.get("capacity").build({"rule": "etr"}, layers)
    controller.start(1, 10)
    assert {float(layer.capacity.factor) for layer in layers.values()} == {1.25}
    assert {float(layer.router.factor) for layer in layers.values()} == {2.0}


# --- competition


def competing(layers: Layers, **options: Any) -> CompetitionSchedule:
    controller = CONTROLLERS.get("competition").build(options, layers)
    assert isinstance(controller, CompetitionSchedule)
    return controller


def test_competitions_keep_rate_cap_and_warm_up() -> None:
    layers, num_steps = make_layers("compete_smoe", num=12), 2000
    controller = competing(layers, rate=0.15, warm_up=0.1, max_layers=3)
    plan = [controller.competing(step, num_steps) for step in range(1, num_steps + 1)]
    assert max(map(len, plan)) == 3
    assert not any(plan[:200])
    assert any(plan[200:220])
    for layer in range(12):
        rate = sum(layer in competes for competes in plan) / 1800
        assert rate == pytest.approx(0.15, abs=0.03)


def test_competitions_depend_on_seed_and_step_alone() -> None:
    layers = make_layers("compete_smoe", num=6)

    def plan(seed: int) -> list[set[int]]:
        torch.rand(seed + 1)  # the global generator does not matter
        controller = competing(layers, rate=0.3, seed=seed)
        return [controller.competing(step, 50) for step in (40, 1, 25, *range(1, 51))]

    assert plan(0) == plan(0)
    assert plan(0) != plan(1)


def test_knobs_are_set_for_a_step_and_cleared_after_it() -> None:
    layers = make_layers("compete_smoe", num=4)
    controller, sites = competing(layers, rate=0.3, warm_up=0.0), sorted(layers)
    seen = 0
    for step in range(1, 21):
        controller.start(step, 20)
        found = {i for i, site in enumerate(sites) if float(layers[site].router.competes) == 1.0}
        assert found == controller.competing(step, 20)
        told = controller.step(StepStats(step, 20, {}))
        assert told == {"layers": float(len(found))}
        assert all(float(layer.router.competes) == 0.0 for layer in layers.values())
        seen += len(found)
    assert seen > 5


def test_too_many_are_spread_to_the_nearest_step() -> None:
    assert spread([set(), {0}, {0, 1, 2, 3}, set(), {1}], 1, 2) == [set(), {0, 2}, {0, 1}, {3}, {1}]
    # nothing goes into the warm-up, and what finds no room is dropped
    assert spread([set(), {0, 1}, {0, 1}], 1, 1) == [set(), {0}, {0}]
    assert spread([{0, 1}, {1}, set()], 0, 1) == [{0}, {1}, {1}]
