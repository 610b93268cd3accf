"""The body for CPUs and for what `grouped_mm` refuses: one expert after another, on rows that stay in the cache.

Shapes as in `grouped.py`; S here counts the filled slots only, R the rows of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_moe.moe.kernels.problem import Gradients, Problem, Wanted


def forward(problem: Problem, keep: bool) -> tuple[Tensor, Tensor | None]:
    """y_TO, and h_SH if it is to be kept for the backward."""
    x_TD, slots, down_EOF = problem.x_TD, problem.slots, problem.down_EOF
    spans = slots.spans()
    filled = spans[-1][2] if spans else 0
    hidden_SH = x_TD.new_empty(filled, problem.first_EHD.shape[1]) if keep else None
    y_TO = x_TD.new_zeros(x_TD.shape[0], down_EOF.shape[1])
    for e, lo, hi in spans:
        token_R = slots.token_S[lo:hi]
        rows_RD, first_DH = x_TD.index_select(0, token_R), problem.first_EHD[e].t()
        out = None if hidden_SH is None else hidden_SH[lo:hi]
        if problem.bias_EH is None:
            block_RH = torch.mm(rows_RD, first_DH, out=out)
        else:
            block_RH = torch.addmm(problem.bias_EH[e], rows_RD, first_DH, out=out)
        scaled_RF = problem.pointwise.forward(block_RH, problem.weight_S[lo:hi])
        y_TO.index_add_(0, token_R, scaled_RF @ down_EOF[e].t())
    return y_TO, hidden_SH


def backward(problem: Problem, hidden_SH: Tensor, grad_TO: Tensor, wanted: Wanted) -> Gradients:
    """Every gradient that is wanted."""
    x_TD, slots = problem.x_TD, problem.slots
    grads = _buffers(problem, wanted)
    weight_S = x_TD.new_zeros(slots.slot_S.numel(), dtype=torch.promote_types(x_TD.dtype, torch.float32))
    spans = slots.spans()
    _clear_unused(grads, {e for e, _, _ in spans})
    for e, lo, hi in spans:
        token_R = slots.token_S[lo:hi]
        grad_RO = grad_TO.index_select(0, token_R)
        grad_RF = grad_RO @ problem.down_EOF[e] if wanted.product else None
        weight_R = problem.weight_S[lo:hi]
        scaled_RF, grad_RH, grad_R = problem.pointwise.backward(hidden_SH[lo:hi], grad_RF, weight_R, wanted)
        if grads.down_EOF is not None and scaled_RF is not None:
            torch.mm(grad_RO.t(), scaled_RF, out=grads.down_EOF[e])
        if grad_R is not None:
            weight_S[lo:hi] = grad_R
        if grad_RH is None:
            continue
        if grads.x_TD is not None:
            grads.x_TD.index_add_(0, token_R, grad_RH @ problem.first_EHD[e])
        if grads.first_EHD is not None:
            torch.mm(grad_RH.t(), x_TD.index_select(0, token_R), out=grads.first_EHD[e])
        if grads.bias_EH is not None:
            torch.sum(grad_RH, dim=0, out=grads.bias_EH[e])
    # Empty slots come last and kept their zero.
    return grads._replace(weight_TK=weight_S[slots.place_TK]) if wanted.weight else grads


def _buffers(problem: Problem, wanted: Wanted) -> Gradients:
    """Zeros where blocks add up, uninitialised memory where every used expert is written once."""
    x_TD = problem.x_TD
    return Gradients(
        x_TD=torch.zeros_like(x_TD) if wanted.x else None,
        weight_TK=None,
        first_EHD=torch.empty_like(problem.first_EHD) if wanted.first else None,
        bias_EH=torch.empty_like(problem.bias_EH) if wanted.bias and problem.bias_EH is not None else None,
        down_EOF=torch.empty_like(problem.down_EOF) if wanted.down else None,
    )


def _clear_unused(grads: Gradients, used: set[int]) -> None:
    """An expert without tokens has a gradient of zero."""
    for stack in (grads.first_EHD, grads.bias_EH, grads.down_EOF):
        if stack is not None:
            for e in range(stack.shape[0]):
                if e not in used:
                    stack[e].zero_()
