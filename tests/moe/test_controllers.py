"""Controllers: ranks and resumed runs agree, nothing leaves float32 or makes a GPU wait, bad options are refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.moe import CONTROLLERS, Routing
from llava_moe.moe.controllers import LayerStats, StepStats, StepSums
from llava_moe.moe.controllers.competition import CompetitionSchedule
from llava_moe.moe.losses import BALANCE_LOSSES
from tests.moe.controller_cases import (
    CASES,
    NUM_EXPERTS,
    NUM_STEPS,
    Case,
    assert_equal,
    buffers,
    every_case,
    layer_stats,
    made,
    make_layers,
    run,
    step_stats,
)


def test_the_cases_hold_every_controller() -> None:
    assert {case[0] for case in CASES} == set(CONTROLLERS.names())
    assert {"loss_free_bias", "remoe_lambda", "skywork_alpha", "temperature", "k_schedule", "competition"} <= {
        *CONTROLLERS.names()
    }


@pytest.mark.parametrize(
    ("name", "options", "owner"),
    [
        ("loss_free_bias", {}, "deepseek_v3"),
        ("remoe_lambda", {}, "remoe"),
        ("skywork_alpha", {}, "capacity"),
        ("temperature", {}, "dts"),
        ("k_schedule", {"start": 1, "end": 2}, "scheduled_k: true"),
        ("competition", {}, "compete_smoe"),
        ("capacity", {}, "capacity"),
        ("capacity", {"rule": "etr"}, "expert_token_resonance"),
    ],
)
def test_a_knob_that_is_nowhere_is_an_error_that_says_who_has_it(
    name: str, options: dict[str, Any], owner: str
) -> None:
    for layers in ({}, make_layers("top_k", {}, num=1)):
        with pytest.raises(ValueError, match=owner):
            CONTROLLERS.get(name).build(options, layers)


@every_case
def test_equal_stats_lead_to_equal_knobs(case: Case) -> None:
    """Two ranks that only share the sums: whatever their generators, knobs and state come out alike."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        controller, layers = made(case)
        torch.manual_seed(seed)
        run(controller, layers, 1, 6)
        found.append((buffers(layers), controller.state_dict()))
    assert_equal(found[0][0], found[1][0])
    assert_equal(found[0][1], found[1][1])


@every_case
def test_something_moves(case: Case) -> None:
    controller, layers = made(case)
    seen = []
    for step in range(1, 5):
        controller.start(step, NUM_STEPS)
        seen.append({**buffers(layers), **{k: v.clone() for k, v in controller.state_dict().items()}})
        told = controller.step(step_stats(layers, step))
        assert told
        assert all(math.isfinite(float(value)) for value in told.values())
    assert any(not torch.equal(value, later[name]) for later in seen[1:] for name, value in seen[0].items())


@every_case
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    case: Case,
) -> None:
    whole, layers = made(case)
    run(whole, layers, 1, 3)
    saved = {site: copy.deepcopy(layer.state_dict()) for site, layer in layers.items()}
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    run(whole, layers, 4, 6)
    resumed, others = made(case)
    for site, layer in others.items():
        layer.load_state_dict(saved[site])
    resumed.load_state_dict(state)
    run(resumed, others, 4, 6)
    assert_equal(buffers(layers), buffers(others))
    assert_equal(whole.state_dict(), resumed.state_dict())


@every_case
def test_state_and_knobs_stay_float32(case: Case) -> None:
    name, options, router, args, capacity = case
    layers = make_layers(router, args, capacity=capacity)
    for layer in layers.values():
        layer.to(torch.bfloat16)
        assert next(layer.experts.parameters()).dtype == torch.bfloat16
    controller = CONTROLLERS.get(name).build(options, layers)
    run(controller, layers, 1, 4)
    floats = [b for b in buffers(layers).values() if b.is_floating_point()] + list(controller.state_dict().values())
    assert floats
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    for layer in layers.values():
        kept = [name for module in layer.modules() for name in getattr(module, "float32_buffers", ())]
        asked = [n for module in layer.modules() for n in getattr(module, "_keep_in_fp32_modules_strict", ())]
        assert kept == asked  # what DeepSpeed asks for


@every_case
def test_the_state_of_another_controller_is_refused(
    case: Case,
) -> None:
    controller, _ = made(case)
    with pytest.raises(ValueError, match="strange"):
        controller.load_state_dict({"strange": torch.zeros(1)})
    if controller.state_dict():
        with pytest.raises(ValueError, match="must hold"):
            controller.load_state_dict({})


@every_case
def test_factors_are_one_unless_the_controller_drives_the_loss(
    case: Case,
) -> None:
    controller, layers = made(case)
    assert set(controller.drives) <= set(BALANCE_LOSSES.names())
    for loss in BALANCE_LOSSES.names():
        if loss not in controller.drives:
            assert all(controller.factor(loss, site) == 1.0 for site in layers)


