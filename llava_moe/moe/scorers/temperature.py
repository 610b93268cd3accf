"""A temperature that scores are divided by, fixed or learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """Divides scores by a positive number.

    Learned through its logarithm, so that no step of the optimiser can make it zero or negative.

    Raises:
        ValueError: the value is not above 0.
    """

    def __init__(self, where: str, value: float, learn: bool) -> None:
        super().__init__()
        if not value > 0:
            raise ValueError(f"{where}: temperature={value} must be above 0")
        self.value = value
        self.log_value = nn.Parameter(torch.empty(1)) if learn else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.log_value is not None:
            self.log_value.fill_(math.log(self.value))

    def forward(self, scores_TE: Tensor) -> Tensor:
        """(T, E) scores over the temperature."""
        if self.log_value is None:
            return scores_TE if self.value == 1.0 else scores_TE / self.value
        return scores_TE / self.log_value.float().exp()
