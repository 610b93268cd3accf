"""The experts module: every registered kind, every kernel; activations; precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.activations import ACT2FN

from llava_moe.moe import EXPERTS, KERNELS, MlpSpec, StackedExperts
from llava_moe.moe.experts import ACTIVATIONS
from tests.moe.cases import NUM_EXPERTS, SPECS, make_experts, random_slots

every_kind = pytest.mark.parametrize("kind", EXPERTS.names())
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def test_the_registry_holds_the_known_kinds() -> None:
    assert {"stacked"} <= set(EXPERTS.names())


@every_kind
@every_spec
def test_contract(kind: str, spec: MlpSpec) -> None:
    """Shape, dtype, a gradient for every parameter, a state dict that travels, repeatable initial values."""
    experts = EXPERTS.get(kind).build(spec, NUM_EXPERTS, {})
    generator = torch.Generator().manual_seed(1)
    experts.reset_parameters(generator)
    x = torch.randn(40, spec.hidden, requires_grad=True)
    index, weight = random_slots(40, 3, experts.num_experts)
    y = experts(x, index, weight)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    y.square().sum().backward()
    for name, parameter in [*experts.named_parameters(), ("x", x)]:
        if name.startswith("base_"):
            assert not parameter.requires_grad, name
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # a zero bias behind relu2 may have none, and A of a LoRA whose B is zero has none
        if not name.endswith(("_bias", "_a")):
            assert parameter.grad.abs().sum() > 0, name
    other = EXPERTS.get(kind).build(spec, NUM_EXPERTS, {})
    other.load_state_dict(experts.state_dict())
    assert torch.equal(other(x, index, weight), y)
    other.reset_parameters(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), experts.parameters(), strict=True))


@every_kind
def test_tokens_do_not_see_each_other(kind: str) -> None:
    experts, x = EXPERTS.get(kind).build(SPECS["gated"], NUM_EXPERTS, {}), torch.randn(12, 8)
    index, weight = random_slots(12, 2)
    together = experts(x, index, weight)
    for t in (0, 5):
        alone = experts(x[t : t + 1], index[t : t + 1], weight[t : t + 1])
        torch.testing.assert_close(together[t : t + 1], alone, rtol=1e-5, atol=1e-7)
    order = torch.randperm(12)
    torch.testing.assert_close(experts(x[order], index[order], weight[order]), together[order], rtol=1e-5, atol=1e-7)


def test_permuting_experts_and_indices_together_changes_nothing() -> None:
    experts, x, order = make_experts(SPECS["gated-bias"]), torch.randn(12, 8), torch.randperm(NUM_EXPERTS)
    index, weight = random_slots(12, 2)
    before = experts(x, index, weight)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(experts(x, torch.argsort(order)[index], weight), before)


@pytest.mark.parametrize("kernel", KERNELS.names())
@pytest.mark.parametrize("spec", ["gated-bias", "odd"])
def test_autocast_and_bfloat16(kernel: str, spec: str) -> None:
    experts = make_experts(SPECS[spec], kernel=kernel)
    x = torch.randn(30, SPECS[spec].hidden)
    index, weight = random_slots(30, 2)
    expected = experts(x, index, weight)
    scale = float(expected.detach().abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(x, index, weight)
    assert found.dtype == torch.float32
    assert (
        0 < float((found - expected).detach().abs().max()) < 0.05 * scale
    )  # the lower bound: it did compute in bfloat16
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())
    half = experts.to(torch.bfloat16)(x.bfloat16(), index, weight)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05 * scale)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-4, atol=1e-5)


def test_unknown_activation_and_kernel_are_refused() -> None:
    spec = dataclasses.replace(SPECS["gated"], activation="silo")
    with pytest.raises(ValueError, match="activation 'silo'; did you mean 'silu'"):
        StackedExperts(spec, 2)
    with pytest.raises(ValueError, match="experts kernel 'lop'; did you mean 'loop'"):
        StackedExperts.build(SPECS["gated"], 2, {"kernel": "lop"})


@every_spec
def test_parameter_names_are_those_of_transformers(spec: MlpSpec) -> None:
    """gate_up_proj and down_proj, so that the conversion to one tensor per expert on disk finds them."""
    first = "gate_up" if spec.gated else "up"
    expected = {f"{first}_proj", "down_proj"} | ({f"{first}_bias", "down_bias"} if spec.bias else set())
    assert set(dict(StackedExperts(spec, 3).named_parameters())) == expected
