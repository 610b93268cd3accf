"""EfficientNet-Lite0 written out plainly, with the key names of the published PyTorch checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# repeats, output channels, kernel, stride of the first, expansion
STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)


def pad_same(image: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero padding as TensorFlow does it: the odd pixel goes to the bottom and the right."""
    sides = []
    for size in (image.shape[-1], image.shape[-2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return nn.functional.pad(image, sides)


class Convolution(nn.Conv2d):
    """A bias-free convolution with TensorFlow padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(pad_same(image, self.kernel_size[0], self.stride[0]))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, convolve each channel, project; added to the input where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands = expansion > 1
        self.adds = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = Convolution(inputs, inner)
            self._bn0 = norm(inner)
        self._depthwise_conv = Convolution(inner, inner, kernel, stride, groups=inner)
        self._bn1 = norm(inner)
        self._project_conv = Convolution(inner, outputs)
        self._bn2 = norm(outputs)

    def forward(self, image: Tensor) -> Tensor:
        inner = image
        if self.expands:
            inner = self._bn0(self._expand_conv(inner)).clamp(0, 6)
        inner = self._bn1(self._depthwise_conv(inner)).clamp(0, 6)
        inner = self._bn2(self._project_conv(inner))
        return image + inner if self.adds else inner


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) -> `features` (B, 1280, H/32, W/32), `forward` (B, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = Convolution(3, 32, 3, 2)
        self._bn0 = norm(32)
        blocks = []
        channels = 32
        for repeats, outputs, kernel, stride, expansion in STAGES:
            for index in range(repeats):
                blocks.append(Block(channels, outputs, kernel, stride if index == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = Convolution(320, 1280)
        self._bn1 = norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def features(self, image: Tensor) -> Tensor:
        image = self._bn0(self._conv_stem(image)).clamp(0, 6)
        for block in self._blocks:
            image = block(image)
        return self._bn1(self._conv_head(image)).clamp(0, 6)

    def forward(self, image: Tensor) -> Tensor:
        return self._fc(self.features(image).mean((2, 3)))


def randomise_norms(model: nn.Module, seed: int) -> None:
    """Gives the batch norms statistics of their own: with the initial ones a swapped norm would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = (module.num_features,)
            module.running_mean.copy_(0.1 * torch.randn(size, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            module.weight.data.copy_(0.5 + torch.rand(size, generator=generator))
            module.bias.data.copy_(0.1 * torch.randn(size, generator=generator))
