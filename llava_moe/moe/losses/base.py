"""The contract of a balance loss. Shapes: T tokens, E experts, K slots."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llava_moe.moe.types import Routing, RoutingContext

# (routing, context) -> scalar float32, unweighted; tokens outside context.token_mask_T never count.
BalanceLoss = Callable[[Routing, RoutingContext], Tensor]


def masked_mean(value_T: Tensor, mask_T: Tensor) -> Tensor:
    """Mean over the first dimension of (T,) or (T, E) values where the mask is true; 0 when it is nowhere true."""
    mask = mask_T.to(value_T.dtype)
    if value_T.ndim == 2:
        mask = mask.unsqueeze(-1)
    return (value_T * mask).sum(dim=0) / mask.sum().clamp(min=1)
