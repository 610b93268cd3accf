"""A frozen feed-forward block that all experts of a layer share, for the kinds that learn small changes to it.

Shapes: D hidden width, F width of the block, O output width (D as a rule).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_moe.moe.experts.base import ACTIVATIONS, Experts
from llava_moe.moe.types import MlpSpec
from llava_moe.registry import near_misses

if TYPE_CHECKING:
    from llava_moe.moe.upcycling.base import DenseMlp


class FrozenBaseExperts(Experts):
    """Parameters, made with requires_grad=False:

        base_gate_proj (F, D) where the spec has a gate, base_up_proj (F, D), base_down_proj (O, F)
        base_gate_bias (F), base_up_bias (F), base_down_bias (O) where the spec has biases

    Loading a checkpoint may replace them by parameters that ask for gradients, and unfreezing all experts makes them
    ask, too. They get none then either, as they enter the computation detached.

    Raises:
        ValueError: the activation is unknown.
    """

    def __init__(self, spec: MlpSpec, num_experts: int, config: Any) -> None:
        super().__init__(spec, num_experts, config)
        if spec.activation not in ACTIVATIONS:
            hint = near_misses(spec.activation, list(ACTIVATIONS))
            raise ValueError(f"experts cannot use the activation {spec.activation!r}; {hint}")
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[spec.activation]
        D, F = spec.hidden, spec.intermediate
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (spec.output, F))):
            present = name != "gate" or spec.gated
            self.register_parameter(f"base_{name}_proj", _frozen(shape) if present else None)
            self.register_parameter(f"base_{name}_bias", _frozen(shape[:1]) if present and spec.bias else None)

    @torch.no_grad()
    def belongs_to_one_expert(self, name: str) -> bool:
        return not name.startswith("base_")

    def reset_base(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Draws the block; upcycling puts a trained one in its place."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("base_") and name.endswith("_bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("base_"):
                nn.init.normal_(parameter, std=std, generator=generator)

    def base(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of "gate", "up" or "down", without gradient."""
        bias = self.get_parameter(f"base_{name}_bias") if self.spec.bias else None
        return self.get_parameter(f"base_{name}_proj").detach(), None if bias is None else bias.detach()

    def from_dense(self, dense: DenseMlp) -> dict[str, Tensor]:
        """This module's whole state with the dense block as base, for `load_state_dict`.

        Args:
            dense: first (2F, D), gate rows first, where the spec has a gate, else (F, D); down (O, F).

        Raises:
            ValueError: the block has another shape than the spec.
        """
        firsts = dense.first.chunk(2) if self.spec.gated else (dense.first,)
        names = ("gate", "up") if self.spec.gated else ("up",)
        tensors = {f"base_{n}_proj": t for n, t in zip(names, firsts, strict=True)} | {"base_down_proj": dense.down}
        if dense.first_bias is not None:
            biases = dense.first_bias.chunk(2) if self.spec.gated else (dense.first_bias,)
            tensors |= {f"base_{n}_bias": t for n, t in zip(names, biases, strict=True)}
        if dense.down_bias is not None:
            tensors["base_down_bias"] = dense.down_bias
        state = {name: value.detach().clone() for name, value in self.state_dict().items()}
        wanted = {name: value.shape for name, value in state.items() if name.startswith("base_")}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if wanted != found:
            raise ValueError(f"the dense block has {_shapes(found)}, the experts' spec wants {_shapes(wanted)}")
        return {**state, **{name: tensor.clone() for name, tensor in tensors.items()}}


def gates(index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Tensor:
    """The combine weights spread over the experts, (T, E); the index E is an empty slot."""
    spread = weight_TK.new_zeros(index_TK.shape[0], num_experts + 1)
    return spread.scatter_add(1, index_TK, weight_TK)[:, :num_experts]


def _frozen(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def _shapes(found: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(found.items()))
