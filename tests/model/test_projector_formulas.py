"""Every projector computes what its paper says: against slow formulas and foreign modules with the same weights."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm2d, LayerNormAct2d
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from tests.model.projector_cases import (
    CHANNELS,
    FEATURES,
    HIDDEN,
    SIDE,
    features_for,
    projector_of,
)


def numbers(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def load_in_order(module: nn.Module, tensors: list[Tensor]) -> nn.Module:
    """Copies tensors into a foreign module whose parameters come in the same order."""
    own = module.state_dict()
    assert [t.shape for t in own.values()] == [t.shape for t in tensors]
    module.load_state_dict(dict(zip(own, tensors, strict=True)))
    return module


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.stack([(layer.weight * row).sum(1) + layer.bias for row in x])


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean, variance = x.mean(), ((x - x.mean()) ** 2).mean()
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


@torch.no_grad()
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_mlp_formula(depth: int) -> None:
    projector, x = projector_of(f"mlp{depth}x_gelu"), features_for("mlp", 1)
    hidden = affine(x[0], projector.linear_1)
    for number in range(2, depth + 1):
        hidden = affine(gelu(hidden), getattr(projector, f"linear_{number}"))
    torch.testing.assert_close(projector(x)[0], hidden, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, nn.Linear) for m in projector.modules()) == depth


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_average_pool_formula(factor: int) -> None:
    projector, x = projector_of("average_pool", {"factor": factor}), features_for("average_pool", 1)
    means = []
    for row in range(0, SIDE, factor):
        for column in range(0, SIDE, factor):
            cells = [x[0, (row + i) * SIDE + column + j] for i in range(factor) for j in range(factor)]
            means.append(torch.stack(cells).mean(0))
    expected = affine(gelu(affine(torch.stack(means), projector.mlp[0])), projector.mlp[2])
    torch.testing.assert_close(projector(x)[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_is_that_of_internvl(factor: int) -> None:
    projector, x = projector_of("pixel_shuffle", {"factor": factor}), features_for("pixel_shuffle")
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=CHANNELS),
        text_config=SimpleNamespace(hidden_size=HIDDEN),
        downsample_ratio=1 / factor,
        projector_hidden_act="gelu",
    )
    stock: Any = InternVLMultiModalProjector(config)  # type: ignore[no-untyped-call,arg-type]
    stock.load_state_dict(projector.state_dict())
    grid = x.reshape(2, SIDE, SIDE, CHANNELS)
    merged = InternVLModel.pixel_shuffle(None, grid, 1 / factor)  # type: ignore[arg-type]
    expected = stock(merged.reshape(2, -1, CHANNELS * factor**2))
    torch.testing.assert_close(projector(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_perceiver_formula() -> None:
    """Query by query and head by head."""
    projector, x = projector_of("perceiver"), features_for("perceiver", 1)
    latents = projector.latents
    for layer in projector.layers:
        normed = torch.stack([norm(z, layer.norm_latents) for z in latents])
        seen = torch.cat([torch.stack([norm(f, layer.norm_features) for f in x[0]]), normed])
        query, key, value = (m @ w.weight.T for m, w in
                             ((normed, layer.q_proj), (seen, layer.k_proj), (seen, layer.v_proj)))  # fmt: skip
        read = torch.empty_like(query)
        for head in (slice(0, 4), slice(4, 8)):
            for i in range(len(latents)):
                weights = torch.stack([query[i, head] @ k[head] / 2.0 for k in key]).softmax(0)
                read[i, head] = sum(w * v[head] for w, v in zip(weights, value, strict=True))
        latents = latents + read @ layer.o_proj.weight.T
        ff = torch.stack([norm(z, layer.norm_ff) for z in latents])
        latents = latents + gelu(ff @ layer.fc1.weight.T) @ layer.fc2.weight.T
    expected = affine(torch.stack([norm(z, projector.norm) for z in latents]), projector.linear)
    torch.testing.assert_close(projector(x)[0], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_perceiver_takes_any_number_of_features() -> None:
    projector = projector_of("perceiver")
    for count in (1, 7, FEATURES + 1):
        assert projector.num_output_tokens(count) == 5
        assert projector(torch.randn(2, count, CHANNELS)).shape == (2, 5, HIDDEN)


@torch.no_grad()
def test_c_abstractor_has_the_regnet_stages_of_timm() -> None:
    projector, x = projector_of("c_abstractor"), features_for("c_abstractor", 1)
    parts: dict[str, Any] = {"act_layer": nn.SiLU, "norm_layer": LayerNorm2d, "group_size": 4}
    before = load_in_order(RegStage(2, CHANNELS, 16, 1, 1, **parts), numbers(projector.before))
    behind = load_in_order(RegStage(2, 16, 16, 1, 1, **parts), numbers(projector.behind))
    grid = before((x + projector.position).transpose(1, 2).reshape(1, CHANNELS, SIDE, SIDE))
    # four cells to three: windows of two that overlap
    pooled = torch.stack(
        [grid[0, :, i : i + 2, j : j + 2].mean((1, 2)) for i in range(3) for j in range(3)], dim=1
    ).reshape(1, 16, 3, 3)
    cells = behind(pooled)[0].flatten(1).T
    hidden = affine(cells, projector.linear_1)
    expected = affine(hidden * hidden.sigmoid(), projector.linear_2)
    torch.testing.assert_close(projector(x)[0], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_ldp_has_the_blocks_of_mobilenet() -> None:
    projector, x = projector_of("ldp"), features_for("ldp", 1)
    norm = partial(LayerNormAct2d, act_layer=None)  # the norm that MobileVLM gives them
    grid = affine(gelu(affine(x[0], projector.linear_1)), projector.linear_2).T.reshape(1, HIDDEN, SIDE, SIDE)
    for block, stride in ((projector.block_1, 1), (projector.block_2, 2)):
        config = InvertedResidualConfig(HIDDEN, 3, HIDDEN, HIDDEN, True, "HS", stride, 1, 1)
        grid = load_in_order(InvertedResidual(config, norm), numbers(block))(grid)
    torch.testing.assert_close(projector(x)[0], grid[0].flatten(1).T, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_ldp_v2_formula() -> None:
    projector, x = projector_of("ldp_v2"), features_for("ldp_v2", 1)
    grid = affine(gelu(affine(x[0], projector.linear_1)), projector.linear_2).reshape(SIDE, SIDE, HIDDEN)
    pooled = torch.zeros(4, 4, HIDDEN)  # 2 x 2 with a border of zeros
    for i in range(2):
        for j in range(2):
            pooled[i + 1, j + 1] = grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1))
    weight, bias = projector.position.weight[:, 0], projector.position.bias
    expected = [
        pooled[i + 1, j + 1] + bias + sum(weight[:, a, b] * pooled[i + a, j + b] for a in range(3) for b in range(3))
        for i in range(2)
        for j in range(2)
    ]
    torch.testing.assert_close(projector(x)[0], torch.stack(expected), rtol=1e-4, atol=1e-4)
