"""Cross-entropy straight from hidden states: the logits of all label positions never exist at once.

The projection to the vocabulary is the largest tensor of a training step: 16 rows of 2,048 positions with 151,936 words
are 5 billion logits, and as many again in float32 with their gradient. Here they are made some positions at a time. The
gradients of a piece are taken while its logits exist and added up, so nothing is computed twice; backward multiplies
them by the factor that the loss was given (2410.10989, section 3, has the idea for a GPU).

`chunked` is plain torch and knows all that our head does. `liger` is the kernel of liger-kernel, for a GPU; it adds the
gradient of the matrix up in float32 as `chunked` does (in bfloat16, its default, small terms are lost).

Shapes: N positions with a label, D hidden width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_moe.registry import near_misses

AUTO, LIGER, CHUNKED, OFF = "auto", "liger", "chunked", "off"
KINDS = (AUTO, LIGER, CHUNKED, OFF)
CHUNK_LOGITS = 2**25  # logits that exist at once: 128 MiB in float32, and three times that with their gradient
LIGER_INSTALL = 'pip install "liger-kernel>=0.7"'


def project(
    hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """h (..., D) -> logits (..., V): z = scale * (h W^T + b), then softcap * tanh(z / softcap)."""
    logits = F.linear(hidden, weight_VD, bias_V)
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def resolve_fused_loss(asked: str, device: str | None) -> str:
    """What a recipe's `speed.fused_loss` comes to on a kind of device: liger, chunked or off.

    Args:
        asked: a name of `KINDS`.
        device: None looks at the name alone.

    Raises:
        ValueError: the name is unknown, or the kernel cannot be had here.
    """
    if asked not in KINDS:
        raise ValueError(f"speed.fused_loss={asked!r} is unknown; {near_misses(asked, list(KINDS))}")
    if device is None:
        return asked
    there = all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))
    if asked == AUTO:
        return LIGER if there and device == "cuda" else OFF
    if asked == LIGER and device != "cuda":
        raise ValueError("speed.fused_loss=liger needs a GPU; on a CPU use chunked, which needs as little memory")
    if asked == LIGER and not there:
        raise ValueError(f"speed.fused_loss=liger: liger-kernel is not installed: {LIGER_INSTALL}; or use chunked")
    return asked


def fused_cross_entropy(
    kind: str,
    hidden_ND: Tensor,
    target_N: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The cross-entropy of `project(...)` summed over all positions: a float32 scalar.

    As in a plain projection under autocast, products are in the dtype of autocast, and gradients in that of their
    parameter.

    Args:
        kind: `liger` or `chunked`.

    Raises:
        ValueError: the kind is another.
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):  # once, and not again for every piece
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    with torch.autocast(device, enabled=False):
        if kind == LIGER and target_N.numel():  # its kernel cannot do without any position
            return _liger(hidden_ND, target_N, weight_VD, bias_V, scale, softcap)
        if kind not in (LIGER, CHUNKED):
            raise ValueError(f"fused loss {kind!r}: must be {LIGER} or {CHUNKED}")
        rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        found: Any = _Chunked.apply(  # type: ignore[no-untyped-call]  # torch types it so
            hidden_ND, weight_VD, bias_V, target_N, scale, softcap, rows, torch.is_grad_enabled()
        )
        return found  # type: ignore[no-any-return]


class _Chunked(torch.autograd.Function):
    """The sum over pieces of `rows` positions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        scale: float | None,
        softcap: float | None,
        rows: int,
        learning: bool,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = (learning and needed for needed in ctx.needs_input_grad[:3])
        weight = weight_VD.detach().requires_grad_(of_weight)
        bias = None if bias_V is None else bias_V.detach().requires_grad_(of_bias)
        grad_hidden = torch.empty_like(hidden_ND) if of_hidden else None
        # float32 as the sum inside of one large product would be
        sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in _learning(weight, bias)]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(target_N), rows):
            piece = slice(start, start + rows)
            hidden = hidden_ND[piece].detach().requires_grad_(of_hidden)
            leaves = _learning(hidden, weight, bias)
            with torch.set_grad_enabled(bool(leaves)):
                logits = project(hidden, weight, bias, scale, softcap)
                loss = F.cross_entropy(logits.float(), target_N[piece], reduction="sum")
            total += loss.detach()
            found = list(torch.autograd.grad(loss, leaves)) if leaves else []
            if grad_hidden is not None:
                grad_hidden[piece] = found.pop(0)
            for added, gradient in zip(sums, found, strict=True):
                added += gradient
        ctx.save_for_backward(grad_hidden, sums.pop(0) if of_weight else None, sums.pop(0) if of_bias else None)
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> Any:
        (factor,) = factors
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else (grad_hidden.float() * factor).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * factor).to(weight_dtype),
            None if grad_bias is None else (grad_bias * factor).to(bias_dtype),
            *[None] * 5,
        )


def _learning(*leaves: Tensor | None) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]


def _liger(
    hidden_ND: Tensor,
    target_N: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if scale is not None:  # scale * (h W^T + b) = (scale * h) W^T + scale * b
        hidden_ND, bias_V = hidden_ND * scale, None if bias_V is None else bias_V * scale
    learns = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if torch.is_grad_enabled() and learns and not hidden_ND.requires_grad:
        hidden_ND = hidden_ND.detach().requires_grad_()  # or the kernel takes no gradient at all
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=softcap, accum_dtype=torch.float32)
    return loss(weight_VD, hidden_ND, target_N, bias_V).float()
