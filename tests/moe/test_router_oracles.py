"""Every router against its oracle: what it computes, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava_moe.moe import SCORERS, SELECTORS
from tests.moe.cases import (
    HIDDEN,
    NUM_EXPERTS,
    ROUTER_CASES,
    Case,
    as_numpy,
    case_id,
    full_context,
    make_router,
    part_for,
    state_as_numpy,
)
from tests.reference import oracles
from tests.reference.oracles_routers import SCORER_ORACLES, SELECTOR_ORACLES


def test_every_part_has_an_oracle() -> None:
    # grap is held to its formula with the routers that are made of it
    assert set(SCORER_ORACLES) == set(SCORERS.names()) - {"grap"}
    assert set(SELECTOR_ORACLES) == set(SELECTORS.names())


def oracle_cases() -> list[tuple[Case, int]]:
    """Every battery case that has an oracle of its own, and groups of more than one expert."""
    more: list[tuple[Case, int]] = [
        (("deepseek_v2", {"k": 3, "num_groups": 4, "topk_groups": 2}), 12),
        (("deepseek_v3", {"k": 3, "num_groups": 4, "topk_groups": 2, "scale": 2.5}), 12),
        (("deepseek_v3", {"k": 2, "num_groups": 3, "topk_groups": 1}), 6),
        (("cosine", {"temperature": 0.1, "k": 3}), 6),
        (("perturbed_cosine", {"theta1": 1.0, "learn_temperature": True}), 6),
        (("top_p", {"p": 1.0}), 6),
        (("scored", {"scorer": "logit_norm", "selector": "relu"}), 6),
        (("scored", {"scorer": "xmoe", "selector": "group_limited", "selector_args": {"score": "softmax"}}), 6),
    ]
    return [(case, NUM_EXPERTS) for case in ROUTER_CASES] + more


@pytest.mark.parametrize(
    ("case", "num_experts"), oracle_cases(), ids=[f"{case_id(case)}-E={e}" for case, e in oracle_cases()]
)
def test_equals_its_oracle(case: Case, num_experts: int) -> None:
    router = make_router(case, num_experts=num_experts).eval()
    for name, value in router.named_buffers():
        if name.endswith("selection_bias_E"):
            value.normal_(std=0.3)
    x, context = torch.randn(14, HIDDEN), full_context(14, num_experts, part=part_for(case))
    routing = router(x, context)
    gates, probs = oracles.ROUTERS[case[0]](
        state_as_numpy(router), router.config, x.double().numpy(), as_numpy(context)
    )
    np.testing.assert_allclose(routing.gates_TE().detach().numpy(), gates, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(routing.probs_TE.detach().numpy(), probs, rtol=1e-4, atol=1e-5)


GRADIENT_CASES: list[Case] = [
    ("top_k", {}),
    ("top_k", {"convention": "softmax_topk", "bias": True}),
    ("top_k", {"convention": "topk_softmax"}),
    ("noisy_top_k", {}),
    ("sigmoid", {}),
    ("sigmoid", {"renormalise": True}),
    ("cosine", {"learn_temperature": True}),
    ("perturbed_cosine", {"selector": "double_softmax", "selector_args": {"bias": True}}),
    ("xmoe", {"selector": "double_softmax"}),
    ("hyper_router", {}),
    ("deepseek_v2", {}),
    ("deepseek_v3", {"scale": 2.5}),
    ("remoe", {}),
    ("dts", {"k": 2}),
    ("skywork", {}),
    ("top_p", {"p": 0.8}),
    ("dense", {}),
    ("scored", {"scorer": "two_layer", "scorer_args": {"multiple": 1}}),
]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=case_id)
def test_gradients_are_those_of_the_oracle(case: Case) -> None:
    """Central differences of the float64 oracle, with respect to the tokens and every parameter."""
    hidden, num_experts = 3, 4
    router, x = make_router(case, hidden, num_experts).eval(), torch.randn(3, hidden, requires_grad=True)
    context = full_context(3, num_experts, hidden)
    scale = torch.randn(2, 3, num_experts)
    routing = router(x, context)
    (scale[0] * routing.gates_TE() + scale[1] * routing.probs_TE).sum().backward()
    state, rows = state_as_numpy(router), x.detach().double().numpy()

    def value() -> float:
        gates, probs = oracles.ROUTERS[case[0]](state, router.config, rows, as_numpy(context))
        return float((scale[0].double().numpy() * gates + scale[1].double().numpy() * probs).sum())

    leaves = {name: p for name, p in router.named_parameters() if p.grad is not None}
    assert leaves
    for name, array, gradient in [("x", rows, x.grad), *((n, state[n], p.grad) for n, p in leaves.items())]:
        found = np.empty_like(array)
        for place in np.ndindex(*array.shape):
            original, sides = array[place], []
            for step in (1e-6, -1e-6):
                array[place] = original + step
                sides.append(value())
            array[place] = original
            found[place] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(gradient.numpy(), found, rtol=2e-3, atol=2e-5, err_msg=name)
