"""Every kernel against the slow oracle and against the loop: outputs and all gradients, whatever the routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llava_moe.moe import KERNELS, MlpSpec
from llava_moe.moe.experts import ACTIVATIONS
from llava_moe.moe.kernels import ExpertWeights, Kernel
from llava_moe.moe.kernels import whole as whole_module
from llava_moe.moe.kernels.grouped import BODIES, choose_body, run_sorted
from llava_moe.registry import RegistryError
from tests.moe.cases import NUM_EXPERTS, expert_weights, make_experts, random_slots
from tests.moe.cases import SPECS as ALIKE
from tests.reference import oracles

# The default kernel chooses between two bodies; here each of them is one more kernel.
KERNEL_CASES: dict[str, Kernel] = {
    **{name: KERNELS.get(name) for name in KERNELS.names()},
    **{body: partial(run_sorted, body=body) for body in BODIES},
}
SPECS = ALIKE | {"out": MlpSpec(8, 12, "quick_gelu", True, True, "gate_proj", "up_proj", "down_proj", out=4)}
every_kernel = pytest.mark.parametrize("kernel", KERNEL_CASES)
any_dtype = pytest.mark.parametrize("kernel", [name for name in KERNEL_CASES if name != "whole"])


def pairs(*specs: str) -> pytest.MarkDecorator:
    """Kernel and spec; `grouped_mm` refuses odd widths, so the default kernel does not choose that body there."""
    cases = [(kernel, spec) for kernel in KERNEL_CASES for spec in specs or SPECS if (kernel, spec) != ("whole", "odd")]
    return pytest.mark.parametrize(("kernel", "spec"), cases)


def fields_of(weights: ExpertWeights) -> dict[str, Tensor]:
    """The tensors among the arguments."""
    named = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def run(
    kernel: str, x: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights, frozen: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The output, and the gradients of a random projection of it by input, combine weights and parameters."""
    named = {"x": x, "weight": weight, **fields_of(weights)}
    leaves = {name: t.detach().clone().requires_grad_(name not in frozen) for name, t in named.items()}
    parameters = {name: leaf for name, leaf in leaves.items() if name not in ("x", "weight")}
    output = KERNEL_CASES[kernel](leaves["x"], index, leaves["weight"], dataclasses.replace(weights, **parameters))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    (output * direction).sum().backward()
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_registry_holds_the_known_kernels() -> None:
    assert {"loop", "grouped", "batched"} <= set(KERNELS.names())
    with pytest.raises(RegistryError, match="did you mean 'grouped'"):
        KERNELS.get("groupd")


@pairs(*ALIKE)
@pytest.mark.parametrize("empty", [False, True])
def test_equals_the_oracle(kernel: str, spec: str, empty: bool) -> None:
    dtype, tolerance = (torch.float32, 2e-5) if kernel == "whole" else (torch.float64, 1e-10)
    experts = make_experts(SPECS[spec]).to(dtype)
    weights = expert_weights(experts)
    x = torch.randn(6, SPECS[spec].hidden, dtype=dtype)
    index, weight = random_slots(6, 2, empty=empty)
    lists = [None if t is None else t.tolist() for t in (weights.first_bias_EF, weights.down_bias_ED)]
    expected = oracles.mixture(
        x.tolist(), index.tolist(), weight.tolist(), weights.first_EFD.tolist(), weights.down_EDF.tolist(),
        *lists, SPECS[spec].activation, SPECS[spec].gated,
    )  # fmt: skip
    found = KERNEL_CASES[kernel](x, index, weight.to(dtype), weights)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=tolerance, atol=tolerance)


@pairs()
@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (1, 3), (7, 2), (64, 2), (33, NUM_EXPERTS)])
@pytest.mark.parametrize("empty", [False, True])
def test_equals_the_loop_with_all_gradients(kernel: str, spec: str, num_tokens: int, k: int, empty: bool) -> None:
    """Combine weights of both signs: some methods subtract experts."""
    weights = expert_weights(make_experts(SPECS[spec]))
    x = torch.randn(num_tokens, SPECS[spec].hidden)
    index, weight = random_slots(num_tokens, k, empty=empty)
    weight = weight * torch.where(torch.rand_like(weight) < 0.3, -1.0, 1.0)
    found = run(kernel, x, index, weight, weights)
    assert found["output"].shape == (num_tokens, SPECS[spec].output)
    compare(found, run("loop", x, index, weight, weights))


