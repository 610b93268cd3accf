"""The contract of a set of experts. Shapes: T tokens, D hidden width, E experts, K slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe.types import MlpSpec


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# The names are those of transformers' ACT2FN, so that a config's `hidden_act` can be looked up here.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
}


class Experts(nn.Module, ABC):
    """E feed-forward blocks of one `MlpSpec`, applied to the tokens that a routing names."""

    def __init__(self, spec: MlpSpec, num_experts: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_experts = num_experts

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial parameters; upcycling replaces them."""

    @abstractmethod
    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sum over each token's slots, (T, D); an index of E marks an empty slot."""
