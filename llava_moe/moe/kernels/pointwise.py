"""Forward and backward of what stands between the two projections of an expert, by hand: few passes, few buffers.

    a = act(h)  or, gated,  a = act(g) * u  with h = [g, u]        out = W_down (w a)

The combine weight w is applied here rather than to the output: its gradient is then the product of a and the gradient
that comes back through W_down, and the output of the experts need not be kept.
Shapes: S slots, F expert width, H the width of h: 2F when gated, else F.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


class Wanted(NamedTuple):
    """Which gradients the backward owes: by x, the combine weights, and the parameters of the experts."""

    x: bool
    weight: bool
    first: bool
    bias: bool
    down: bool

    @property
    def hidden(self) -> bool:
        """The gradient by h is on the way to one of them."""
        return self.x or self.first or self.bias

    @property
    def product(self) -> bool:
        """So is the gradient by w a."""
        return self.hidden or self.weight


class Pointwise(NamedTuple):
    """The activation and whether it is gated."""

    activation: Activation
    gated: bool

    def forward(self, hidden_SH: Tensor, weight_S: Tensor) -> Tensor:
        """(S, H) to w a, (S, F)."""
        return self._weighted(self._parts(hidden_SH)[1], weight_S)

    def backward(
        self, hidden_SH: Tensor, grad_SF: Tensor | None, weight_S: Tensor, wanted: Wanted
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the rest of the backward needs, each part only where it is wanted.

        Args:
            grad_SF: gradient by w a, None if `wanted.product` is not set; its memory is used up.

        Returns:
            w a (S, F); the gradient by h (S, H); the gradient by w (S,), in float32 at least.
        """
        act_SF, plain_SF = self._parts(hidden_SH)
        grad_w_S, grad_h_SH = None, None
        if grad_SF is not None and wanted.weight:
            grad_w_S = (grad_SF * plain_SF).sum(-1, dtype=torch.promote_types(grad_SF.dtype, torch.float32))
        if grad_SF is not None and wanted.hidden:
            grad_SF = grad_SF.mul_(weight_S.unsqueeze(-1))
            grad_h_SH = torch.empty_like(hidden_SH)
            if self.gated:
                gate_SF, up_SF = hidden_SH.chunk(2, dim=-1)
                grad_gate_SF, grad_up_SF = grad_h_SH.chunk(2, dim=-1)
                torch.mul(grad_SF, act_SF, out=grad_up_SF)
                derive(self.activation, grad_SF.mul_(up_SF), gate_SF, grad_gate_SF)
            else:
                derive(self.activation, grad_SF, hidden_SH, grad_h_SH)
        return self._weighted(plain_SF, weight_S) if wanted.down else None, grad_h_SH, grad_w_S

    def _parts(self, hidden_SH: Tensor) -> tuple[Tensor, Tensor]:
        """act(g) and a; one and the same where there is no gate."""
        if not self.gated:
            act_SF = self.activation(hidden_SH)
            return act_SF, act_SF
        gate_SF, up_SF = hidden_SH.chunk(2, dim=-1)
        act_SF = self.activation(gate_SF)
        return act_SF, act_SF * up_SF

    def _weighted(self, plain_SF: Tensor, weight_S: Tensor) -> Tensor:
        # In place only where the memory is surely ours: an activation may return its argument.
        weight_S1 = weight_S.unsqueeze(-1)
        return plain_SF.mul_(weight_S1) if self.gated else plain_SF * weight_S1


def derive(activation: Activation, grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes grad * activation'(x) into `out`."""
    base, options = (activation.func, activation.keywords) if isinstance(activation, partial) else (activation, {})
    if base is F.silu:
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    elif base is F.gelu:
        torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out, **options)
    elif base in (F.relu, torch.relu):
        torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    else:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (result,) = torch.autograd.grad(activation(leaf), leaf, grad)
        out.copy_(result)
