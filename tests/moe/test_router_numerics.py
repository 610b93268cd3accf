"""The contract of every router in matters of precision: float32 arithmetic, float32 knobs, finite at the extremes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from llava_moe.moe import ROUTERS
from llava_moe.moe.component import Float32Buffers
from tests.moe.cases import HIDDEN, NUM_EXPERTS, ROUTER_CASES, Case, case_id, context_for, make_router

every_router = pytest.mark.parametrize("case", ROUTER_CASES, ids=case_id)


@every_router
def test_routing_is_float32_whatever_the_input(case: Case) -> None:
    """bfloat16 hidden states and autocast lose nothing beyond the rounding of the hidden states themselves."""
    router, context = make_router(case).eval(), context_for(case, 30)
    x = torch.randn(30, HIDDEN).bfloat16()
    expected = router(x.float(), context)
    found = router(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = router(x.float(), context)
    for routing in (found, autocast):
        assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.weight_TK.dtype == torch.float32
        assert torch.equal(routing.logits_TE, expected.logits_TE)
        assert torch.equal(routing.index_TK, expected.index_TK)
        assert torch.equal(routing.weight_TK, expected.weight_TK)


@every_router
def test_a_bfloat16_router_calculates_in_float32(case: Case) -> None:
    """Only the parameters are rounded: the same values as float32 give the same routing to the last bit."""
    half, context = make_router(case).eval().to(torch.bfloat16), context_for(case, 20)
    exact, x = copy.deepcopy(half).float(), torch.randn(20, HIDDEN).bfloat16()
    found, expected = half(x, context), exact(x.float(), context)
    assert found.logits_TE.dtype == found.probs_TE.dtype == found.weight_TK.dtype == torch.float32
    assert torch.equal(found.logits_TE, expected.logits_TE)
    assert torch.equal(found.probs_TE, expected.probs_TE)
    assert torch.equal(found.index_TK, expected.index_TK)
    assert torch.equal(found.weight_TK, expected.weight_TK)


@every_router
def test_knobs_stay_float32(case: Case) -> None:
    """What a controller moves by 1e-3 must not be rounded to bfloat16; and it is saved."""
    router = make_router(case)
    owners = [module for module in router.modules() if isinstance(module, Float32Buffers)]
    knobs = [(module, name) for module in owners for name in module.float32_buffers]
    for module, name in knobs:
        module.get_buffer(name).add_(1.001e-3)
    saved = {name: value.clone() for name, value in router.state_dict().items()}
    before = [module.get_buffer(name).clone() for module, name in knobs]
    router.to(torch.bfloat16)
    for (module, name), value in zip(knobs, before, strict=True):
        assert value.dtype == module.get_buffer(name).dtype == torch.float32
        assert torch.equal(module.get_buffer(name), value)
        assert any(key.endswith(name) and torch.equal(value, kept) for key, kept in saved.items())
    assert all(p.dtype == torch.bfloat16 for p in router.parameters())


@every_router
def test_extreme_inputs_stay_finite(case: Case) -> None:
    router = make_router(case)
    for training in (False, True):
        x = (torch.randn(16, HIDDEN) * 1e3).requires_grad_()
        routing = router.train(training)(x, context_for(case, 16))
        assert torch.isfinite(routing.weight_TK).all()
        assert torch.isfinite(routing.probs_TE).all()
        if routing.weight_TK.requires_grad:
            routing.weight_TK.square().sum().backward()
            assert torch.isfinite(x.grad).all()
        zeros = torch.zeros(3, HIDDEN, requires_grad=True)
        routing = router(zeros, context_for(case, 3))
        assert torch.isfinite(routing.weight_TK).all()
        if routing.weight_TK.requires_grad:
            routing.weight_TK.square().sum().backward()
            assert torch.isfinite(zeros.grad).all()


@every_router
def test_can_be_built_on_the_meta_device_and_filled(case: Case) -> None:
    """What loading a checkpoint does; everything that matters must be in the state dict."""
    source, x, context = make_router(case).eval(), torch.randn(9, HIDDEN), context_for(case, 9)
    with torch.device("meta"):
        router = ROUTERS.get(case[0]).build(HIDDEN, NUM_EXPERTS, case[1])
    router.to_empty(device="cpu").eval().load_state_dict(source.state_dict())
    found, expected = router(x, context), source(x, context)
    assert torch.equal(found.logits_TE, expected.logits_TE)
    assert torch.equal(found.index_TK, expected.index_TK)
    assert torch.equal(found.weight_TK, expected.weight_TK)


@every_router
def test_can_be_built_in_bfloat16(case: Case) -> None:
    """`from_pretrained` may build under another default dtype; knobs and tables must not take it over."""
    exact = ROUTERS.get(case[0]).build(HIDDEN, NUM_EXPERTS, case[1])
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = ROUTERS.get(case[0]).build(HIDDEN, NUM_EXPERTS, case[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.bfloat16 for p in router.parameters())
    for module in router.modules():
        for name in getattr(module, "float32_buffers", ()):
            assert module.get_buffer(name).dtype == torch.float32
    if case[0] == "hash" and case[1].get("seed", 42) is not None:
        assert all(torch.equal(value, exact.get_buffer(name)) for name, value in router.named_buffers())
    assert router(torch.randn(4, HIDDEN), context_for(case, 4)).weight_TK.dtype == torch.float32


# These look at values on the host; their modules say why. So does compete_smoe, at its knob, whose value is known here.
WAIT_FOR_VALUES = {"base_layer"}


@every_router
def test_the_host_never_waits_for_a_value(case: Case) -> None:
    """Fake tensors have no values: to ask for one raises, as would synchronise a GPU with the host."""
    with FakeTensorMode():
        router, x = make_router(case).train(), torch.randn(12, HIDDEN, requires_grad=True)
        context = context_for(case, 12)
        if case[0] in WAIT_FOR_VALUES:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                router(x, context)
            return
        routing = router(x, context)
        total = routing.weight_TK.sum() + routing.probs_TE.sum() + routing.load_E().sum()
        if total.requires_grad:
            total.backward()
        assert routing.index_TK.shape[0] == 12