@every_kernel
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(kernel: str, activation: str, gated: bool) -> None:
    spec = dataclasses.replace(SPECS["gated-bias"], activation=activation, gated=gated)
    weights = expert_weights(make_experts(spec))
    x = torch.randn(20, spec.hidden)
    index, weight = random_slots(20, 2)
    compare(run(kernel, x, index, weight, weights), run("loop", x, index, weight, weights))


@pairs("gated", "odd")
@pytest.mark.parametrize("chosen", [[[0, 1]], [[4, 4]], [[2, 2], [2, 2], [2, 2]], [[5, 5], [0, 5]], [[5], [5]]])
def test_lopsided_loads(kernel: str, spec: str, chosen: list[list[int]]) -> None:
    """Experts without tokens, one expert with everything, one expert twice in a token, tokens without experts."""
    weights = expert_weights(make_experts(SPECS[spec]))
    index = torch.tensor(chosen)
    x, weight = torch.randn(len(chosen), SPECS[spec].hidden), torch.rand(index.shape)
    found = run(kernel, x, index, weight, weights)
    compare(found, run("loop", x, index, weight, weights))
    unused = sorted(set(range(NUM_EXPERTS)) - set(index.flatten().tolist()))
    for name in ("first_EFD", "down_EDF"):
        assert (found[name][unused] == 0).all(), "an expert without tokens has a zero gradient, not a missing one"


@pairs("gated", "odd", "plain-bias")
def test_an_empty_slot_adds_nothing(kernel: str, spec: str) -> None:
    """Whatever weight it carries, forward and backward are those of the batch without the slot."""
    weights = expert_weights(make_experts(SPECS[spec]))
    x = torch.randn(5, SPECS[spec].hidden)
    index, weight = random_slots(5, 2)
    padded_index = torch.cat([index, torch.full((5, 1), NUM_EXPERTS)], dim=1)
    padded_weight = torch.cat([weight, torch.full((5, 1), 7.0)], dim=1)
    found = run(kernel, x, padded_index, padded_weight, weights)
    assert (found["weight"][:, 2] == 0).all()
    found["weight"] = found["weight"][:, :2]
    compare(found, run(kernel, x, index, weight, weights), 1e-5, 1e-6)


@every_kernel
def test_without_tokens(kernel: str) -> None:
    weights = expert_weights(make_experts(SPECS["gated"]))
    index, weight = random_slots(0, 2)
    if kernel == "whole":  # never chosen for an empty batch
        assert choose_body(torch.empty(0, 8, device="meta"), 0, weights) == "blocks"
        return
    found = run(kernel, torch.randn(0, 8), index, weight, weights)
    assert found["output"].shape == (0, 8)
    assert (found["first_EFD"] == 0).all()
    assert (found["down_EDF"] == 0).all()


@every_kernel
def test_one_expert_is_the_dense_block(kernel: str) -> None:
    spec = SPECS["out"]
    weights = expert_weights(make_experts(spec, num_experts=1))
    x = torch.randn(9, spec.hidden)
    gate, up = (x @ weights.first_EFD[0].T + weights.first_bias_EF[0]).chunk(2, dim=-1)
    expected = (gate * torch.sigmoid(1.702 * gate) * up) @ weights.down_EDF[0].T + weights.down_bias_ED[0]
    found = KERNEL_CASES[kernel](x, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1), weights)
    torch.testing.assert_close(found, expected)


@any_dtype
@pytest.mark.parametrize("spec", ["gated-bias", "plain", "out"])
def test_gradcheck(kernel: str, spec: str) -> None:
    weights = expert_weights(make_experts(SPECS[spec], num_experts=3).double())
    index = torch.tensor([[0, 2], [3, 0], [2, 3]])
    weight = torch.tensor([[0.4, -0.6], [0.3, 0.9], [-0.2, 0.5]], dtype=torch.float64)
    x = torch.randn(3, SPECS[spec].hidden, dtype=torch.float64)
    named = fields_of(weights)

    def forward(x: Tensor, weight: Tensor, *leaves: Tensor) -> Tensor:
        return KERNEL_CASES[kernel](
            x, index, weight, dataclasses.replace(weights, **dict(zip(named, leaves, strict=True)))
        )

    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, *named.values())]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@pytest.mark.parametrize("kernel", ["loop", "batched"])
