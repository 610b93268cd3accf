"""With a model's settings our layer is that model's own sparse block: outputs and gradients, under every kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llava_moe.moe import BALANCE_LOSSES, KERNELS, LayerPlan, MlpSpec, MoELayer, RoutingContext, build_layer

D, F, E, K = 16, 24, 8, 3
SPEC = MlpSpec(D, F, "silu", True, False, "gate_proj", "up_proj", "down_proj")
QWEN = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
V3 = {"hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K}


@dataclass(frozen=True)
class Twin:
    """A stock block, the plan that makes ours, and the names of the same parameters in both (ours: theirs)."""

    stock: Callable[[], nn.Module]
    router: str
    router_args: dict[str, Any]
    shared: dict[str, Any] | None = None
    names: dict[str, str] = field(default_factory=dict)


def softmax(stock: Callable[[], nn.Module], convention: str, **more: Any) -> Twin:
    return Twin(stock, "top_k", {"k": K, "convention": convention}, **more)


TWINS = {
    "mixtral": softmax(lambda: MixtralSparseMoeBlock(mixtral_config()), "topk_softmax"),
    "mixtral-renorm": softmax(lambda: MixtralSparseMoeBlock(mixtral_config()), "softmax_topk_renorm"),
    "qwen3": softmax(lambda: Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**QWEN, norm_topk_prob=False)), "softmax_topk"),
    "qwen3-renorm": softmax(
        lambda: Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**QWEN, norm_topk_prob=True)), "softmax_topk_renorm"
    ),
    "olmoe": softmax(lambda: OlmoeSparseMoeBlock(olmoe_config()), "softmax_topk"),
    "qwen2": softmax(
        lambda: Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=40)),
        "softmax_topk",
        shared={"width": 40, "mix": "gated"},
        names={"shared": "shared_expert", "shared.gate": "shared_expert_gate.weight"},
    ),
    "deepseek-v3": Twin(
        lambda: DeepseekV3MoE(DeepseekV3Config(**V3, n_shared_experts=2, n_group=4, topk_group=2, norm_topk_prob=True)),
        "deepseek_v3",
        {"k": K, "num_groups": 4, "topk_groups": 2, "scale": 2.5},
        shared={"num": 2},
        names={"shared": "shared_experts"},
    ),
}


def mixtral_config() -> MixtralConfig:
    return MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)


def olmoe_config() -> OlmoeConfig:
    return OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False)


def make(twin: Twin, kernel: str) -> tuple[nn.Module, MoELayer]:
    """Both blocks with the same random parameters; a bias that moves the selection where there is one."""
    stock = twin.stock()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.4)
    plan = LayerPlan(E, twin.router, twin.router_args, "stacked", {"kernel": kernel}, twin.shared)
    ours = build_layer(plan, SPEC)
    assert isinstance(ours, MoELayer)
    with torch.no_grad():
        for name, buffer in stock.gate.named_buffers():
            assert name == "e_score_correction_bias"
            buffer.normal_(std=0.3)
            knob = next(value for key, value in ours.router.named_buffers() if key.endswith("selection_bias_E"))
            knob.copy_(buffer)
        for mine, theirs in values(ours, stock, twin, gradients=False).values():
            mine.copy_(theirs)
    return stock, ours


def values(ours: MoELayer, stock: nn.Module, twin: Twin, gradients: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """(ours, theirs) for every parameter of our layer, or their gradients."""
    theirs = {name: p.grad if gradients else p for name, p in stock.named_parameters()}
    found = {}
    for name, parameter in ours.named_parameters():
        mine = parameter.grad if gradients else parameter
        if name.startswith("shared.block."):
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            other = torch.cat([theirs.pop(f"{twin.names['shared']}.{part}.weight") for part in parts]).unsqueeze(0)
        elif name == "router.scorer.weight":
            other = theirs.pop("gate.weight")
        else:
            other = theirs.pop(twin.names.get(name, name))
        found[name] = (mine, other)
    assert not theirs, f"the stock block has more parameters: {sorted(theirs)}"
    return found


@pytest.mark.parametrize("kernel", [*KERNELS.names(), "grouped in blocks"])
@pytest.mark.parametrize("name", TWINS)
def test_equals_the_stock_block(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default kernel takes another way for experts with little work, as these have; it is tried on both."""
    if kernel == "grouped in blocks":
        # Through sys.modules: in the package the function hides the module of its name.
        monkeypatch.setattr(sys.modules["llava_moe.moe.kernels.grouped"], "_WORK_WORTH_A_LOOP", 0)
        kernel = "grouped"
    stock, ours = make(TWINS[name], kernel)
    x = torch.randn(3, 11, D)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    direction = torch.randn_like(x)
    found, expected = ours(one), stock(two)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    pairs = {"x": (one.grad, two.grad), **values(ours, stock, TWINS[name], gradients=True)}
    for key, (mine, theirs) in pairs.items():
        scale = float(theirs.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_stock_balance_loss(padded: bool) -> None:
    """Theirs counts k experts for every token, ours filled slots: k times as much, for one layer.

    (Over several layers theirs multiplies the means of all layers, which is not the mean of the layers' losses.)
    """
    _, ours = make(TWINS["qwen3-renorm"], "grouped")
    mask = torch.ones(3, 11, dtype=torch.bool)
    if padded:
        mask[0, :4] = mask[2, :7] = False
    context = RoutingContext(mask.reshape(-1), torch.arange(3).repeat_interleave(11))
    routing = ours.router(torch.randn(33, D), context)
    found = BALANCE_LOSSES.get("switch").build({})(routing, context)
    logits = routing.logits_TE.detach().clone().requires_grad_()
    expected = load_balancing_loss_func((logits,), E, K, mask.long() if padded else None)
    torch.testing.assert_close(K * found, expected, rtol=1e-5, atol=1e-6)
    ours.zero_grad()
    (by_logits,) = torch.autograd.grad(K * found, routing.logits_TE)
    (expected_by_logits,) = torch.autograd.grad(expected, logits)
    assert expected_by_logits.abs().sum() > 0
    torch.testing.assert_close(by_logits, expected_by_logits, rtol=1e-5, atol=1e-7)
