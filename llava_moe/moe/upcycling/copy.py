"""Sparse upcycling (Komatsuzaki et al., 2212.05055): every expert starts as a copy of the dense block.

With combine weights that sum to 1 the layer equals the dense block for any router. The router's gradient from the task
loss is exactly zero at that point, because all experts agree; the experts part as soon as they see different tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llava_moe.moe.types import MlpSpec
from llava_moe.moe.upcycling.base import Contract, DenseMlp, Upcycler


class Copy(Upcycler):
    """E identical experts."""

    contract: ClassVar[Contract] = Contract.EXACT_ANY_ROUTER

    def __call__(
        self, dense: DenseMlp, spec: MlpSpec, num_experts: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        first = "gate_up" if spec.gated else "up"
        tensors = {f"{first}_proj": dense.first, "down_proj": dense.down}
        if dense.first_bias is not None and dense.down_bias is not None:
            tensors |= {f"{first}_bias": dense.first_bias, "down_bias": dense.down_bias}
        return {name: t.unsqueeze(0).repeat(num_experts, *[1] * t.ndim) for name, t in tensors.items()}
