"""The one signature of every experts kernel. Shapes: T tokens, D hidden, F expert width, E experts, K slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights of one layer, all of one dtype.

    Attributes:
        first_EFD: (E, 2F, D) with the gate rows first when gated, else (E, F, D).
        down_EDF: (E, D, F); (E, O, F) where the output has another width O than the input.
        first_bias_EF, down_bias_ED: matching biases, or None.
        activation: pointwise; returns new memory.
    """

    first_EFD: Tensor
    down_EDF: Tensor
    first_bias_EF: Tensor | None
    down_bias_ED: Tensor | None
    activation: Callable[[Tensor], Tensor]
    gated: bool

    def activate(self, hidden_SF: Tensor) -> Tensor:
        """(S, 2F) to (S, F) when gated, else (S, F) to (S, F)."""
        if not self.gated:
            return self.activation(hidden_SF)
        gate_SF, up_SF = hidden_SF.chunk(2, dim=-1)
        return self.activation(gate_SF) * up_SF


# (x_TD, index_TK, weight_TK, weights) -> y_TD; an index of E is an empty slot and adds nothing.
Kernel = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]
