"""HyperMoE: the numbering of selection sets and the side branch that is made from the unselected experts."""

from __future__ import annotations

import itertools

import pytest
import torch

from llava_moe.moe import LayerPlan, Routing, build_layer
from llava_moe.moe.experts.hyper import HyperExpert, SetTables, count_sets
from tests.moe.special_cases import HIDDEN, SPEC, layer_of


def routing_to(index: list[list[int]], num_experts: int = 4) -> Routing:
    index_TK = torch.tensor(index)
    filled = torch.zeros(len(index), num_experts)
    return Routing(filled, filled, index_TK, (index_TK < num_experts).float())


@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (4, 2), (6, 3), (5, 5)])
def test_hyper_moe_each_set_has_a_number_of_its_own(num_experts: int, k: int) -> None:
    tables = SetTables.make(num_experts, k, torch.device("cpu"))
    numbers = []
    for size in range(k + 1):
        for members in itertools.combinations(range(num_experts), size):
            slots = torch.tensor([[*members, *[num_experts] * (k - size)]])
            number = int(tables.numbers(slots[:, torch.randperm(k)])[0])
            assert tables.complement_SE[number].tolist() == [float(e not in members) for e in range(num_experts)]
            numbers.append(number)
    assert sorted(numbers) == list(range(count_sets(num_experts, k)))


def hyper_expert(k: int = 2, num_experts: int = 4) -> HyperExpert:
    side = HyperExpert(SPEC, num_experts, k, embedding=5, trunk=6, bottleneck=3)
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.normal_(std=0.7)
    return side


def test_hyper_expert_equals_its_formula_token_by_token() -> None:
    side, x = hyper_expert(), torch.randn(5, HIDDEN)
    index = [[0, 1], [1, 0], [2, 3], [4, 2], [4, 4]]
    y = side(x, routing_to(index))
    p = {name: value.detach().double() for name, value in side.named_parameters()}
    for t, chosen in enumerate(index):
        r = sum(p["table"][e] for e in range(4) if e not in chosen)
        mixed = p["second"] @ (p["first"] @ r + p["first_bias"]).relu() + p["second_bias"]
        u = (p["trunk"] @ mixed + p["trunk_bias"]).relu()
        down, up = (p["down_head"] @ u).reshape(3, HIDDEN), (p["up_head"] @ u).reshape(HIDDEN, 3)
        hidden = (down @ x[t].double() + p["hidden_head"] @ u).relu()
        torch.testing.assert_close(y[t].double(), up @ hidden + p["output_head"] @ u, rtol=1e-4, atol=1e-4)


def test_hyper_expert_depends_on_the_set_and_not_on_its_order() -> None:
    side, x = hyper_expert(), torch.randn(1, HIDDEN).expand(3, HIDDEN)
    y = side(x, routing_to([[0, 1], [1, 0], [0, 2]]))
    torch.testing.assert_close(y[0], y[1])
    assert not torch.allclose(y[0], y[2])
    everything = hyper_expert(k=4)
    tables = SetTables.make(4, 4, torch.device("cpu"))
    assert tables.complement_SE[tables.numbers(torch.tensor([[3, 1, 0, 2]]))].tolist() == [[0.0] * 4]
    assert torch.isfinite(everything(x, routing_to([[3, 1, 0, 2]] * 3))).all()


def test_hyper_moe_gradient_reaches_unselected_embeddings_and_not_their_experts() -> None:
    layer, x = layer_of("hyper_moe", num_experts=5, k=2).train(), torch.randn(1, HIDDEN)
    with layer.scope.recording() as routings:
        y = layer(x)
    selected = sorted(routings["vision", 0].index_TK[0].tolist())
    y.square().sum().backward()
    unselected = [e for e in range(5) if e not in selected]
    assert [e for e in range(5) if layer.side.table.grad[e].abs().sum() > 0] == unselected
    assert [e for e in range(5) if layer.experts.down_proj.grad[e].abs().sum() > 0] == selected


def test_hyper_moe_starts_as_almost_nothing() -> None:
    plan = LayerPlan(4, router="hyper_moe", router_args={"k": 1})
    layer = build_layer(plan, SPEC, part="vision").eval()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(30, HIDDEN)
    with layer.scope.recording() as routings:
        y = layer(x)
    side = layer.side(x, routings["vision", 0])
    assert 0 < side.norm().item() < 1e-3 * y.norm().item()
    count = sum(p.numel() for p in layer.side.parameters())
    z, u, b = 128, 16, 64
    assert count == 4 * z + 2 * (z * z + z) + u * z + u + u * (2 * b * HIDDEN + b + HIDDEN)


def test_hyper_moe_draws_all_of_the_branch_from_the_generator() -> None:
    side = hyper_expert()
    draws = []
    for seed in (1, 1, 2):
        side.reset_parameters(torch.Generator().manual_seed(seed))
        draws.append({name: p.clone() for name, p in side.named_parameters()})
    for name in draws[0]:
        assert torch.equal(draws[0][name], draws[1][name])
        assert name.endswith("_bias") or not torch.equal(draws[0][name], draws[2][name])