def test_second_derivatives(kernel: str) -> None:
    weights, (index, weight) = expert_weights(make_experts(SPECS["gated"])), random_slots(4, 2)
    x = torch.randn(4, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(KERNEL_CASES[kernel](x, index, weight, weights).sum(), x, create_graph=True)
    assert torch.autograd.grad(slope.sum(), x)[0].abs().sum() > 0
    y = KERNELS.get("grouped")(x, index, weight, weights)
    with pytest.raises(RuntimeError, match="no second derivative; use the kernel 'loop'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernel: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(SPECS["gated-bias"], hidden=16, intermediate=24)
    full = make_experts(spec)
    x = torch.randn(20, 16)
    index, weight = random_slots(20, 2, empty=True)
    expected = run("loop", x, index, weight, expert_weights(full))
    half = expert_weights(full.to(dtype))
    found = run(kernel, x.to(dtype), index, weight, half)
    assert found["output"].dtype == found["x"].dtype == found["first_EFD"].dtype == dtype
    assert found["weight"].dtype == torch.float32
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name].float(), expected[name], rtol=0.05, atol=0.05 * scale)


@every_kernel
def test_is_repeatable(kernel: str) -> None:
    weights = expert_weights(make_experts(SPECS["gated-bias"]))
    x = torch.randn(50, 8)
    index, weight = random_slots(50, 2)
    one, two = (run(kernel, x, index, weight, weights) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@every_kernel
@pytest.mark.parametrize("learns", ["x", "weight", "first_EFD", "first_bias_EF", "down_EDF", "down_bias_ED"])
def test_only_what_learns_has_a_gradient(kernel: str, learns: str) -> None:
    weights = expert_weights(make_experts(SPECS["gated-bias"]))
    x = torch.randn(12, 8)
    index, weight = random_slots(12, 2, empty=True)
    expected = run("loop", x, index, weight, weights)
    everything = {"x", "weight", *fields_of(weights)}
    found = run(kernel, x, index, weight, weights, frozen=tuple(everything - {learns}))
    assert found.keys() == {"output", learns}
    torch.testing.assert_close(found[learns], expected[learns], rtol=1e-4, atol=1e-5)


@any_dtype
@pytest.mark.parametrize("spec", ["gated-bias", "plain"])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_inference(kernel: str, spec: str, grad_enabled: bool) -> None:
    experts = make_experts(SPECS[spec]).requires_grad_(not grad_enabled)
    weights, x = expert_weights(experts), torch.randn(12, 8)
    index, weight = random_slots(12, 2, empty=True)
    with torch.set_grad_enabled(grad_enabled):
        found = KERNEL_CASES[kernel](x, index, weight, weights)
    assert not found.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(KERNEL_CASES[kernel](x, index, weight, weights), found)
    torch.testing.assert_close(found, run("loop", x, index, weight, weights)["output"])


@every_kernel
def test_recomputation(kernel: str) -> None:
    weights, x = expert_weights(make_experts(SPECS["gated-bias"])), torch.randn(12, 8, requires_grad=True)
    index, weight = random_slots(12, 2)
    call: Callable[..., Tensor] = KERNEL_CASES[kernel]
    (plain,) = torch.autograd.grad(call(x, index, weight, weights).square().sum(), x)
    again = torch.utils.checkpoint.checkpoint(call, x, index, weight, weights, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), x)[0], plain)


@every_kernel
def test_a_gradient_without_memory_of_its_own(kernel: str) -> None:
    """What `sum().backward()` sends is one number, expanded."""
    weights, x = expert_weights(make_experts(SPECS["gated"])), torch.randn(12, 8, requires_grad=True)
    index, weight = random_slots(12, 2)
    (expected,) = torch.autograd.grad(KERNELS.get("loop")(x, index, weight, weights).sum(), x)
    (found,) = torch.autograd.grad(KERNEL_CASES[kernel](x, index, weight, weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_body_is_chosen_by_dtype_width_device_and_work() -> None:
    even, odd = expert_weights(make_experts(SPECS["gated"])), expert_weights(make_experts(SPECS["odd"]))
    assert choose_body(torch.empty(3, 8), 6, even) == "whole"
    assert choose_body(torch.empty(3, 8), 10**6, even) == "blocks"
    assert choose_body(torch.empty(3, 8, device="meta"), 10**6, even) == "whole"  # any device that is not a CPU
    assert choose_body(torch.empty(3, 7, device="meta"), 6, odd) == "blocks"
    assert choose_body(torch.empty(3, 8, dtype=torch.float64, device="meta"), 6, even) == "blocks"
    assert not whole_module.supported(torch.bfloat16, torch.empty(2, 24, 4))
    assert whole_module.supported(torch.bfloat16, torch.empty(2, 24, 8))
