"""Convolutional parts that several projectors share; all maps are (B, C, h, w)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of every cell."""

    def forward(self, grid: Tensor) -> Tensor:
        return super().forward(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Gates channels by their mean over the grid (1709.01507): grid * gate(fc2(act(fc1(mean)))).

    Args:
        channels: of the grid.
        squeezed: channels between the two maps.
        activation: behind the first map.
        gate: behind the second one.
    """

    def __init__(
        self, channels: int, squeezed: int, activation: Callable[[], nn.Module], gate: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, grid: Tensor) -> Tensor:
        mean = grid.mean((2, 3), keepdim=True)
        return grid * self.gate(self.fc2(self.activation(self.fc1(mean))))
