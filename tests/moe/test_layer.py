"""The MoE layer and its routing scope: context in, routings out, also when the forward is computed twice."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_moe.moe import BALANCE_LOSSES, KERNELS, MoELayer, Router, Routing, RoutingContext, RoutingScope
from tests.moe.cases import NUM_EXPERTS, ROUTER_CASES, SPECS, case_id, make_experts, make_layer

every_router = pytest.mark.parametrize("case", ROUTER_CASES, ids=case_id)


class MaskReader(Router):
    """Routes padding and real tokens differently: wrong gradients show when the context is gone at recomputation."""

    def __init__(self) -> None:
        super().__init__(8, NUM_EXPERTS, Router.Config())
        self.weight = nn.Parameter(torch.randn(2, NUM_EXPERTS, 8))
        self.calls = 0

    @property
    def active_experts(self) -> float:
        return 2

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, generator=generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        self.calls += 1
        both = torch.einsum("td,med->tme", x_TD, self.weight)
        logits = torch.where(context.token_mask_T.unsqueeze(-1), both[:, 0], both[:, 1])
        probs = logits.softmax(-1)
        weight, index = probs.topk(2, dim=-1)
        return Routing(logits, probs, index, weight)


@every_router
@pytest.mark.parametrize("kernel", KERNELS.names())
def test_shape_is_kept_and_batch_is_only_a_list_of_tokens(case: tuple[str, dict[str, Any]], kernel: str) -> None:
    layer, x = make_layer(case, kernel=kernel).eval(), torch.randn(3, 5, 8)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x[1:2]), y[1:2], rtol=1e-5, atol=1e-6)  # batch of one
    if layer.router.token_choice:
        torch.testing.assert_close(layer(x.reshape(15, 8)).reshape(3, 5, 8), y)


@every_router
def test_padding_content_does_not_reach_real_tokens(case: tuple[str, dict[str, Any]]) -> None:
    layer, x = make_layer(case).eval(), torch.randn(2, 6, 8)
    other = x.clone()
    other[:, :2] = 100 * torch.randn(2, 2, 8)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, :2] = False
    layer.scope.set_context(dataclasses.replace(RoutingContext.trivial(12), token_mask_T=mask.reshape(-1)))
    torch.testing.assert_close(layer(x)[:, 2:], layer(other)[:, 2:], rtol=1e-5, atol=1e-6)


@every_router
def test_bfloat16_and_autocast(case: tuple[str, dict[str, Any]]) -> None:
    layer, x = make_layer(case).eval(), torch.randn(2, 9, 8)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * scale)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()


def test_state_dict_holds_router_and_experts_only() -> None:
    layer = make_layer()
    assert set(layer.state_dict()) == {"router.scorer.weight", "experts.gate_up_proj", "experts.down_proj"}
    other = make_layer()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), other(x))


def test_recording_is_on_only_inside_the_block() -> None:
    scope = RoutingScope()
    layers = [make_layer(layer=i, scope=scope) for i in (3, 7)]
    x = torch.randn(4, 8)
    layers[0](x)
    with scope.recording() as routings:
        for layer in layers:
            layer(x)
    assert sorted(routings) == [("decoder", 3), ("decoder", 7)]
    kept = dict(routings)
    layers[0](x)
    assert routings == kept
    assert routings["decoder", 3].index_TK.shape == (4, 2)
    assert not routings["decoder", 3].detach().weight_TK.requires_grad
    assert routings["decoder", 3].weight_TK.requires_grad


def test_nothing_is_kept_outside_a_recording() -> None:
    """A kept routing would keep the graph of its batch alive."""
    layer = make_layer()
    layer(torch.randn(17, 8))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Routing and len(thing.index_TK) == 17]


def test_recordings_nest_and_survive_an_error() -> None:
    layer, x, inner = make_layer(), torch.randn(4, 8), {}

    def interrupted() -> None:
        with layer.scope.recording() as routings:
            layer(x)
            inner.update(routings)
            raise RuntimeError("stop")

    with layer.scope.recording() as outer:
        with pytest.raises(RuntimeError, match="stop"):
            interrupted()
        assert sorted(inner) == [("decoder", 0)]
        assert not outer
        layer(x)
    assert sorted(outer) == [("decoder", 0)]


def test_context_reaches_the_router_with_the_layer_index() -> None:
    seen: list[RoutingContext] = []

    class Spy(MaskReader):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
            seen.append(context)
            return super().forward(x_TD, context)

    layer = MoELayer(Spy(), make_experts(SPECS["gated"]), layer=5)
    layer(torch.randn(3, 8))
    assert seen[-1].layer == 5
    assert seen[-1].token_mask_T.tolist() == [True] * 3
    layer.scope.set_context(dataclasses.replace(RoutingContext.trivial(2), token_ids_T=torch.tensor([8, 9])))
    layer(torch.randn(2, 8))
    assert seen[-1].layer == 5
    assert seen[-1].token_ids_T.tolist() == [8, 9]


def test_context_of_another_batch_is_refused() -> None:
    layer = make_layer(layer=4)
    layer.scope.set_context(RoutingContext.trivial(6))
    layer(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="layer 4 was given 5 tokens, but the routing context describes 6"):
        layer(torch.randn(5, 8))


def gradients(use_checkpoint: bool) -> tuple[dict[str, Tensor], dict[int, Routing], int]:
    """Two layers with residuals under a loss of output and balance terms."""
    torch.manual_seed(0)
    scope = RoutingScope()
    layers = nn.ModuleList([MoELayer(MaskReader(), make_experts(SPECS["gated"]), i, scope) for i in range(2)])
    context = dataclasses.replace(RoutingContext.trivial(12), token_mask_T=torch.arange(12) % 3 > 0)
    scope.set_context(context)
    hidden = torch.randn(12, 8, requires_grad=True)
    with scope.recording() as routings:
        y = hidden
        for layer in layers:
            y = y + (checkpoint(layer, y, use_reentrant=False) if use_checkpoint else layer(y))
    kept = dict(routings)
    total = y.square().mean() + sum(
        loss(routing, context) for loss in (BALANCE_LOSSES.get(name).build({}) for name in ("switch", "z"))
        for routing in routings.values()
    )  # fmt: skip
    total.backward()
    assert routings == kept, "the second run of the forward recorded again"
    return {n: p.grad for n, p in layers.named_parameters()}, kept, sum(layer.router.calls for layer in layers)


def test_checkpointing_gives_the_same_gradients_and_records_once() -> None:
    plain, _, calls = gradients(use_checkpoint=False)
    recomputed, routings, more_calls = gradients(use_checkpoint=True)
    assert (calls, more_calls) == (2, 4), "the checkpointed forward did run twice"
    assert sorted(routings) == [("decoder", 0), ("decoder", 1)]
    assert plain.keys() == recomputed.keys()
    for name in plain:
        assert plain[name].abs().sum() > 0
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-6, atol=1e-8)


def test_trivial_context_describes_one_unpadded_sequence() -> None:
    context = RoutingContext.trivial(3)
    assert context.token_mask_T.all()
    assert context.sequence_T.tolist() == [0, 0, 0]
    assert context.modality_T is None
