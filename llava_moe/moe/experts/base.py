"""The contract of a set of experts. Shapes: T tokens, D hidden width, E experts, K slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe.component import Component
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


class Experts(nn.Module, Component, ABC):
    """E experts, applied to the tokens that a routing names.

    Attributes:
        spec: the feed-forward block that an expert is; its `intermediate` is the width of one expert.
        num_experts: E, all that a router can name, those without computation included.
        kinds: what each of them is: "ffn", "zero", "copy" or "constant".
    """

    kind: ClassVar[str] = "experts"

    def __init__(self, spec: MlpSpec, num_experts: int, config: Any) -> None:
        super().__init__()
        self.spec = spec
        self.num_experts = num_experts
        self.config = config
        self.kinds: tuple[str, ...] = ("ffn",) * num_experts

    @classmethod
    def build(cls, spec: MlpSpec, num_ffn: int, args: Mapping[str, Any]) -> Experts:
        """Makes `num_ffn` feed-forward experts, and what the kind adds to them, from a recipe's mapping.

        Raises:
            ValueError: an option is unknown or refused.
        """
        return cls(spec, num_ffn, cls.parse(args))

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial parameters; upcycling replaces them."""

    @abstractmethod
    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sum over each token's slots, (T, D); an index of E marks an empty slot."""

    def belongs_to_one_expert(self, name: str) -> bool:
        """Whether a parameter of this module is read only for the tokens that use its expert."""
        return True

    def idle_parameters(self, active: float) -> float:
        """Parameters that a token does not touch when it uses `active` feed-forward experts."""
        own = sum(p.numel() for name, p in self.named_parameters() if self.belongs_to_one_expert(name))
        return own * max(0.0, 1 - active / self.kinds.count("ffn"))

    def every(self, x_TD: Tensor) -> Tensor:
        """The output of every expert on every token, (T, E, D): E times the work of one expert."""
        num_tokens, num_experts = x_TD.shape[0], self.num_experts
        rows = x_TD.repeat(num_experts, 1)
        index = torch.arange(num_experts, device=x_TD.device).repeat_interleave(num_tokens).unsqueeze(-1)
        y = self(rows, index, torch.ones_like(index, dtype=torch.float32))
        return y.reshape(num_experts, num_tokens, y.shape[-1]).transpose(0, 1)
