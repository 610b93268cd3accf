"""The lightweight downsample projectors of MobileVLM (2312.16886, section 3.4) and of its version 2 (2402.03766)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import GridProjector, MergingProjector, from_grid, to_grid
from llava_moe.model.projectors.blocks import ChannelLayerNorm, SqueezeExcite


class Ldp(GridProjector):
    """LDP: W2 gelu(W1 x), a depthwise block, and a depthwise block of stride 2: M = N / 4.

    The depthwise blocks are those of MobileNetV3 with layer norm. The last operation is a norm, so its weight and bias
    set the scale of the embeddings.

    Raises:
        ValueError: (forward, num_output_tokens) the grid is not square or its side odd.
    """

    def build(self, config: LlavaMoeConfig) -> None:
        width = self.output_width
        self.linear_1 = nn.Linear(self.input_width, width)
        self.linear_2 = nn.Linear(width, width)
        self.block_1 = DepthwiseBlock(width, stride=1)
        self.block_2 = DepthwiseBlock(width, stride=2)

    @property
    def factor(self) -> int:
        return 2

    def forward(self, image_features: Tensor) -> Tensor:
        self.num_output_tokens(image_features.shape[1])
        hidden = self.linear_2(F.gelu(self.linear_1(image_features)))
        return from_grid(self.block_2(self.block_1(to_grid(hidden))))

    @property
    def output_layer(self) -> nn.Module:
        return self.block_2.norm_2


class DepthwiseBlock(nn.Module):
    """(B, D, h, w): norm(conv1x1(SE(hardswish(norm(depthwise3x3(x)))))), with a residual where the stride is 1."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.norm_1 = ChannelLayerNorm(width, eps=1e-5)
        self.squeeze = SqueezeExcite(width, _squeezed(width), nn.ReLU, nn.Hardsigmoid)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm_2 = ChannelLayerNorm(width, eps=1e-5)
        self.residual = stride == 1

    def forward(self, grid: Tensor) -> Tensor:
        hidden = self.squeeze(F.hardswish(self.norm_1(self.depthwise(grid))))
        hidden = self.norm_2(self.pointwise(hidden))
        return grid + hidden if self.residual else hidden


def _squeezed(width: int) -> int:
    """A quarter of the width, in whole eights, not less than nine tenths of it (MobileNetV3)."""
    rounded = max(8, (width // 4 + 4) // 8 * 8)
    return rounded if 10 * rounded >= 9 * (width // 4) else rounded + 8


class LdpV2(MergingProjector):
    """LDPv2: W2 gelu(W1 x), the mean of factor x factor neighbours, and x + depthwise3x3(x): M = N / factor^2.

    The depthwise convolution carries the positions (2102.10882).

    Raises:
        ValueError: (forward, num_output_tokens) the grid is not square or its side no multiple of the factor.
    """

    def build(self, config: LlavaMoeConfig) -> None:
        width = self.output_width
        self.linear_1 = nn.Linear(self.input_width, width)
        self.linear_2 = nn.Linear(width, width)
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, image_features: Tensor) -> Tensor:
        self.num_output_tokens(image_features.shape[1])
        hidden = self.linear_2(F.gelu(self.linear_1(image_features)))
        pooled = F.avg_pool2d(to_grid(hidden), self.factor)
        return from_grid(pooled + self.position(pooled))

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear_2

    @torch.no_grad()
    def scale_output(self, factor: Tensor) -> None:
        """Also scales the bias of the convolution, which is added behind the linear map."""
        super().scale_output(factor)
        if self.position.bias is not None:
            self.position.bias.mul_(factor)
