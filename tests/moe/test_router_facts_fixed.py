"""Routers that learn nothing: random and hash."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llava_moe.moe import ROUTERS, RoutingContext
from tests.moe.cases import HIDDEN, NUM_EXPERTS, full_context, make_router


def context(num_tokens: int) -> RoutingContext:
    return RoutingContext.trivial(num_tokens)


# Random


def test_random_training_is_uniform_over_distinct_experts() -> None:
    router = make_router(("random", {"k": 2})).train()
    routing = router(torch.randn(1, HIDDEN).expand(5000, HIDDEN), context(5000))
    assert (routing.index_TK[:, 0] != routing.index_TK[:, 1]).all()
    torch.testing.assert_close(routing.load_E() / 5000, torch.full((5,), 0.4), rtol=0, atol=0.03)
    assert not router.learned
    assert not list(router.parameters())


def test_random_evaluation_spreads_even_tokens_that_lie_close_together() -> None:
    """Hidden states of one model share a large mean; a plain random projection would send them all one way."""
    router = ROUTERS.get("random").build(64, 8, {"k": 1}).eval()
    x = torch.randn(1, 64) + 0.4 * torch.randn(4000, 64)
    load = router(x, context(4000)).load_E() / 4000
    assert load.max() < 0.3
    assert load.min() > 0.03
    # Rounding to bfloat16 moves few tokens.
    moved = (router(x.bfloat16(), context(4000)).index_TK != router(x, context(4000)).index_TK).float().mean()
    assert moved < 0.05


# Hash


def hash_context(ids: list[int], sequences: list[int], pictures: list[int] | None = None) -> RoutingContext:
    return RoutingContext(
        token_mask_T=torch.ones(len(ids), dtype=torch.bool),
        sequence_T=torch.tensor(sequences),
        modality_T=None if pictures is None else torch.tensor(pictures),
        token_ids_T=torch.tensor(ids),
    )


def test_equal_ids_have_equal_experts_in_every_run_and_layer() -> None:
    one, two = (ROUTERS.get("hash").build(HIDDEN, NUM_EXPERTS, {"k": 2}) for _ in range(2))
    ids = hash_context([5, 9, 5, 70000, 9], [0] * 5)
    found, again = (router(torch.randn(5, HIDDEN), ids).index_TK for router in (one, two))
    assert torch.equal(found, again)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[4])
    apart = ROUTERS.get("hash").build(HIDDEN, NUM_EXPERTS, {"k": 2, "seed": 1})
    assert not torch.equal(one.get_buffer("table_VK"), apart.get_buffer("table_VK"))
    drawn = ROUTERS.get("hash").build(HIDDEN, NUM_EXPERTS, {"seed": None})
    first = drawn.get_buffer("table_VK").clone()
    drawn.reset_parameters()
    assert not torch.equal(first, drawn.get_buffer("table_VK")), "without a seed the layers differ"
    assert not list(one.parameters())


def test_random_table_is_about_balanced_and_modulo_exactly() -> None:
    table = ROUTERS.get("hash").build(HIDDEN, 8, {"k": 2}).get_buffer("table_VK")
    assert table.shape == (65536, 2)
    assert (table[:, 0] != table[:, 1]).all()
    counts = torch.bincount(table.reshape(-1), minlength=8) / (65536 * 2)
    torch.testing.assert_close(counts, torch.full((8,), 1 / 8), rtol=0.03, atol=0)
    modulo = ROUTERS.get("hash").build(HIDDEN, 8, {"table": "modulo", "rows": 80}).get_buffer("table_VK")
    assert torch.bincount(modulo.reshape(-1)).tolist() == [10] * 8


@pytest.mark.parametrize("k", [1, 2])
def test_balanced_table_evens_out_the_frequencies(k: int) -> None:
    frequencies = tuple(1000.0 / (rank + 1) for rank in range(500))
    options = {"table": "balanced", "frequencies": frequencies, "k": k}
    table = ROUTERS.get("hash").build(HIDDEN, 6, options).get_buffer("table_VK")
    loads = torch.zeros(6).index_add(0, table.reshape(-1), torch.tensor(frequencies).repeat_interleave(k))
    assert loads.max() - loads.min() <= max(frequencies) + 1e-2
    assert all(len(set(row)) == k for row in table.tolist())


def test_picture_tokens_go_by_their_place_among_those_of_their_sequence() -> None:
    router = ROUTERS.get("hash").build(HIDDEN, NUM_EXPERTS, {})
    places = router.get_buffer("position_table_VK")
    assert torch.bincount(places[:4095, 0]).tolist() == pytest.approx([819] * 5, abs=1)
    # text, three picture tokens, text; then another sequence of two picture tokens
    ids = hash_context([7, 3, 3, 3, 7, 3, 3], [0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1])
    found = router(torch.randn(7, HIDDEN), ids).index_TK
    assert torch.equal(found[1:4], places[:3])
    assert torch.equal(found[5:7], places[:2]), "batch mates do not count"
    assert torch.equal(found[0], found[4])
    masked = dataclasses.replace(ids, token_mask_T=torch.tensor([False, False, True, True, True, True, True]))
    found = router(torch.randn(7, HIDDEN), masked).index_TK
    assert torch.equal(found[2:4], places[:2]), "padding does not count"


def test_where_ids_are_missing() -> None:
    with pytest.raises(ValueError, match="token_ids_T is missing"):
        ROUTERS.get("hash").build(HIDDEN, NUM_EXPERTS, {})(torch.randn(4, HIDDEN), context(4))
    by_place = ROUTERS.get("hash").build(HIDDEN, NUM_EXPERTS, {"by": "position"})
    assert by_place.needs == ()
    assert ROUTERS.get("hash").needs == ("token_ids_T",)
    tower = dataclasses.replace(full_context(6, part="vision"), token_ids_T=None, modality_T=None)
    places = by_place.get_buffer("position_table_VK")
    assert torch.equal(by_place(torch.randn(6, HIDDEN), tower).index_TK, torch.cat([places[:3], places[:3]]))
    with pytest.raises(ValueError, match="by='position' cannot be used in a decoder"):
        by_place(torch.randn(4, HIDDEN), context(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "balanced"}, "the table balanced needs frequencies"),
        ({"frequencies": (1.0, 2.0)}, "the table balanced needs frequencies"),
        ({"table": "balanced", "frequencies": (1.0, -2.0)}, "frequencies must be a number of at least 0"),
        ({"table": "balanced", "frequencies": (1.0,), "rows": 2}, "rows=2 must be the 1 of the frequencies"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"by": "place"}, "unknown by 'place'"),
        ({"table": "ballanced"}, "did you mean 'balanced'"),
        ({"by": "position", "table": "modulo"}, "table, rows and frequencies are for by='token'"),
    ],
)
def test_contradictory_hash_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS.get("hash").build(HIDDEN, NUM_EXPERTS, options)
