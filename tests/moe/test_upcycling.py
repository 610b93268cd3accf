"""Every registered upcycler is held to the contract it declares."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe import UPCYCLERS, MlpSpec, MoELayer, StackedExperts
from llava_moe.moe.experts import ACTIVATIONS
from llava_moe.moe.upcycling import Contract, DenseMlp
from tests.moe.cases import NUM_EXPERTS, ROUTER_CASES, SPECS, case_id, make_router, random_slots

FUSED = MlpSpec(8, 12, "silu", True, False, "gate_up_proj", "gate_up_proj", "down_proj")
ALL_SPECS = {**SPECS, "fused": FUSED}
every_upcycler = pytest.mark.parametrize("name", UPCYCLERS.names())
every_spec = pytest.mark.parametrize("spec", ALL_SPECS.values(), ids=ALL_SPECS.keys())


class DenseBlock(nn.Module):
    """A block as transformers writes it, with the child names of its spec."""

    def __init__(self, spec: MlpSpec) -> None:
        super().__init__()
        self.spec = spec
        width = 2 * spec.intermediate if spec.fused_gate else spec.intermediate
        if spec.gated and not spec.fused_gate:
            self.add_module(str(spec.gate_name), nn.Linear(spec.hidden, width, bias=spec.bias))
        self.add_module(spec.up_name, nn.Linear(spec.hidden, width, bias=spec.bias))
        self.add_module(spec.down_name, nn.Linear(spec.intermediate, spec.hidden, bias=spec.bias))

    def forward(self, x: Tensor) -> Tensor:
        act, up = ACTIVATIONS[self.spec.activation], self.get_submodule(self.spec.up_name)(x)
        if self.spec.fused_gate:
            gate, up = up.chunk(2, dim=-1)
            up = act(gate) * up
        elif self.spec.gated:
            up = act(self.get_submodule(str(self.spec.gate_name))(x)) * up
        else:
            up = act(up)
        return self.get_submodule(self.spec.down_name)(up)


def upcycled(name: str, spec: MlpSpec, block: nn.Module, seed: int = 0) -> StackedExperts:
    experts = StackedExperts(spec, NUM_EXPERTS)
    generator = torch.Generator().manual_seed(seed)
    tensors = UPCYCLERS.get(name).build({})(DenseMlp.read(block, spec), spec, NUM_EXPERTS, generator)
    experts.load_state_dict(tensors)
    return experts


def test_the_registry_holds_the_known_upcyclers() -> None:
    assert {"copy"} <= set(UPCYCLERS.names())
    assert UPCYCLERS.get("copy").contract is Contract.EXACT_ANY_ROUTER


@every_upcycler
@every_spec
def test_keeps_its_contract(name: str, spec: MlpSpec) -> None:
    block, x = DenseBlock(spec), torch.randn(30, spec.hidden)
    experts, expected = upcycled(name, spec, block), block(x)
    everything = torch.arange(NUM_EXPERTS).expand(30, NUM_EXPERTS)
    contract = UPCYCLERS.get(name).contract
    if contract is Contract.EXACT_ANY_ROUTER:
        index, weight = random_slots(30, 2)
        found = experts(x, index, weight / weight.sum(-1, keepdim=True))
    elif contract is Contract.EXACT_UNIFORM_ROUTER:
        found = experts(x, everything, torch.full((30, NUM_EXPERTS), 1 / NUM_EXPERTS))
    elif contract is Contract.EXACT_SUM_OF_ALL:
        found = experts(x, everything, torch.ones(30, NUM_EXPERTS))
    elif contract is Contract.NORM_PRESERVING:
        index, weight = random_slots(30, 2)
        found = experts(x, index, weight / weight.sum(-1, keepdim=True))
        assert 0.5 < float(found.norm() / expected.norm()) < 2
        return
    else:
        pytest.skip("promises nothing")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@every_upcycler
@pytest.mark.parametrize("case", ROUTER_CASES, ids=case_id)
def test_layer_equals_dense_block_under_every_normalised_router(name: str, case: tuple[str, dict[str, object]]) -> None:
    router = make_router(case)
    if not (router.normalised and UPCYCLERS.get(name).contract is Contract.EXACT_ANY_ROUTER):
        pytest.skip("not promised for this pair")
    block, x = DenseBlock(SPECS["gated"]), torch.randn(3, 10, 8)
    layer = MoELayer(router, upcycled(name, SPECS["gated"], block))
    torch.testing.assert_close(layer(x), block(x), rtol=0, atol=1e-5)


def test_weights_that_sum_to_less_scale_the_output() -> None:
    block, x = DenseBlock(SPECS["plain"]), torch.randn(20, 8)
    router = make_router(("top_k", {"k": 2, "convention": "softmax_topk"}))
    layer = MoELayer(router, upcycled("copy", SPECS["plain"], block))
    with layer.scope.recording() as routings:
        found = layer(x)
    total = routings[0].weight_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(found, block(x) * total, rtol=1e-4, atol=1e-6)


@every_upcycler
def test_is_repeatable_and_leaves_global_randomness_alone(name: str) -> None:
    block, state = DenseBlock(SPECS["gated"]), torch.get_rng_state()
    one, two = (upcycled(name, SPECS["gated"], block, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    dense = DenseMlp.read(block, SPECS["gated"])
    torch.set_rng_state(state)
    UPCYCLERS.get(name).build({})(dense, SPECS["gated"], NUM_EXPERTS, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


@every_upcycler
def test_experts_own_their_memory(name: str) -> None:
    """Training one expert must move neither another nor the dense block."""
    block = DenseBlock(SPECS["gated"])
    tensors = UPCYCLERS.get(name).build({})(
        DenseMlp.read(block, SPECS["gated"]), SPECS["gated"], NUM_EXPERTS, torch.Generator()
    )
    before = block.down_proj.weight.clone()
    others = tensors["down_proj"][1:].clone()
    tensors["down_proj"][0] += 1
    assert torch.equal(block.down_proj.weight, before)
    assert torch.equal(tensors["down_proj"][1:], others)


def test_reading_a_dense_block_puts_gate_rows_first() -> None:
    spec = SPECS["gated-bias"]
    block = DenseBlock(spec)
    dense = DenseMlp.read(block, spec)
    assert torch.equal(dense.first[: spec.intermediate], block.gate_proj.weight)
    assert torch.equal(dense.first[spec.intermediate :], block.up_proj.weight)
    assert torch.equal(dense.first_bias[: spec.intermediate], block.gate_proj.bias)
    assert torch.equal(dense.down, block.down_proj.weight)
    assert not any(t.requires_grad for t in dataclasses.astuple(dense))


@every_upcycler
def test_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no option 'noize'"):
        UPCYCLERS.get(name).build({"noize": 0.1})


@pytest.mark.parametrize("k", [1, 2])
def test_router_learns_nothing_from_the_task_at_an_exact_copy(k: int) -> None:
    """All experts agree there; with unequal experts and k = 2 the same loss does teach it."""
    block, x = DenseBlock(SPECS["gated"]), torch.randn(40, 8)
    layer = MoELayer(make_router(("top_k", {"k": k})), upcycled("copy", SPECS["gated"], block))
    target = torch.randn(40, 8)
    F.mse_loss(layer(x), target).backward()
    assert float(layer.router.weight.grad.abs().max()) < 1e-7
    experts_gradient = layer.experts.down_proj.grad
    assert not torch.equal(experts_gradient[0], experts_gradient[1]), "routing alone breaks the symmetry of experts"
    with torch.no_grad():
        layer.experts.down_proj.add_(torch.randn_like(layer.experts.down_proj) * 0.1)
    layer.zero_grad()
    F.mse_loss(layer(x), target).backward()
    largest = float(layer.router.weight.grad.abs().max())
    assert (largest > 1e-5) if k == 2 else (largest < 1e-7)
