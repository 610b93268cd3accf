"""What the function of `grouped.py` hands to a body, and what it gets back. Shapes as there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from llava_moe.moe.kernels.pointwise import Pointwise, Wanted
from llava_moe.moe.kernels.slots import Slots


class Problem(NamedTuple):
    """One call.

    Attributes:
        x_TD: the tokens, in their own order.
        weight_S: combine weights in sorted order, of the dtype of x.
        first_EHD, bias_EH, down_EOF: the experts; the bias of the second projection is added elsewhere.
    """

    x_TD: Tensor
    weight_S: Tensor
    first_EHD: Tensor
    bias_EH: Tensor | None
    down_EOF: Tensor
    slots: Slots
    pointwise: Pointwise


class Gradients(NamedTuple):
    """None where not wanted; the one by the combine weights is in float32 at least, 0 for empty slots."""

    x_TD: Tensor | None
    weight_TK: Tensor | None
    first_EHD: Tensor | None
    bias_EH: Tensor | None
    down_EOF: Tensor | None


__all__ = ["Gradients", "Pointwise", "Problem", "Wanted"]
