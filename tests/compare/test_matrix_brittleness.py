"""Losing the top expert: which slots are left, with which weights, and that the context changes nothing for good."""

from __future__ import annotations

import pytest
import torch

from llava_moe.compare.brittleness import top_expert_dropped, without_top
from llava_moe.moe import LayerPlan, MlpSpec, Routing, build_layer

E = 4


def routing(index: list[list[int]], weight: list[list[float]], probs: list[list[float]]) -> Routing:
    probs_TE = torch.tensor(probs)
    return Routing(probs_TE.log(), probs_TE, torch.tensor(index), torch.tensor(weight))


def layer(router: str = "top_k", num_experts: int = E, **args: object) -> torch.nn.Module:
    spec = MlpSpec(
        8, 16, "silu", gated=True, bias=False, gate_name="gate_proj", up_name="up_proj", down_name="down_proj"
    )
    torch.manual_seed(0)
    made = build_layer(LayerPlan(num_experts=num_experts, router=router, router_args=args), spec)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def test_the_second_takes_over_with_the_whole_weight() -> None:
    found = without_top(routing([[2, 0]], [[0.7, 0.3]], [[0.3, 0.0, 0.7, 0.0]]))
    assert found.index_TK.tolist() == [[E, 0]]
    assert found.weight_TK.tolist() == [[0.0, pytest.approx(1.0)]]


def test_sums_other_than_one_and_signs_are_kept() -> None:
    found = without_top(routing([[2, 0, 1]], [[-1.2, 0.4, -0.4]], [[0.2, 0.1, 0.7, 0.0]]))
    assert found.index_TK.tolist() == [[E, 0, 1]]
    assert found.weight_TK[0].tolist() == pytest.approx([0.0, 1.0, -1.0])


def test_a_single_slot_goes_to_the_best_other_expert() -> None:
    found = without_top(routing([[1], [3]], [[0.6], [1.0]], [[0.1, 0.6, 0.05, 0.25], [0.4, 0.1, 0.3, 0.2]]))
    assert found.index_TK.tolist() == [[3], [0]]
    assert found.weight_TK.flatten().tolist() == pytest.approx([0.6, 1.0])


def test_empty_slots_and_tokens_without_experts_stay() -> None:
    found = without_top(routing([[E, 1, 3], [E, E, E]], [[0.0, 0.5, 0.25], [0.0, 0.0, 0.0]], [[0.25] * 4] * 2))
    assert found.index_TK.tolist() == [[E, E, 3], [E, E, E]]
    assert found.weight_TK[0].tolist() == pytest.approx([0.0, 0.0, 0.75])
    assert found.weight_TK[1].tolist() == [0.0, 0.0, 0.0]


def test_an_expert_in_two_slots_is_lost_from_both() -> None:
    found = without_top(routing([[1, 1, 2]], [[0.5, 0.3, 0.2]], [[0.0, 0.8, 0.2, 0.0]]))
    assert found.index_TK.tolist() == [[E, E, 2]]
    assert found.weight_TK[0].tolist() == pytest.approx([0.0, 0.0, 1.0])


@pytest.mark.parametrize("k", [1, 2])
def test_a_layer_answers_as_its_remaining_experts_do(k: int) -> None:
    made, x = layer(k=k), torch.randn(1, 6, 8)
    before = made(x)
    with made.scope.recording() as seen:
        made(x)
    (whole,) = seen.values()
    expected = without_top(whole)
    begun: list[int] = []
    with top_expert_dropped(lambda: begun.append(1)):
        found = made(x)
        made(x)
    assert begun == [1]  # once, however many calls there are
    by_hand = made.experts(x.reshape(-1, 8), expected.index_TK, expected.weight_TK).reshape(1, 6, 8)
    assert torch.equal(found, by_hand)
    assert not torch.allclose(found, before)
    assert torch.equal(made(x), before)  # nothing is left behind


def test_the_hooks_go_with_an_error() -> None:
    made, x = layer(num_experts=1, k=1), torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="single expert"), top_expert_dropped():
        made(x)
    assert made(x).shape == (1, 3, 8)


def test_a_dense_model_loses_nothing() -> None:
    begun: list[int] = []
    with top_expert_dropped(lambda: begun.append(1)):
        torch.nn.Linear(3, 3)(torch.ones(1, 3))
    assert begun == []
