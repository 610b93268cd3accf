"""The contract of an upcycler. Shapes: D hidden width, F dense width, E experts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.types import MlpSpec
from llava_moe.registry import near_misses


class Contract(Enum):
    """What an upcycled layer promises at step 0; the tests hold each upcycler to it, to 1e-5 in float32."""

    EXACT_ANY_ROUTER = "exact_any_router"  # equals the dense block for every routing whose weights sum to 1
    EXACT_UNIFORM_ROUTER = "exact_uniform_router"  # equals it when all experts get the same weight
    EXACT_SUM_OF_ALL = "exact_sum_of_all"  # equals it when every expert is used with weight 1
    NORM_PRESERVING = "norm_preserving"  # keeps the scale of the output, not the output
    NONE = "none"


@dataclasses.dataclass(frozen=True)
class DenseMlp:
    """The weights of one dense block: first (2F, D) with gate rows first when gated, else (F, D); down (D, F)."""

    first: Tensor
    down: Tensor
    first_bias: Tensor | None
    down_bias: Tensor | None

    @staticmethod
    def read(module: nn.Module, spec: MlpSpec) -> DenseMlp:
        """Takes the weights out of a live module by the names in its spec."""

        def child(name: str) -> nn.Linear:
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}, not a Linear"
            return linear

        firsts = [child(spec.up_name)]
        if spec.gated and not spec.fused_gate:
            assert spec.gate_name is not None
            firsts.insert(0, child(spec.gate_name))
        down = child(spec.down_name)
        first_bias = torch.cat([f.bias for f in firsts]).detach() if spec.bias else None
        down_bias = down.bias.detach() if spec.bias else None
        return DenseMlp(torch.cat([f.weight for f in firsts]).detach(), down.weight.detach(), first_bias, down_bias)


class Upcycler(ABC):
    """Dense weights in, the stacked tensors of `StackedExperts` out."""

    contract: ClassVar[Contract]

    @dataclasses.dataclass(frozen=True)
    class Config:
        """The options that a recipe may set under `upcycler.args`."""

    def __init__(self, config: Upcycler.Config) -> None:
        self.config = config

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Upcycler:
        """Makes the upcycler from a recipe's mapping.

        Raises:
            ValueError: an option is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls.Config)]
        for key in args:
            if key not in known:
                raise ValueError(f"upcycler {cls.__name__} has no option {key!r}; {near_misses(key, known)}")
        return cls(cls.Config(**args))

    @abstractmethod
    def __call__(
        self, dense: DenseMlp, spec: MlpSpec, num_experts: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The state dict of the experts, by the parameter names of `StackedExperts`."""
