"""The knob of a k schedule: how many of a token's K slots are in use. Shapes: K slots of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_moe.moe.component import Float32Buffers


class ActiveK(Float32Buffers):
    """Holds the float32 buffer `active_k`, a whole number that the controller k_schedule moves between 1 and k."""

    float32_buffers = ("active_k",)
    active_k: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("active_k", torch.tensor(float(k), dtype=torch.float32))

    def off_K(self) -> Tensor:
        """bool (K,): True for the slots that are not in use; the first one always is."""
        return torch.arange(self.k, device=self.active_k.device) >= self.active_k.clamp(min=1)
