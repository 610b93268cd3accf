"""The oracles themselves, against numbers worked out by hand; and that none is missing."""

from __future__ import annotations

import math

import pytest

from llava_moe.moe import BALANCE_LOSSES, ROUTERS
from tests.reference import oracles


def test_every_router_and_loss_has_an_oracle_of_its_name() -> None:
    assert set(oracles.ROUTERS) == set(ROUTERS.names())
    assert set(oracles.BALANCE_LOSSES) == set(BALANCE_LOSSES.names())


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("softmax_topk_renorm", [0.5 / 0.8, 0.3 / 0.8]),
        ("softmax_topk", [0.5, 0.3]),
        ("topk_softmax", [0.5 / 0.8, 0.3 / 0.8]),
    ],
)
def test_top_k_by_hand(convention: str, expected: list[float]) -> None:
    logits = [[math.log(0.2)], [math.log(0.5)], [math.log(0.3)]]
    indices, weights, probs = oracles.top_k([[1.0]], logits, None, k=2, convention=convention)
    assert indices == [[1, 2]]
    assert weights[0] == pytest.approx(expected)
    assert probs[0] == pytest.approx([0.2, 0.5, 0.3])


def test_mixture_by_hand() -> None:
    # relu experts of width 1: the first doubles a positive input, the second adds one
    output = oracles.mixture(
        [[3.0], [-1.0]], [[0, 1], [1, 2]], [[0.5, 0.25], [1.0, 9.0]], [[[2.0]], [[1.0]]], [[[1.0]], [[1.0]]],
        [[0.0], [1.0]], [[0.0], [0.0]], "relu", False,
    )  # fmt: skip
    assert output == [[0.5 * 6 + 0.25 * 4], [0.0]]


def test_gated_expert_by_hand() -> None:
    assert oracles.expert([2.0], [[1.0], [3.0]], [[0.5]], None, None, "relu", True) == [0.5 * 2 * 6]