@every_case
def test_never_reads_a_value_on_the_host(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would make the host wait; tensors of the meta device have shapes and no values to read."""
    # The plan of the competitions is made once in a run, on the host.
    monkeypatch.setattr(CompetitionSchedule, "_plan", lambda self, num_steps: [{0}] * num_steps)
    with torch.device("meta"):
        controller, layers = made(case)
        for step in range(1, 4):
            controller.start(step, NUM_STEPS)
            stats = LayerStats(torch.ones(NUM_EXPERTS), torch.ones(()), torch.ones(()), torch.ones(()))
            told = controller.step(StepStats(step, NUM_STEPS, dict.fromkeys(layers, stats)))
            assert told
            for loss in controller.drives:
                assert (controller.factor(loss, ("decoder", 0)) * torch.ones(())).shape == ()


def test_layers_that_did_not_run_in_a_step_are_left_alone() -> None:
    """A cache of features, for example, takes the place of the vision tower."""
    for case in CASES:
        controller, layers = made(case)
        run(controller, layers, 1, 2)
        stats = step_stats(layers, 3)
        decoder = {site: seen for site, seen in stats.layers.items() if site[0] == "decoder"}
        for seen in (decoder, {}):
            controller.step(StepStats(3, NUM_STEPS, seen))


def test_measure_by_hand() -> None:
    index = torch.tensor([[0, 1], [0, 3], [2, 0], [1, 1]])  # 3 is an empty slot
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.5], [9.0, 0.0, 0.0]])
    routing = Routing(logits, logits, index, torch.ones(4, 2), {"dropped_T": torch.tensor([0, 1, 0, 2])})
    stats = LayerStats.measure(routing, torch.tensor([True, True, True, False]))
    assert stats.load_E.tolist() == [3, 1, 1]
    assert [float(stats.num_tokens), float(stats.num_dropped), float(stats.max_logit)] == [3, 1, 2]
    assert float(stats.drop_rate) == pytest.approx(1 / 6)
    assert {t.dtype for t in vars(stats).values()} == {torch.float32}
    nothing = LayerStats.measure(routing, torch.zeros(4, dtype=torch.bool))
    assert float(nothing.max_logit) == -math.inf
    assert float(nothing.drop_rate) == 0
    empty = torch.zeros(0, 3)
    none = LayerStats.measure(Routing(empty, empty, empty.long(), empty), torch.zeros(0, dtype=torch.bool))
    assert float(none.max_logit) == -math.inf
    both = stats + LayerStats.measure(routing, torch.tensor([False, False, False, True]))
    assert both.load_E.tolist() == [3, 3, 1]
    assert [float(both.num_tokens), float(both.num_dropped), float(both.max_logit)] == [4, 3, 9]


def test_sums_over_micro_batches_begin_anew() -> None:
    sums, site = StepSums(), ("decoder", 2)
    for load in ([1.0, 0.0], [2.0, 5.0]):
        sums.add({site: layer_stats(load, tokens=3, dropped=1, max_logit=load[1])})
    stats = sums.finish(7, 9)
    assert (stats.step, stats.num_steps) == (7, 9)
    assert stats.layers[site].load_E.tolist() == [3, 5]
    assert [float(stats.layers[site].num_tokens), float(stats.layers[site].max_logit)] == [6, 5]
    assert sums.finish(8, 9).layers == {}


def test_sums_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second rank with twice the counts and a largest logit of its own, in two calls for all layers."""
    calls = []

    def all_reduce(tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        calls.append(op)
        tensor.mul_(3) if op == torch.distributed.ReduceOp.SUM else tensor.clamp_(min=0.75)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    sums, one, other = StepSums(), ("decoder", 0), ("vision", 3)
    sums.add({one: layer_stats([1.0, 2.0], 4, 1, 0.5), other: layer_stats([1.0, 2.0, 3.0], 5, 0, 0.9)})
    layers = sums.finish(1, 1).layers
    assert len(calls) == 2
    assert layers[one].load_E.tolist() == [3, 6]
    assert layers[other].load_E.tolist() == [3, 6, 9]
    assert [float(v) for v in (layers[one].num_tokens, layers[one].num_dropped)] == [12, 3]
    assert [float(layers[site].max_logit) for site in (one, other)] == pytest.approx([0.75, 0.9])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loss_free_bias", {"rate": 0.0}, r"rate=0\.0 must be above 0"),
        ("loss_free_bias", {"stop_fraction": 1.0}, r"stop_fraction=1\.0 must be at least 0 and below 1"),
        ("remoe_lambda", {"rate": 1.0}, r"rate=1\.0 above 1"),
        ("remoe_lambda", {"initial": 0.0}, r"initial=0\.0 must be above 0"),
        ("remoe_lambda", {"k": 5}, "k=5 must be from 1 to the 4 experts"),
        ("skywork_alpha", {"ratio": 0.0}, r"ratio=0\.0"),
        ("skywork_alpha", {"decay": 1.0}, r"decay=1\.0 must be at least 0 and below 1"),
        ("skywork_alpha", {"initial": 0.1}, r"initial=0\.1 must be from 0 to maximum"),
        ("temperature", {"end": 0.0}, r"end=0\.0 must be above 0"),
        ("temperature", {"shape": "linaer"}, "unknown shape 'linaer'; did you mean 'linear'"),
        ("temperature", {"fraction": 0.0}, r"fraction=0\.0 must be above 0 and at most 1"),
        ("k_schedule", {"start": 1}, "needs the option 'end'"),
        ("k_schedule", {"start": 0, "end": 2}, "start=0 must be from 1 to the router's k=3"),
        ("k_schedule", {"start": 1, "end": 4}, "end=4 must be from 1 to the router's k=3"),
        ("competition", {"rate": 1.0}, r"rate=1\.0 must be between 0 and 1"),
        ("competition", {"rate": 0.9, "max_layers": 2}, r"max_layers=2 must be .* the 2\.7 layers"),
        ("capacity", {"rule": "linaer"}, "unknown rule 'linaer'; did you mean 'linear'"),
        ("capacity", {"smallest": 3.0}, r"smallest=3\.0 must be above 0 and at most largest=2\.0"),
        ("capacity", {"rule": "etr", "fraction": 0.5}, r"fraction=0\.5 belongs to the linear rule"),
        ("capacity", {"fraction": 1.5}, r"fraction=1\.5 must be above 0 and at most 1"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    _, _, router, args, capacity = next(case for case in CASES if case[0] == name)
    with pytest.raises(ValueError, match=message):
        CONTROLLERS.get(name).build(options, make_layers(router, args, capacity=capacity))
