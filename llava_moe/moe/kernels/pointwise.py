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
    """The activation, which returns new memory, and whether it is gated."""

    activation: Activation
    gated: bool

    def forward(self, hidden_SH: Tensor, weight_S: Tensor) -> Tensor:
        """(S, H) to w a, (S, F)."""
        if self.gated:
            gate_SF, up_SF = hidden_SH.chunk(2, dim=-1)
            product_SF = self.activation(gate_SF).mul_(up_SF)
        else:
            product_SF = self.activation(hidden_SH)
        return product_SF.mul_(weight_S.unsqueeze(-1))

    def backward(
        self,
        hidden_SH: Tensor,
        grad_SF: Tensor | None,
        weight_S: Tensor,
        wanted: Wanted,
        product_SF: Tensor,
        grad_hidden_SH: Tensor,
    ) -> Tensor | None:
        """What the rest of the backward needs, each part only where it is wanted.

        Args:
            grad_SF: gradient by w a, None if `wanted.product` is not set; its memory is used up.
            product_SF: memory for w a, filled if `wanted.down` is set.
            grad_hidden_SH: memory for the gradient by h, filled if `wanted.hidden` is set.

        Returns:
            The gradient by w (S,), in float32 at least, if `wanted.weight` is set.
        """
        weight_S1 = weight_S.unsqueeze(-1)
        if self.gated:
            gate_SF, up_SF = hidden_SH.chunk(2, dim=-1)
            grad_gate_SF, grad_up_SF = grad_hidden_SH.chunk(2, dim=-1)
            act_SF = self.activation(gate_SF)
            plain_SF = torch.mul(act_SF, up_SF, out=product_SF)
        else:
            gate_SF, grad_gate_SF = hidden_SH, grad_hidden_SH
            act_SF = plain_SF = self.activation(hidden_SH)
        grad_w_S = None
        if grad_SF is not None and wanted.weight:
            terms_SF = torch.mul(grad_SF, plain_SF, out=grad_gate_SF)
            grad_w_S = terms_SF.sum(-1, dtype=torch.promote_types(grad_SF.dtype, torch.float32))
        if wanted.down:
            torch.mul(plain_SF, weight_S1, out=product_SF)
        if grad_SF is not None and wanted.hidden:
            grad_SF.mul_(weight_S1)
            if self.gated:
                torch.mul(grad_SF, act_SF, out=grad_up_SF)
                grad_SF.mul_(up_SF)
            derive(self.activation, grad_SF, gate_SF, grad_gate_SF)
        return grad_w_S


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
