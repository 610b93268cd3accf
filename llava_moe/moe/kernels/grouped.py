"""The default kernel: one autograd function around sorted slots, which keeps little for the backward.

    forward    sort the slots by expert, h = W_first x + b, y = sum over a token's slots of W_down (w act(h))
    backward   computes act(h) again; keeps only x (T, D), h (S, H) and indices: neither the gathered input nor the
               activation nor the output of the experts, as autograd would (the idea of SonicMoE, arXiv 2512.14080)

The matrix products are done by one of two bodies with the same result:
    whole.py    one `grouped_mm` for each product over all slots. On CUDA in bfloat16 at compute capability 9.0 torch
                has a fused kernel that leaves the loads on the device; elsewhere its own fallback may read them.
    blocks.py   one expert after another, its rows in the cache; any dtype and width. The host reads the loads.
Shapes: T tokens, D hidden, F expert width, H = 2F when gated else F, O output width, E experts, K slots, S = T x K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_moe.moe.kernels import blocks, whole
from llava_moe.moe.kernels.base import ExpertWeights
from llava_moe.moe.kernels.pointwise import Pointwise
from llava_moe.moe.kernels.problem import Problem, Wanted
from llava_moe.moe.kernels.slots import Slots, sort_slots

BODIES = {"whole": whole, "blocks": blocks}
_WORK_WORTH_A_LOOP = 2**23  # multiplications of one projection in an expert


def grouped(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Same result as `loop` for any routing; the body is chosen by device, dtype, widths and work.

    An empty slot costs no matrix product. The backward computes what requires a gradient and nothing else, and adds in
    a fixed order.

    Raises:
        RuntimeError: in the backward, under `create_graph=True`; `loop` can be differentiated again.
    """
    return run_sorted(x_TD, index_TK, weight_TK, weights, choose_body(x_TD, index_TK.numel(), weights))


def choose_body(x_TD: Tensor, num_slots: int, weights: ExpertWeights) -> str:
    """A key of `BODIES` for T x K slots."""
    if num_slots == 0 or not whole.supported(x_TD.dtype, weights.first_EFD, weights.down_EDF):
        return "blocks"
    if x_TD.device.type != "cpu":
        return "whole"
    # On a CPU the loop over experts pays where an expert has work for its few dozen calls (docs/lab_log.md).
    num_experts, _, width = weights.down_EDF.shape
    work = num_slots * x_TD.shape[1] * width // num_experts
    return "blocks" if work >= _WORK_WORTH_A_LOOP else "whole"


def run_sorted(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: ExpertWeights, body: str) -> Tensor:
    """`grouped` with a body of one's choice."""
    tensors = (x_TD, weight_TK, weights.first_EFD, weights.first_bias_EF, weights.down_EDF)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    pointwise = Pointwise(weights.activation, weights.gated)
    # The dtype is decided by the caller; autocast would change it for some of the products.
    with torch.autocast(x_TD.device.type, enabled=False):
        y_TO = _SortedExperts.apply(*tensors, index_TK, pointwise, body, keep)
        if weights.down_bias_ED is not None:
            # sum over slots of w b: a product with the weights spread over the experts needs no sorting.
            num_tokens, num_experts = index_TK.shape[0], weights.down_bias_ED.shape[0]
            spread = weight_TK.new_zeros(num_tokens, num_experts + 1).scatter_add(1, index_TK, weight_TK)
            y_TO = y_TO + spread[:, :num_experts].to(y_TO.dtype) @ weights.down_bias_ED
    return y_TO


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        first_EHD: Tensor,
        bias_EH: Tensor | None,
        down_EOF: Tensor,
        index_TK: Tensor,
        pointwise: Pointwise,
        body: str,
        keep: bool,
    ) -> Tensor:
        slots = sort_slots(index_TK, first_EHD.shape[0])
        weight_S = weight_TK.reshape(-1)[slots.slot_S].to(x_TD.dtype)
        problem = Problem(x_TD, weight_S, first_EHD, bias_EH, down_EOF, slots, pointwise)
        y_TO, hidden_SH = BODIES[body].forward(problem, keep)
        if keep:
            ctx.save_for_backward(x_TD, weight_S, first_EHD, bias_EH, down_EOF, *slots, hidden_SH)
            ctx.pointwise, ctx.body, ctx.weight_dtype = pointwise, body, weight_TK.dtype
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # so it is under create_graph=True; the result would be taken for a constant
            raise RuntimeError("the experts kernel 'grouped' has no second derivative; use the kernel 'loop'")
        x_TD, weight_S, first_EHD, bias_EH, down_EOF, *indices, hidden_SH = ctx.saved_tensors
        problem = Problem(x_TD, weight_S, first_EHD, bias_EH, down_EOF, Slots(*indices), ctx.pointwise)
        wanted = Wanted(*ctx.needs_input_grad[:5])
        with torch.autocast(x_TD.device.type, enabled=False):
            grads = BODIES[ctx.body].backward(problem, hidden_SH, grad_TO.contiguous(), wanted)
        grad_w_TK = None if grads.weight_TK is None else grads.weight_TK.to(ctx.weight_dtype)
        return grads.x_TD, grad_w_TK, grads.first_EHD, grads.bias_EH, grads.down_EOF, None, None, None, None
