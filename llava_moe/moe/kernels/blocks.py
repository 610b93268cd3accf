"""The body for CPUs and for what `grouped_mm` refuses: one expert after another, on rows that stay in the cache.

Shapes as in `grouped.py`; S here counts the filled slots only, R the rows of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_moe.moe.kernels.problem import Gradients, Problem, Wanted


def forward(problem: Problem, keep: bool) -> tuple[Tensor, Tensor | None]:
    """y_TO, and h_SH if it is to be kept for the backward."""
    x_TD, bias_EH = problem.x_TD, problem.bias_EH
    experts, counts = problem.slots.loads()
    tokens, weights = _split(problem, counts)
    # Views are made at once: one by one they would cost as much time as the small operations on them.
    first, down = problem.first_EHD.unbind(0), problem.down_EOF.unbind(0)
    hidden_SH = x_TD.new_empty(sum(counts), problem.first_EHD.shape[1]) if keep else None
    kept = [None] * len(counts) if hidden_SH is None else hidden_SH.split(counts)
    y_TO = x_TD.new_zeros(x_TD.shape[0], problem.down_EOF.shape[1])
    for e, token_R, weight_R, out_RH in zip(experts, tokens, weights, kept, strict=True):
        rows_RD = x_TD.index_select(0, token_R)
        if bias_EH is None:
            hidden_RH = torch.mm(rows_RD, first[e].t(), out=out_RH)
        else:
            hidden_RH = torch.addmm(bias_EH[e], rows_RD, first[e].t(), out=out_RH)
        product_RF = problem.pointwise.forward(hidden_RH, weight_R)
        y_TO.index_add_(0, token_R, product_RF @ down[e].t())
    return y_TO, hidden_SH


def backward(problem: Problem, hidden_SH: Tensor, grad_TO: Tensor, wanted: Wanted) -> Gradients:
    """Every gradient that is wanted."""
    x_TD = problem.x_TD
    experts, counts = problem.slots.loads()
    tokens, weights = _split(problem, counts)
    first, down = problem.first_EHD.unbind(0), problem.down_EOF.unbind(0)
    grads = _buffers(problem, wanted)
    _clear_unused(grads, experts)
    grad_w = []
    for e, token_R, weight_R, hidden_RH in zip(experts, tokens, weights, hidden_SH.split(counts), strict=True):
        grad_RO = grad_TO.index_select(0, token_R)
        grad_RF = grad_RO @ down[e] if wanted.product else None
        product_RF = x_TD.new_empty(hidden_RH.shape[0], down[e].shape[1])
        grad_RH = torch.empty_like(hidden_RH)
        grad_w.append(problem.pointwise.backward(hidden_RH, grad_RF, weight_R, wanted, product_RF, grad_RH))
        if grads.down_EOF is not None:
            torch.mm(grad_RO.t(), product_RF, out=grads.down_EOF[e])
        if grads.x_TD is not None:
            grads.x_TD.index_add_(0, token_R, grad_RH @ first[e])
        if grads.first_EHD is not None:
            torch.mm(grad_RH.t(), x_TD.index_select(0, token_R), out=grads.first_EHD[e])
        if grads.bias_EH is not None:
            torch.sum(grad_RH, dim=0, out=grads.bias_EH[e])
    return grads._replace(weight_TK=_in_slots(problem, grad_w)) if wanted.weight else grads


def _split(problem: Problem, counts: list[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tokens and combine weights of each block."""
    filled = sum(counts)
    return problem.slots.token_S[:filled].split(counts), problem.weight_S[:filled].split(counts)


def _buffers(problem: Problem, wanted: Wanted) -> Gradients:
    """Zeros where blocks add up, uninitialised memory where every used expert is written once."""
    x_TD, bias_EH = problem.x_TD, problem.bias_EH
    return Gradients(
        x_TD=torch.zeros_like(x_TD) if wanted.x else None,
        weight_TK=None,
        first_EHD=torch.empty_like(problem.first_EHD) if wanted.first else None,
        bias_EH=torch.empty_like(bias_EH) if wanted.bias and bias_EH is not None else None,
        down_EOF=torch.empty_like(problem.down_EOF) if wanted.down else None,
    )


def _clear_unused(grads: Gradients, used: list[int]) -> None:
    """An expert without tokens has a gradient of zero."""
    for stack in (grads.first_EHD, grads.bias_EH, grads.down_EOF):
        if stack is not None:
            for e in set(range(stack.shape[0])) - set(used):
                stack[e].zero_()


def _in_slots(problem: Problem, blocks: list[Tensor | None]) -> Tensor:
    """The gradients by the combine weights in the order of the slots, (T, K); empty slots come last and get 0."""
    place_TK = problem.slots.place_TK
    parts = [block for block in blocks if block is not None]
    filled = sum(part.numel() for part in parts)
    dtype = torch.promote_types(problem.x_TD.dtype, torch.float32)
    empty = torch.zeros(place_TK.numel() - filled, dtype=dtype, device=place_TK.device)
    return torch.cat([*parts, empty])[place_TK]
