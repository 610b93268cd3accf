"""The C-Abstractor (Honeybee, 2312.06742, section 3.2)."""

from __future__ import annotations

import dataclasses
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import Projector, check_at_least, from_grid, grid_side, to_grid
from llava_moe.model.projectors.blocks import ChannelLayerNorm, SqueezeExcite


class CAbstractor(Projector):
    """Convolutions, an adaptive average pool to sqrt(M) x sqrt(M), convolutions, and a perceptron: M = num_tokens.

    x + position -> L RegNet blocks C to H -> pool -> L RegNet blocks -> W2 silu(W1 .). Positions are learned for the
    grid that the tower gives for its image size, and start from a normal distribution with deviation 0.02.

    Raises:
        ValueError: num_tokens is no square; (forward, num_output_tokens) the grid is not the tower's square one.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projector.Config):
        """Options.

        Attributes:
            num_tokens: M, a square.
            depth: L, blocks before and behind the pool.
            width: H, channels of the blocks, a multiple of group_size.
            group_size: channels that one group of a 3 x 3 convolution sees.
        """

        num_tokens: int = 144
        depth: int = 3
        width: int = 1024
        group_size: int = 8

        def __post_init__(self) -> None:
            for field in dataclasses.fields(self):
                check_at_least(self, field.name, 1)
            if isqrt(self.num_tokens) ** 2 != self.num_tokens:
                raise ValueError(f"projector_args.num_tokens={self.num_tokens}: must be a square, such as 64 or 144")
            if self.width % self.group_size:
                raise ValueError(
                    f"projector_args.width={self.width}: must be a multiple of group_size={self.group_size}"
                )

    def build(self, config: LlavaMoeConfig) -> None:
        options, vision = self.options, config.vision_config
        self.num_positions = (int(vision.image_size) // int(vision.patch_size)) ** 2
        self.position = nn.Parameter(torch.empty(self.num_positions, self.input_width).normal_(std=0.02))
        self.before = regnet_stage(options.depth, self.input_width, options.width, options.group_size)
        self.behind = regnet_stage(options.depth, options.width, options.width, options.group_size)
        self.linear_1 = nn.Linear(options.width, self.output_width)
        self.linear_2 = nn.Linear(self.output_width, self.output_width)

    def num_output_tokens(self, num_input_tokens: int) -> int:
        grid_side(num_input_tokens)
        if num_input_tokens != self.num_positions:
            raise ValueError(
                f"projector=c_abstractor: it has positions for {self.num_positions} features, the patches of the "
                f"tower's image size, and got {num_input_tokens}"
            )
        return int(self.options.num_tokens)

    def forward(self, image_features: Tensor) -> Tensor:
        side = isqrt(self.num_output_tokens(image_features.shape[1]))
        grid = self.before(to_grid(image_features + self.position.to(image_features.dtype)))
        grid = self.behind(F.adaptive_avg_pool2d(grid, (side, side)))
        return self.linear_2(F.silu(self.linear_1(from_grid(grid))))

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear_2


def regnet_stage(depth: int, channels: int, width: int, group_size: int) -> nn.Sequential:
    """RegNet blocks of stride 1 (2003.13678), the first of which changes the number of channels."""
    blocks = [RegNetBlock(channels if index == 0 else width, width, group_size) for index in range(depth)]
    return nn.Sequential(*blocks)


class RegNetBlock(nn.Module):
    """(B, C, h, w) to (B, H, h, w): silu(shortcut(x) + norm(conv1x1(SE(silu(norm(conv3x3(silu(norm(conv1x1(x)))))))))).

    The shortcut is a convolution and norm where C is not H. Layer norm over channels takes the place of batch norm, and
    SiLU that of ReLU, as in Honeybee.
    """

    def __init__(self, channels: int, width: int, group_size: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(channels, width, 1)
        self.conv2 = _conv_norm(width, width, 3, groups=width // group_size)
        self.squeeze = SqueezeExcite(width, max(1, round(channels * 0.25)), nn.SiLU, nn.Sigmoid)
        self.conv3 = _conv_norm(width, width, 1)
        self.shortcut = _conv_norm(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, grid: Tensor) -> Tensor:
        hidden = F.silu(self.conv2(F.silu(self.conv1(grid))))
        return F.silu(self.shortcut(grid) + self.conv3(self.squeeze(hidden)))


def _conv_norm(channels: int, width: int, kernel: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, ChannelLayerNorm(width, eps=1e-5))
