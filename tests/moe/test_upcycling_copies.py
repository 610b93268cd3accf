"""What the papers, or arithmetic, say about copy, noise, drop, virtual groups and branch-train-mix."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from llava_moe.moe import UPCYCLERS, MlpSpec, MoELayer, StackedExperts
from llava_moe.moe.upcycling import Contract, DenseMlp, mean_tensor
from tests.moe.cases import make_router
from tests.moe.upcycling_cases import HIDDEN, NUM_EXPERTS, SPECS, WIDTH, DenseBlock, upcycle
from tests.reference import oracles_upcycling as oracles

GATED = SPECS["gated"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Sparse upcycling


def test_weights_that_sum_to_less_scale_the_output() -> None:
    made = upcycle(("copy", {}), SPECS["plain"], ("top_k", {"k": 2, "convention": "softmax_topk"}))
    x = torch.randn(20, HIDDEN)
    with made.layer.scope.recording() as routings:
        found = made.layer(x)
    total = routings["decoder", 0].weight_TK.sum(-1, keepdim=True)
    assert float(total.detach().max()) < 1
    torch.testing.assert_close(found, made.dense(x) * total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "router"),
    [(("copy", {}), {"k": 2}), (("virtual_group", {"granularity": 2}), {"k": 4})],
    ids=["copy", "virtual_group"],
)
def test_gradients_of_the_experts_add_up_to_the_dense_one(case: tuple, router: dict) -> None:
    """Of the first matrix, which carries no factor; and the first step moves the experts apart."""
    made = upcycle(case, GATED, ("top_k", router))
    x, target = torch.randn(30, HIDDEN), torch.randn(30, HIDDEN)
    for model in (made.layer, made.dense):
        (model(x) - target).square().mean().backward()
    grown = made.layer.experts.gate_up_proj.grad
    group = case[1].get("granularity", 1)
    assert not torch.allclose(grown[0], grown[group]), "copies of one shard see different tokens"
    shards = grown.unflatten(0, (-1, group)).sum(0).unflatten(1, (2, -1))
    whole = torch.cat([made.dense.gate_proj.weight.grad, made.dense.up_proj.weight.grad])
    torch.testing.assert_close(shards.transpose(0, 1).reshape_as(whole), whole, rtol=1e-4, atol=1e-6)


def test_optimiser_moments_are_copied_like_weights() -> None:
    """An upcycler is a map of tensors, so the moments of Adam go through it as they are."""
    block = DenseBlock(GATED)
    optimiser = torch.optim.Adam(block.parameters())
    block(torch.randn(5, HIDDEN)).square().sum().backward()
    optimiser.step()
    moments = {name: optimiser.state[p]["exp_avg"] for name, p in block.named_parameters()}
    first = torch.cat([moments["gate_proj.weight"], moments["up_proj.weight"]])
    dense = DenseMlp(first, moments["down_proj.weight"], None, None)
    tensors = UPCYCLERS.get("copy").build({})(dense, GATED, 3, torch.Generator())
    assert all(torch.equal(tensors["gate_up_proj"][e], first) for e in range(3))
    assert all(torch.equal(tensors["down_proj"][e], moments["down_proj.weight"]) for e in range(3))


# Noise and drop upcycling


def large(gated: bool = True) -> tuple[DenseMlp, MlpSpec]:
    """Matrices with different statistics each, so that a mix-up would show."""
    spec = MlpSpec(64, 100, "silu", gated, True, "gate_proj" if gated else None, "up_proj", "down_proj")
    block = DenseBlock(spec)
    with torch.no_grad():
        for place, parameter in enumerate(block.parameters()):
            parameter.normal_(mean=0.1 * place, std=0.2 + 0.1 * place)
    return DenseMlp.read(block, spec), spec


def matrices(first: Tensor, down: Tensor, width: int) -> list[Tensor]:
    """Gate, up and down with one neuron a row."""
    return [*first.split(width), down.t()]


@pytest.mark.parametrize("case", [("drop", {"ratio": 0.0}), ("noise", {"fraction": 0.0}), ("noise", {"std": 0.0})])
def test_nothing_changed_is_a_copy_bit_for_bit(case: tuple) -> None:
    dense, spec = large()
    upcycler = UPCYCLERS.get(case[0]).build(case[1])
    found = upcycler(dense, spec, 3, torch.Generator())
    copies = UPCYCLERS.get("copy").build({})(dense, spec, 3, torch.Generator())
    assert upcycler.contract is Contract.EXACT_ANY_ROUTER
    assert all(torch.equal(found[name], copies[name]) for name in copies)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("indices", ["shared", "independent"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.333, 1.0])
def test_drop_redraws_whole_neurons(ratio: float, indices: str, gated: bool) -> None:
    dense, spec = large(gated)
    upcycler = UPCYCLERS.get("drop").build({"ratio": ratio, "indices": indices})
    tensors = upcycler(dense, spec, 4, torch.Generator().manual_seed(0))
    before = matrices(dense.first, dense.down, 100)
    first = tensors["gate_up_proj" if gated else "up_proj"]
    for e in range(4):
        redrawn = []
        for old, new in zip(before, matrices(first[e], tensors["down_proj"][e], 100), strict=True):
            same = (old == new).all(dim=1)
            assert (~(old == new)).any(dim=1).eq(~same).all()
            assert int((~same).sum()) == int(ratio * 100)
            replaced, fresh = old[~same], new[~same]
            error = float(replaced.std()) / math.sqrt(replaced.numel())
            assert abs(float(fresh.mean() - replaced.mean())) < 4 * error
            assert abs(float(fresh.std() / replaced.std()) - 1) < 4 / math.sqrt(2 * replaced.numel())
            redrawn.append(set((~same).nonzero().flatten().tolist()))
        alike = all(chosen == redrawn[0] for chosen in redrawn)
        assert alike == (indices == "shared" or ratio == 1.0)
        for name in ("down_bias", "gate_up_bias" if gated else "up_bias"):
            assert torch.equal(tensors[name][e], dense.down_bias if name == "down_bias" else dense.first_bias)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert not any(torch.equal(first[a], first[b]) for a, b in pairs), "each expert has a draw of its own"


def test_drop_counts_neurons_as_int_does() -> None:
    dense, spec = large()
    tensors = UPCYCLERS.get("drop").build({"ratio": 0.019})(dense, spec, 1, torch.Generator())
    assert int((tensors["down_proj"][0] != dense.down).any(dim=0).sum()) == 1


def test_noise_has_the_size_and_the_share_that_were_asked_for() -> None:
    dense, spec = large()
    tensors = UPCYCLERS.get("noise").build({"std": 0.05, "fraction": 0.3})(dense, spec, 2, torch.Generator())
    for name, before in (("gate_up_proj", dense.first), ("down_proj", dense.down)):
        change = tensors[name] - before
        hit = change != 0
        assert abs(float(hit.float().mean()) - 0.3) < 0.02
        assert abs(float(change[hit].std()) / 0.05 - 1) < 0.05
        assert not torch.equal(change[0], change[1])
    assert torch.equal(tensors["gate_up_bias"], dense.first_bias.expand(2, -1))


def test_from_scratch_takes_nothing_over() -> None:
    dense, spec = large()
    tensors = UPCYCLERS.get("from_scratch").build({"std": 0.1})(dense, spec, 3, torch.Generator())
    for name in ("gate_up_proj", "down_proj"):
        assert abs(float(tensors[name].std()) / 0.1 - 1) < 0.05
        assert not torch.equal(tensors[name][0], tensors[name][1])
    assert not tensors["down_bias"].any()
    assert not tensors["gate_up_bias"].any()


# Virtual groups


def test_experts_are_replicas_of_shards_and_router_rows_are_tied() -> None:
    made = upcycle(("virtual_group", {"granularity": 4}), GATED, ("top_k", {"k": 4}))
    shards = made.tensors["gate_up_proj"].unflatten(0, (2, 4))
    assert torch.equal(shards[0], shards[1])
    gate, up = (made.dense.get_submodule(name).weight for name in ("gate_proj", "up_proj"))
    for place, (some_gate, some_up) in enumerate(zip(gate.split(10), up.split(10), strict=True)):
        assert torch.equal(shards[0, place], torch.cat([some_gate, some_up]))
    rows = made.router.scorer.weight.unflatten(0, (2, 4))
    assert all(torch.equal(rows[:, 0], rows[:, place]) for place in range(4))
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("num_experts", "granularity", "k", "root"), [(64, 8, 8, 4.0), (8, 1, 2, 1.5874)], ids=["E8G8T8", "E8G1T2"]
)
def test_scale_of_the_paper(num_experts: int, granularity: int, k: int, root: float) -> None:
    upcycler = UPCYCLERS.get("virtual_group").build({"granularity": granularity})
    router = make_router(("top_k", {"k": k, "convention": "softmax_topk"}), HIDDEN, num_experts)
    upcycler.prepare_router(router)
    scale = upcycler.factor(router)
    assert scale == pytest.approx(oracles.virtual_group_scale(num_experts // granularity, granularity, k), rel=1e-5)
    assert scale ** (1 / 3) == pytest.approx(root, abs=1e-4)
    for convention in ("topk_softmax", "softmax_topk_renorm"):
        router = make_router(("top_k", {"k": k, "convention": convention}), HIDDEN, num_experts)
        assert upcycler.factor(router) == granularity


def virtual_group_error(spec: MlpSpec, args: dict, router: dict, num_experts: int, router_std: float) -> float:
    """Relative distance to the dense block; a softmax before top-k needs equal scores to be exact."""
    block, x = DenseBlock(spec), torch.randn(200, spec.hidden)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    upcycler = UPCYCLERS.get("virtual_group").build(args)
    gate = make_router(("top_k", router), spec.hidden, num_experts)
    with torch.no_grad():
        gate.scorer.weight.normal_(std=router_std)
    upcycler.prepare_router(gate)
    tensors = upcycler(DenseMlp.read(block, spec), spec, num_experts, torch.Generator(), None, gate)
    experts = StackedExperts.build(upcycler.expert_spec(spec, num_experts), num_experts, {"kernel": "loop"})
    experts.load_state_dict(tensors)
    expected, found = block(x).detach(), MoELayer(gate, experts)(x).detach()
    return float((found - expected).norm() / expected.norm())


def test_where_the_cube_root_rule_is_exact_and_where_not() -> None:
    swiglu = MlpSpec(64, 128, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    relu2 = MlpSpec(64, 128, "relu2", False, False, None, "up_proj", "down_proj")
    biased = dataclasses.replace(relu2, bias=True, activation="relu")
    rule = {"granularity": 4, "scaling": "cube_root"}
    uniform = {"k": 4, "convention": "softmax_topk"}
    for spec in (relu2, biased):  # homogeneous activations
        assert virtual_group_error(spec, rule, uniform, 16, 1e-5) < 5e-4
        assert virtual_group_error(spec, rule, {"k": 4, "convention": "topk_softmax"}, 16, 1.0) < 1e-5
    # SiLU is not homogeneous: about 20 % off where each matrix is multiplied by 2, and 30 % at 4 (E8G8T8).
    finer = rule | {"granularity": 8}
    assert virtual_group_error(swiglu, finer, {"k": 8}, 16, 1.0) == pytest.approx(0.20, abs=0.03)
    paper = {"k": 8, "convention": "softmax_topk"}
    assert virtual_group_error(swiglu, finer, paper, 64, 1e-5) == pytest.approx(0.31, abs=0.04)
    exact = {"granularity": 4}
    assert virtual_group_error(swiglu, exact, {"k": 4}, 16, 1.0) < 1e-5
    assert virtual_group_error(swiglu, exact, {"k": 8}, 16, 1.0) < 1e-5, "two whole replicas"
    assert virtual_group_error(swiglu, exact, uniform, 16, 1e-5) < 5e-4
    # The largest of unequal probabilities are above 1 / E, so the factor is too large then.
    assert 0.05 < virtual_group_error(swiglu, exact, uniform, 16, 0.02) < 0.5


def test_virtual_group_promises_only_what_it_can_keep() -> None:
    upcycler = UPCYCLERS.get("virtual_group").build({"granularity": 4})

    def promise(k: int, convention: str = "softmax_topk_renorm", tied: bool = True) -> Contract:
        router = make_router(("top_k", {"k": k, "convention": convention}), HIDDEN, NUM_EXPERTS)
        if tied:
            upcycler.prepare_router(router)
        return upcycler.contract_with(router)

    assert promise(4) is promise(8) is Contract.EXACT_ANY_ROUTER
    assert promise(4, "softmax_topk") is Contract.EXACT_UNIFORM_ROUTER
    assert promise(2) is promise(6) is Contract.NONE, "a replica is not whole"
    assert promise(4, tied=False) is Contract.NONE, "nobody prepared the router"


def test_shuffled_replicas_are_whole_and_different() -> None:
    """Qwen2-57B: every replica is shuffled before it is split; without a redraw the function stays."""
    made = upcycle(("virtual_group", {"granularity": 4, "shuffle": True}), GATED, ("top_k", {"k": 4}))
    up = made.tensors["gate_up_proj"].unflatten(0, (2, 4))[:, :, 10:].reshape(2, WIDTH, HIDDEN)
    wanted = sorted(made.dense.up_proj.weight.tolist())
    assert sorted(up[0].tolist()) == sorted(up[1].tolist()) == wanted
    assert not torch.equal(up[0], up[1])
    redrawn = upcycle(("virtual_group", {"granularity": 4, "redraw": 0.5}), GATED, ("top_k", {"k": 4}))
    rows = redrawn.tensors["gate_up_proj"][:, 10:].reshape(2 * WIDTH, HIDDEN).tolist()
    known = {tuple(row) for row in redrawn.dense.up_proj.weight.tolist()}
    assert sum(tuple(row) in known for row in rows) == WIDTH


# Branch-Train-MiX


def test_identical_parents_are_sparse_upcycling() -> None:
    spec = SPECS["gated-bias"]
    dense = DenseMlp.read(DenseBlock(spec), spec)
    mixed = UPCYCLERS.get("branch_train_mix").build({})([dense] * 3, spec, 3, torch.Generator())
    copies = UPCYCLERS.get("copy").build({})(dense, spec, 3, torch.Generator())
    assert all(torch.equal(mixed[name], copies[name]) for name in copies)


def test_each_expert_is_the_block_of_one_parent() -> None:
    made = upcycle(("branch_train_mix", {}), GATED)
    assert made.upcycler.num_parents(NUM_EXPERTS) == NUM_EXPERTS
    x = torch.randn(6, HIDDEN)
    for e, block in enumerate(made.blocks):
        found = made.layer.experts(x, torch.full((6, 1), e), torch.ones(6, 1))
        torch.testing.assert_close(found, block(x), rtol=1e-5, atol=1e-6)


def test_other_tensors_are_averaged() -> None:
    tensors = [torch.randn(4, 5, dtype=torch.bfloat16) for _ in range(3)]
    wanted = torch.stack([t.double() for t in tensors]).mean(0).to(torch.bfloat16)
    assert torch.equal(mean_tensor(tensors), wanted)
    assert torch.equal(mean_tensor([tensors[0]] * 7), tensors[0])
    assert mean_tensor([torch.ones(2, dtype=torch.float64)]).dtype == torch.float64
    with pytest.raises(ValueError, match="only tensors of one shape have a mean"):
        mean_tensor([torch.ones(2), torch.ones(3)])
