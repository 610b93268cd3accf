"""Every kernel against the slow oracle and against the loop: outputs and all gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from llava_moe.moe import KERNELS, MlpSpec
from llava_moe.moe.kernels import ExpertWeights
from llava_moe.moe.kernels.grouped import _supported
from llava_moe.registry import RegistryError
from tests.moe.cases import NUM_EXPERTS, SPECS, expert_weights, make_experts, random_slots
from tests.reference import oracles

every_kernel = pytest.mark.parametrize("kernel", KERNELS.names())
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def test_the_registry_holds_the_known_kernels() -> None:
    assert {"loop", "grouped"} <= set(KERNELS.names())
    with pytest.raises(RegistryError, match="did you mean 'grouped'"):
        KERNELS.get("groupd")


def run(kernel: str, x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights) -> dict[str, Tensor]:
    """The output, and the gradients of a random projection of it by input, combine weights and parameters."""
    tensors = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items() if isinstance(t, Tensor)}
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    output = KERNELS.get(kernel)(x, index, weight, dataclasses.replace(weights, **leaves))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output.dtype)
    (output * direction).sum().backward()
    results = {"output": output.detach(), "x": x.grad, "weight": weight.grad}
    return results | {name: leaf.grad for name, leaf in leaves.items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@every_kernel
@every_spec
@pytest.mark.parametrize("empty", [False, True])
def test_equals_the_oracle(kernel: str, spec: MlpSpec, empty: bool) -> None:
    experts = make_experts(spec).double()
    weights = expert_weights(experts)
    x = torch.randn(6, spec.hidden, dtype=torch.float64)
    index, weight = random_slots(6, 2, empty=empty)
    lists = [None if t is None else t.tolist() for t in (weights.first_bias_EF, weights.down_bias_ED)]
    expected = oracles.mixture(
        x.tolist(), index.tolist(), weight.double().tolist(), weights.first_EFD.tolist(), weights.down_EDF.tolist(),
        *lists, spec.activation, spec.gated,
    )  # fmt: skip
    found = KERNELS.get(kernel)(x, index, weight.double(), weights)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@every_kernel
@every_spec
@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (1, 3), (7, 2), (64, 2), (33, NUM_EXPERTS)])
@pytest.mark.parametrize("empty", [False, True])
def test_equals_the_loop_with_all_gradients(kernel: str, spec: MlpSpec, num_tokens: int, k: int, empty: bool) -> None:
    weights = expert_weights(make_experts(spec))
    x = torch.randn(num_tokens, spec.hidden)
    index, weight = random_slots(num_tokens, k, empty=empty)
    compare(run(kernel, x, index, weight, weights), run("loop", x, index, weight, weights), 1e-4, 1e-5)


@every_kernel
@pytest.mark.parametrize("spec", ["gated", "odd"])
@pytest.mark.parametrize("chosen", [[[0, 1]], [[4, 4]], [[2, 2], [2, 2], [2, 2]], [[5, 5], [0, 5]]])
def test_lopsided_loads(kernel: str, spec: str, chosen: list[list[int]]) -> None:
    """Experts without tokens, one expert with everything, one expert twice in a token, tokens without experts."""
    weights = expert_weights(make_experts(SPECS[spec]))
    index = torch.tensor(chosen)
    x, weight = torch.randn(len(chosen), SPECS[spec].hidden), torch.rand(index.shape)
    found = run(kernel, x, index, weight, weights)
    compare(found, run("loop", x, index, weight, weights), 1e-4, 1e-5)
    unused = sorted(set(range(NUM_EXPERTS)) - set(index.flatten().tolist()))
    for name in ("first_EFD", "down_EDF"):
        assert (found[name][unused] == 0).all(), "an expert without tokens has a zero gradient, not a missing one"


@every_kernel
@pytest.mark.parametrize("spec", ["gated", "odd", "plain-bias"])
def test_an_empty_slot_adds_nothing(kernel: str, spec: str) -> None:
    """Whatever weight it carries, forward and backward are those of the batch without the slot."""
    weights = expert_weights(make_experts(SPECS[spec]))
    x = torch.randn(5, SPECS[spec].hidden)
    index, weight = random_slots(5, 2)
    padded_index = torch.cat([index, torch.full((5, 1), NUM_EXPERTS)], dim=1)
    padded_weight = torch.cat([weight, torch.full((5, 1), 7.0)], dim=1)
    found = run(kernel, x, padded_index, padded_weight, weights)
    expected = run(kernel, x, index, weight, weights)
    assert (found["weight"][:, 2] == 0).all()
    found["weight"] = found["weight"][:, :2]
    compare(found, expected, 1e-5, 1e-6)


@every_kernel
def test_without_tokens(kernel: str) -> None:
    weights = expert_weights(make_experts(SPECS["gated"]))
    index, weight = random_slots(0, 2)
    found = run(kernel, torch.randn(0, 8), index, weight, weights)
    assert found["output"].shape == (0, 8)
    assert (found["first_EFD"] == 0).all()


@every_kernel
def test_one_expert_is_the_dense_block(kernel: str) -> None:
    spec = SPECS["gated"]
    weights = expert_weights(make_experts(spec, num_experts=1))
    x = torch.randn(9, spec.hidden)
    gate, up = (x @ weights.first_EFD[0].T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ weights.down_EDF[0].T
    found = KERNELS.get(kernel)(x, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1), weights)
    torch.testing.assert_close(found, expected)


@every_kernel
@pytest.mark.parametrize("spec", ["gated-bias", "plain"])
def test_gradcheck(kernel: str, spec: str) -> None:
    weights = expert_weights(make_experts(SPECS[spec], num_experts=3).double())
    index, weight = torch.tensor([[0, 2], [3, 0], [2, 3]]), torch.rand(3, 2, dtype=torch.float64)
    x = torch.randn(3, SPECS[spec].hidden, dtype=torch.float64)
    names = [f.name for f in dataclasses.fields(weights) if isinstance(getattr(weights, f.name), Tensor)]

    def forward(x: Tensor, weight: Tensor, *leaves: Tensor) -> Tensor:
        replaced = dataclasses.replace(weights, **dict(zip(names, leaves, strict=True)))
        return KERNELS.get(kernel)(x, index, weight, replaced)

    leaves = [getattr(weights, name).detach() for name in names]
    inputs = [t.clone().requires_grad_() for t in (x, weight, *leaves)]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernel: str, dtype: torch.dtype) -> None:
    spec = SPECS["gated"]
    spec = dataclasses.replace(spec, hidden=16, intermediate=24)
    full = make_experts(spec)
    x = torch.randn(20, 16)
    index, weight = random_slots(20, 2)
    expected = KERNELS.get("loop")(x, index, weight, expert_weights(full))
    found = KERNELS.get(kernel)(x.to(dtype), index, weight, expert_weights(full.to(dtype)))
    assert found.dtype == dtype
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * scale)


@every_kernel
def test_is_repeatable(kernel: str) -> None:
    weights = expert_weights(make_experts(SPECS["gated"]))
    x = torch.randn(50, 8)
    index, weight = random_slots(50, 2)
    one, two = (run(kernel, x, index, weight, weights) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fast_path_is_taken_where_it_can_be() -> None:
    """The cases above must have gone through both paths of the grouped kernel."""
    even, odd = torch.empty(2, 24, 8), torch.empty(2, 18, 7)
    assert _supported(torch.empty(3, 8), even)
    assert not _supported(torch.empty(3, 7), odd)
    assert not _supported(torch.empty(3, 8, dtype=torch.float64), even.double())
    assert not _supported(torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(2, 24, 4, dtype=torch.bfloat16))
