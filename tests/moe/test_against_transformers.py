"""Our layer with Mixtral's and Qwen3-MoE's settings is their block: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llava_moe.moe import KERNELS, ROUTERS, MlpSpec, MoELayer, StackedExperts

D, F, E, K = 16, 24, 6, 2


def stock_block(kind: str) -> nn.Module:
    if kind == "mixtral":
        config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
        block: nn.Module = MixtralSparseMoeBlock(config)
    else:
        qwen = Qwen3MoeConfig(
            hidden_size=D,
            moe_intermediate_size=F,
            num_experts=E,
            num_experts_per_tok=K,
            norm_topk_prob=kind == "qwen3-renorm",
        )
        block = Qwen3MoeSparseMoeBlock(qwen)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block


@pytest.mark.parametrize("kernel", KERNELS.names())
@pytest.mark.parametrize(
    ("kind", "convention"),
    [
        ("mixtral", "topk_softmax"),
        ("mixtral", "softmax_topk_renorm"),
        ("qwen3-renorm", "softmax_topk_renorm"),
        ("qwen3-plain", "softmax_topk"),
    ],
)
def test_equals_the_stock_block(kind: str, convention: str, kernel: str) -> None:
    stock = stock_block(kind)
    router = ROUTERS.get("top_k").build(D, E, {"k": K, "convention": convention})
    experts = StackedExperts(MlpSpec(D, F, "silu", True, False, "gate_proj", "up_proj", "down_proj"), E, kernel)
    ours = MoELayer(router, experts)
    router.weight.data.copy_(stock.gate.weight)
    experts.load_state_dict(stock.experts.state_dict())

    x = torch.randn(3, 7, D)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    direction = torch.randn_like(x)
    found, expected = ours(one), stock(two)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    pairs = {
        "x": (one.grad, two.grad),
        "router": (router.weight.grad, stock.gate.weight.grad),
        "gate_up": (experts.gate_up_proj.grad, stock.experts.gate_up_proj.grad),
        "down": (experts.down_proj.grad, stock.experts.down_proj.grad),
    }
    for name, (mine, theirs) in pairs.items():
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
