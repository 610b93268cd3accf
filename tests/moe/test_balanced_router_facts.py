"""What is particular to the routers that limit an expert: expert choice, BASE, LocMoE, expert-token resonance."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_moe.moe.capacity_bounds import ec_min, ec_min_erfc, ec_min_exp, p_delta
from llava_moe.moe.routers.balanced import balanced_assignment
from tests.moe.special_cases import HIDDEN, NUM_EXPERTS, SPEC, full_context, layer_of, make, trivial
from tests.reference import oracles_special

# Expert choice


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 6.0])
def test_expert_choice_every_expert_takes_exactly_its_capacity_of_every_sequence(factor: float) -> None:
    router, context = make(("expert_choice", {"capacity_factor": factor})), full_context(28)
    taken = router(torch.randn(28, HIDDEN), context).index_TK < NUM_EXPERTS
    for sequence, real in ((0, 14), (1, 12)):
        counts = taken[context.sequence_T == sequence].sum(0)
        assert counts.tolist() == [min(real, math.ceil(factor * real / NUM_EXPERTS))] * NUM_EXPERTS
    assert not taken[~context.token_mask_T].any()


def test_expert_choice_groups() -> None:
    """By sequence a batch mate changes nothing; by batch, and for later tokens, it does: the reason for its flags."""
    x = torch.randn(28, HIDDEN)
    other = torch.cat([x[:14], torch.randn(14, HIDDEN) * 3])
    late = torch.cat([x[:9], torch.randn(5, HIDDEN) * 3, x[14:]])
    for group, mates_matter in (("sequence", False), ("batch", True)):
        router, context = make(("expert_choice", {"group": group, "capacity_factor": 1.0})), full_context(28)
        first = router(x, context).index_TK
        assert torch.equal(first[:14], router(other, context).index_TK[:14]) != mates_matter
        assert not torch.equal(first[:9], router(late, context).index_TK[:9])
        order = torch.cat([torch.randperm(14), 14 + torch.randperm(12), torch.tensor([26, 27])])
        assert torch.equal(router(x[order], context).index_TK, first[order])


def test_expert_choice_interleaved_sequences_are_told_apart() -> None:
    router, x = make(("expert_choice", {})), torch.randn(20, HIDDEN)
    sequence = torch.arange(20) % 2
    mixed = router(x, trivial(20, sequence_T=sequence)).weight_TK
    apart = [router(x[sequence == s], trivial(10)).weight_TK for s in (0, 1)]
    torch.testing.assert_close(mixed[sequence == 0], apart[0])
    torch.testing.assert_close(mixed[sequence == 1], apart[1])


def test_expert_choice_renormalised_copies_equal_the_dense_block_where_a_token_is_taken() -> None:
    layer = layer_of("expert_choice", capacity_factor=4.0, renormalise=True)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    x = torch.randn(9, HIDDEN)
    torch.testing.assert_close(layer(x), layer.experts(x, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1)))


# BASE


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(6, 2), (6, 3), (8, 4), (7, 3), (5, 4), (3, 5), (4, 1)])
def test_balanced_assignment_is_the_optimum(num_tokens: int, num_experts: int) -> None:
    for _ in range(12):
        scores = torch.randn(num_tokens, num_experts) + 2 * torch.randn(num_experts)
        assigned = balanced_assignment(scores)
        counts = torch.bincount(assigned, minlength=num_experts)
        assert int(counts.max()) <= -(-num_tokens // num_experts)
        if num_tokens % num_experts == 0:
            assert counts.unique().tolist() == [num_tokens // num_experts]
        total = float(scores.double().gather(1, assigned.unsqueeze(1)).sum())
        assert total == pytest.approx(oracles_special.best_balanced_total(scores.double().numpy()), abs=1e-9)


def test_balanced_assignment_handles_ties_and_skew() -> None:
    assert torch.bincount(balanced_assignment(torch.zeros(12, 4))).tolist() == [3] * 4
    skewed = torch.randn(240, 8) * 0.1 + torch.arange(8.0)
    assigned = balanced_assignment(skewed)
    assert torch.bincount(assigned).tolist() == [30] * 8
    # no two tokens gain by changing places, and a greedy filling is no better
    gain = skewed[:, assigned] - skewed.gather(1, assigned.unsqueeze(1))  # token t in the place of token u
    assert float((gain + gain.t()).max()) < 1e-5
    room, greedy = [30] * 8, 0.0
    for row in skewed.tolist():
        expert = max((e for e in range(8) if room[e]), key=lambda e: row[e])
        room[expert] -= 1
        greedy += row[expert]
    assert float(skewed.gather(1, assigned.unsqueeze(1)).sum()) >= greedy - 1e-3
    assert balanced_assignment(torch.zeros(0, 3)).shape == (0,)
    with pytest.raises(ValueError, match="not finite"):
        balanced_assignment(torch.tensor([[1.0, float("nan")]]))


def test_base_layer_balances_in_training_and_takes_the_best_in_evaluation() -> None:
    router, x = make(("base_layer", {})).train(), torch.randn(24, HIDDEN)
    assert router(x, trivial(24)).load_E().tolist() == [4.0] * NUM_EXPERTS
    mask = torch.arange(24) >= 6
    routing = router(x, trivial(24, token_mask_T=mask))
    assert routing.load_E().tolist() == [3.0] * NUM_EXPERTS
    assert (routing.index_TK[:6] == NUM_EXPERTS).all()
    routing.weight_TK.sum().backward()
    assert router.centroids.grad.abs().sum() > 0
    evaluated = router.eval()(x, trivial(24))
    assert torch.equal(evaluated.index_TK[:, 0], (x @ router.centroids.t()).argmax(-1))
    torch.testing.assert_close(evaluated.weight_TK[:, 0], (x @ router.centroids.t()).max(-1).values.sigmoid())


def test_base_layer_centroids_start_orthogonal() -> None:
    for num_experts in (3, 8):
        router = make(("base_layer", {}), num_experts)
        router.reset_parameters()
        gram = router.centroids @ router.centroids.t()
        torch.testing.assert_close(gram, 0.01 * torch.eye(num_experts), atol=1e-6, rtol=0)


def test_base_layer_residual() -> None:
    layer, plain = layer_of("base_layer", residual=True).eval(), layer_of("base_layer").eval()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, HIDDEN)
    alpha = (x @ layer.router.centroids.t()).max(-1, keepdim=True).values.sigmoid()
    torch.testing.assert_close(layer(x), plain(x) + (1 - alpha) * x)
    assert plain.side is None
    with pytest.raises(ValueError, match="residual needs an output as wide as the input; 5 is not"):
        layer.router.side_branch(dataclasses.replace(SPEC, out=5))


# LocMoE and expert-token resonance


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 8])
def test_locmoe_directions_are_orthogonal_and_cover_each_dimension_once(num_experts: int) -> None:
    router = make(("locmoe", {}), num_experts)
    directions, x = router.scorer.directions, torch.rand(4, HIDDEN)
    gram = directions @ directions.t()
    assert torch.equal(gram, torch.diag(gram.diagonal()))
    assert torch.equal((directions > 0).sum(0), torch.ones(HIDDEN, dtype=torch.int64))
    torch.testing.assert_close(directions.sum(1), torch.ones(num_experts))
    bounds = [e * HIDDEN // num_experts for e in range(num_experts + 1)]
    means = [x[:, a:b].mean(1) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(router(x, trivial(4)).logits_TE, torch.stack(means, 1))
    assert list(router.parameters()) == []


def test_locmoe_tokens_below_zero_go_to_the_first_expert() -> None:
    routing = make(("locmoe", {}))(-torch.rand(3, HIDDEN), trivial(3))
    assert routing.index_TK.tolist() == [[0]] * 3
    torch.testing.assert_close(routing.weight_TK, torch.full((3, 1), 1 / NUM_EXPERTS))


@pytest.mark.parametrize(
    ("hidden", "delta", "num_experts", "probability", "least", "erfc", "exp"),
    [
        (4096, 0.03, 16, 0.0548477253, 1.13951854, 1.1404, 0.3951),
        (5120, 0.03, 16, 0.0318097, 1.9648, None, 0.6265),
        (2048, 2048**-0.5, 8, 0.3174287, 0.3937892, None, None),
    ],
)  # fmt: skip
def test_locmoe_capacity_bounds(
    hidden: int, delta: float, num_experts: int, probability: float, least: float, erfc: float | None, exp: float | None
) -> None:
    assert p_delta(hidden, delta) == pytest.approx(probability, rel=2e-6)
    assert ec_min(num_experts, hidden, delta) == pytest.approx(least, rel=2e-5)
    if erfc is not None:
        assert ec_min_erfc(num_experts, hidden, delta) == pytest.approx(erfc, rel=1e-4)
    if exp is not None:
        assert ec_min_exp(num_experts, hidden, delta) == pytest.approx(exp, rel=2e-4)
    assert ec_min_erfc(num_experts, hidden, delta) == pytest.approx(least, rel=0.01)
    assert ec_min_exp(num_experts, hidden, delta) < least


@pytest.mark.parametrize(("hidden", "delta"), [(2, 0.5), (3, 0.3), (3, 0.9), (10, 0.05), (64, 0.4), (512, 0.99)])
def test_p_delta_is_the_integral_of_the_density_of_a_cosine(hidden: int, delta: float) -> None:
    """By the angle, whose density is sin^(D - 2)."""
    angle = (np.arange(200_000) + 0.5) / 200_000 * np.pi
    density = np.sin(angle) ** (hidden - 2)
    expected = density[np.abs(np.cos(angle)) > delta].sum() / density.sum()
    assert p_delta(hidden, delta) == pytest.approx(expected, rel=2e-4, abs=1e-12)


def test_p_delta_at_its_ends() -> None:
    assert (p_delta(64, 0.0), p_delta(64, 1.0)) == (1.0, 0.0)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"delta={wrong} must be a cosine"):
            p_delta(64, wrong)
    with pytest.raises(ValueError, match="hidden=1"):
        p_delta(1, 0.5)


@pytest.mark.parametrize("k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("factor", [0.4, 1.0])
def test_resonance_is_the_intersection_of_both_choices(k: int, factor: float) -> None:
    router, context = make(("expert_token_resonance", {"k": k, "factor": factor})).train(), full_context(40)
    x = torch.randn(40, HIDDEN)
    routing = router(x, context)
    cosine = F.cosine_similarity(x.unsqueeze(1), router.directions.unsqueeze(0), dim=-1)
    torch.testing.assert_close(routing.logits_TE, cosine)
    chosen = torch.zeros_like(cosine, dtype=torch.bool).scatter(1, cosine.topk(k, dim=-1).indices, True)
    chosen &= context.token_mask_T.unsqueeze(1)
    limit = math.ceil(factor * 38 * k / NUM_EXPERTS)
    expected = torch.zeros_like(chosen)
    for e in range(NUM_EXPERTS):
        queue = sorted(chosen[:, e].nonzero().flatten().tolist(), key=lambda t: -float(cosine[t, e]))
        expected[queue[:limit], e] = True
    assert torch.equal(routing.gates_TE() > 0, expected)
    assert routing.load_E().max() <= limit
    assert torch.equal(routing.extras["dropped_T"], (chosen & ~expected).sum(1))


def test_resonance_with_room_for_all_is_token_choice() -> None:
    router, x = make(("expert_token_resonance", {"k": 2})), torch.randn(30, HIDDEN)
    evaluated = router.eval()(x, trivial(30))
    assert (evaluated.index_TK < NUM_EXPERTS).all()
    torch.testing.assert_close(evaluated.weight_TK.sum(1), torch.ones(30))
    router.train().factor.fill_(float(NUM_EXPERTS))
    assert torch.equal(router(x, trivial(30)).index_TK, evaluated.index_TK)
    router.factor.fill_(0.5)
    assert (router(x, trivial(30)).index_TK == NUM_EXPERTS).any()


def test_resonance_groups_tokens_that_are_alike() -> None:
    """Their metric: the Calinski-Harabasz index of tokens by expert beats that of random groups."""
    centres = 3 * torch.eye(NUM_EXPERTS).repeat_interleave(2, dim=1)[:, : 2 * NUM_EXPERTS]
    labels = torch.arange(60) % NUM_EXPERTS
    x = centres[labels] + torch.randn(60, 2 * NUM_EXPERTS)
    router = make(("expert_token_resonance", {}))
    wide = type(router).build(2 * NUM_EXPERTS, NUM_EXPERTS, {}).eval()
    found = wide(x, trivial(60)).index_TK[:, 0]

    def index(groups: Tensor) -> float:
        used = groups.unique()
        means = torch.stack([x[groups == g].mean(0) for g in used])
        sizes = torch.stack([(groups == g).sum() for g in used])
        between = float((sizes * (means - x.mean(0)).square().sum(1)).sum()) / (len(used) - 1)
        within = sum(float((x[groups == g] - m).square().sum()) for g, m in zip(used, means, strict=True))
        return between / (within / (60 - len(used)))

    assert index(found) > 3 * index(found[torch.randperm(60)])
