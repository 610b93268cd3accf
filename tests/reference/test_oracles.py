"""The oracles themselves, against numbers worked out by hand; and that none is missing."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llava_moe.moe import BALANCE_LOSSES, ROUTERS
from tests.reference import oracles
from tests.reference import oracles_routers as routers


def test_every_router_and_loss_has_an_oracle_of_its_name() -> None:
    assert set(oracles.ROUTERS) == set(ROUTERS.names())
    assert set(oracles.BALANCE_LOSSES) == set(BALANCE_LOSSES.names())


Z = [math.log(0.2), math.log(0.5), math.log(0.3)]  # one token whose softmax is 0.2, 0.5, 0.3


def select(name: str, z: list[float], state: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    config = SimpleNamespace(**{"k": 2, "scheduled_k": False, **options})
    arrays = {key: np.array(value) for key, value in (state or {}).items()}
    return routers.SELECTOR_ORACLES[name](arrays, config, z)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("softmax_topk_renorm", [0, 5 / 8, 3 / 8]),
        ("softmax_topk", [0, 0.5, 0.3]),
        ("topk_softmax", [0, 5 / 8, 3 / 8]),
        ("double_softmax", [0, 1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(0.2))]),
    ],
)
def test_top_k_by_hand(convention: str, expected: list[float]) -> None:
    gates, probs = select(convention, Z)
    assert gates == pytest.approx(expected)
    assert probs == pytest.approx([0.2, 0.5, 0.3])
    one, _ = select(convention, Z, {"schedule.active_k": 1.0}, scheduled_k=True)
    assert one == pytest.approx([0, 0.5 if convention == "softmax_topk" else 1, 0])


def test_sigmoids_by_hand() -> None:
    z = [0.0, math.log(3), -math.log(3)]  # sigmoids of 1/2, 3/4, 1/4
    assert select("sigmoid_topk", z)[0] == pytest.approx([0.5, 0.75, 0])
    assert select("sigmoid_topk_renorm", z)[0] == pytest.approx([0.4, 0.6, 0])
    assert select("sigmoid_topk", z)[1] == pytest.approx([1 / 3, 1 / 2, 1 / 6])


def test_groups_by_hand() -> None:
    z = [0.0, math.log(3), -math.log(3), math.log(3)]
    options = {"num_groups": 2, "topk_groups": 1, "score": "sigmoid", "renormalise": True, "scale": 2.0}
    no_bias = {"selection_bias_E": [0.0, 0, 0, 0]}
    gates, _ = select("group_limited", z, no_bias, group_score="top2", **options)
    assert gates == pytest.approx([0.8, 1.2, 0, 0])  # 1/2 + 3/4 beats 1/4 + 3/4
    gates, _ = select("group_limited", z, {"selection_bias_E": [0.0, 0, 0, 1]}, group_score="top2", **options)
    assert gates == pytest.approx([0, 0, 0.5, 1.5])  # the bias chooses and does not weigh


def test_variable_numbers_by_hand() -> None:
    assert select("top_p", Z, p=0.5, k_max=None)[0] == pytest.approx([0, 1, 0])
    assert select("top_p", Z, p=0.51, k_max=None)[0] == pytest.approx([0, 5 / 8, 3 / 8])
    assert select("top_p", Z, p=0.9, k_max=2)[0] == pytest.approx([0, 5 / 8, 3 / 8])
    assert select("relu", [-1.0, 2.0, 0.5])[0] == [0, 2, 0.5]
    assert select("dense_softmax", Z)[0] == pytest.approx([0.2, 0.5, 0.3])
    half = {"temperature": 0.5}  # squares the odds: 4, 25, 9
    assert select("dts", Z, half, k=1, hard_at=None)[0] == pytest.approx([0, 25 / 38, 0])
    assert select("dts", Z, half, k=2, hard_at=0.5)[0] == pytest.approx([0, 25 / 34, 9 / 34])


def test_scorers_by_hand() -> None:
    x = [3.0, 4.0]

    def score(name: str, state: dict[str, Any], **options: Any) -> list[float]:
        arrays = {key: np.array(value) for key, value in state.items()}
        return routers.SCORER_ORACLES[name](arrays, SimpleNamespace(**options), x)

    rows = {"weight": [[1.0, 0.0], [0.0, -2.0]]}
    cosines = {"temperature": 0.5, "learn_temperature": False}
    assert score("linear", {**rows, "bias": [1.0, 0.0]}) == pytest.approx([4, -8])
    assert score("cosine", rows, **cosines) == pytest.approx([1.2, -1.6])
    assert score("perturbed_cosine", rows, theta1=1.0, theta2=2.0, **cosines) == pytest.approx([1 / 3, -2 / 3])
    assert score("logit_norm", rows, scale=2.0) == pytest.approx([2, -2])
    learned = {"projection": [[1.0, 0.0], [0.0, 1.0]], "embeddings": [[0.0, 5.0]], "temperature.log_value": [0.0]}
    assert score("xmoe", learned, learn_temperature=True, normalise_input=True, embedding_norm=1.5) == pytest.approx(
        [1.2]
    )
    # v = (1, -1); h = relu(v . 1 + 2) = 2; the row (2, 4) and the bias -2
    network = {
        "embedding": [1.0, -1.0], "in_weight": [[1.0, 1.0]], "in_bias": [2.0],
        "out_weight": [[1.0], [2.0], [-1.0]], "out_bias": [0.0, 0.0, 0.0],
    }  # fmt: skip
    assert score("hyper", network) == pytest.approx([2 * 3 + 4 * 4 - 2])
    assert score("two_layer", {"in_weight": [[0.0, 0.25]], "out_weight": [[2.0]]}) == pytest.approx([2 * math.tanh(1)])


def test_hash_by_hand() -> None:
    """Ids by the table; of each sequence the picture tokens by their own count."""
    state = {
        "table_VK": np.array([[0.0], [1.0]]),
        "position_table_VK": np.array([[2.0], [0.0], [1.0]] + [[0.0]] * 4093),
    }
    context = {
        "sequence_T": [0, 0, 0, 0, 1, 1],
        "modality_T": [0, 1, 1, 1, 1, 0],
        "token_mask_T": [True, True, False, True, True, True],
        "token_ids_T": [3, 0, 0, 0, 0, 4],
    }
    gates, _ = routers.ROUTERS["hash"](state, SimpleNamespace(k=1, by="token"), np.zeros((6, 1)), context)
    assert gates.argmax(-1).tolist() == [1, 2, 0, 0, 2, 0]


def test_mixture_by_hand() -> None:
    # relu experts of width 1: the first doubles a positive input, the second adds one
    output = oracles.mixture(
        [[3.0], [-1.0]], [[0, 1], [1, 2]], [[0.5, 0.25], [1.0, 9.0]], [[[2.0]], [[1.0]]], [[[1.0]], [[1.0]]],
        [[0.0], [1.0]], [[0.0], [0.0]], "relu", False,
    )  # fmt: skip
    assert output == [[0.5 * 6 + 0.25 * 4], [0.0]]


def test_gated_expert_by_hand() -> None:
    assert oracles.expert([2.0], [[1.0], [3.0]], [[0.5]], None, None, "relu", True) == [0.5 * 2 * 6]
