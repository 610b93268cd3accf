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
    scratch = _Scratch(spans, x_TD)
    hidden_SH = x_TD.new_empty(spans[-1][2] if spans else 0, problem.first_EHD.shape[1]) if keep else None
    y_TO = x_TD.new_zeros(x_TD.shape[0], down_EOF.shape[1])
    for e, lo, hi in spans:
        token_R, first_DH = slots.token_S[lo:hi], problem.first_EHD[e].t()
        rows_RD = torch.index_select(x_TD, 0, token_R, out=scratch.take("rows", hi - lo, x_TD.shape[1]))
        out_RH = hidden_SH[lo:hi] if hidden_SH is not None else scratch.take("hidden", hi - lo, first_DH.shape[1])
        if problem.bias_EH is None:
            torch.mm(rows_RD, first_DH, out=out_RH)
        else:
            torch.addmm(problem.bias_EH[e], rows_RD, first_DH, out=out_RH)
        product_RF = problem.pointwise.forward(out_RH, problem.weight_S[lo:hi])
        out_RO = scratch.take("output", hi - lo, down_EOF.shape[1])
        y_TO.index_add_(0, token_R, torch.mm(product_RF, down_EOF[e].t(), out=out_RO))
    return y_TO, hidden_SH


def backward(problem: Problem, hidden_SH: Tensor, grad_TO: Tensor, wanted: Wanted) -> Gradients:
    """Every gradient that is wanted."""
    x_TD, slots = problem.x_TD, problem.slots
    _, width_O, width_F = problem.down_EOF.shape
    _, width_H, width_D = problem.first_EHD.shape
    grads = _buffers(problem, wanted)
    weight_S = x_TD.new_zeros(slots.slot_S.numel(), dtype=torch.promote_types(x_TD.dtype, torch.float32))
    spans = slots.spans()
    scratch = _Scratch(spans, x_TD)
    _clear_unused(grads, {e for e, _, _ in spans})
    for e, lo, hi in spans:
        token_R, count = slots.token_S[lo:hi], hi - lo
        grad_RO = torch.index_select(grad_TO, 0, token_R, out=scratch.take("output", count, width_O))
        grad_RF = None
        if wanted.product:
            grad_RF = torch.mm(grad_RO, problem.down_EOF[e], out=scratch.take("grad", count, width_F))
        product_RF, grad_RH = scratch.take("product", count, width_F), scratch.take("hidden", count, width_H)
        grad_R = problem.pointwise.backward(
            hidden_SH[lo:hi], grad_RF, problem.weight_S[lo:hi], wanted, product_RF, grad_RH
        )
        if grad_R is not None:
            weight_S[lo:hi] = grad_R
        if grads.down_EOF is not None:
            torch.mm(grad_RO.t(), product_RF, out=grads.down_EOF[e])
        if grads.first_EHD is not None:
            rows_RD = torch.index_select(x_TD, 0, token_R, out=scratch.take("rows", count, width_D))
            torch.mm(grad_RH.t(), rows_RD, out=grads.first_EHD[e])
        if grads.bias_EH is not None:
            torch.sum(grad_RH, dim=0, out=grads.bias_EH[e])
        if grads.x_TD is not None:
            out_RD = torch.mm(grad_RH, problem.first_EHD[e], out=scratch.take("rows", count, width_D))
            grads.x_TD.index_add_(0, token_R, out_RD)
    # Empty slots come last and kept their zero.
    return grads._replace(weight_TK=weight_S[slots.place_TK]) if wanted.weight else grads


class _Scratch:
    """Memory that all experts use in turn: fresh pages for each would cost more than copying the rows."""

    def __init__(self, spans: list[tuple[int, int, int]], like: Tensor) -> None:
        self._most = max((hi - lo for _, lo, hi in spans), default=0)
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """(rows, width); what the same name held before is lost."""
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._most, width)
        return self._buffers[name][:rows]


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
