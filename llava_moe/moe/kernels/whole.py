"""The body for GPUs: one `grouped_mm` over all slots for every product.

Its rows behind the last offset, those of the empty slots, are never written. They may hold anything, NaN included, and
masking by multiplication would not help; so nothing here reads them: products stop at the offset, and the one row that
sums over slots are pointed at instead is set to zero. No host synchronisation, no atomic additions.
Shapes as in `grouped.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm

from llava_moe.moe.kernels.problem import Gradients, Problem, Wanted
from llava_moe.moe.kernels.slots import Slots

_ALIGNMENT_BYTES = 16  # what grouped_mm asks of every row


def supported(dtype: torch.dtype, *stacks: Tensor) -> bool:
    """Whether `grouped_mm` takes these: no float64, and rows of a multiple of 16 bytes."""
    aligned = all(width * dtype.itemsize % _ALIGNMENT_BYTES == 0 for stack in stacks for width in stack.shape[1:])
    return aligned and dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(problem: Problem, keep: bool) -> tuple[Tensor, Tensor]:
    """y_TO and h_SH (`keep` changes nothing here)."""
    slots = problem.slots
    rows_SD = problem.x_TD.index_select(0, slots.token_S)
    hidden_SH = grouped_mm(rows_SD, problem.first_EHD.transpose(1, 2), offs=slots.ends_E)
    del rows_SD
    if problem.bias_EH is not None:
        hidden_SH += problem.bias_EH.index_select(0, _experts(slots))
    scaled_SF = problem.pointwise.forward(hidden_SH, problem.weight_S)
    out_SO = grouped_mm(scaled_SF, problem.down_EOF.transpose(1, 2), offs=slots.ends_E)
    return _sum_slots(out_SO, slots), hidden_SH


def backward(problem: Problem, hidden_SH: Tensor, grad_TO: Tensor, wanted: Wanted) -> Gradients:
    """Every gradient that is wanted."""
    slots = problem.slots
    grad_SO = grad_TO.index_select(0, slots.token_S)
    grad_SF = grouped_mm(grad_SO, problem.down_EOF, offs=slots.ends_E) if wanted.product else None
    product_SF = hidden_SH.new_empty(hidden_SH.shape[0], problem.down_EOF.shape[2])
    grad_SH = torch.empty_like(hidden_SH)
    grad_S = problem.pointwise.backward(hidden_SH, grad_SF, problem.weight_S, wanted, product_SF, grad_SH)
    del grad_SF
    down = _by_expert(grad_SO, product_SF, slots) if wanted.down else None
    del grad_SO, product_SF
    weight_TK = None if grad_S is None else grad_S[slots.place_TK].masked_fill_(_empty(slots), 0.0)
    x_TD, first, bias = None, None, None
    if wanted.x:
        x_TD = _sum_slots(grouped_mm(grad_SH, problem.first_EHD, offs=slots.ends_E), slots)
    if wanted.first:
        first = _by_expert(grad_SH, problem.x_TD.index_select(0, slots.token_S), slots)
    if wanted.bias:
        # A sum over rows is a product with ones, as wide as the alignment asks: no atomic additions.
        ones = grad_SH.new_ones(grad_SH.shape[0], _ALIGNMENT_BYTES // grad_SH.element_size())
        bias = _by_expert(grad_SH, ones, slots)[..., 0].contiguous()
    return Gradients(x_TD, weight_TK, first, bias, down)


def _experts(slots: Slots) -> Tensor:
    """Expert of each place, (S,); the last one for empty slots."""
    places_S = torch.arange(slots.slot_S.numel(), dtype=slots.ends_E.dtype, device=slots.ends_E.device)
    return torch.searchsorted(slots.ends_E, places_S, right=True).clamp_(max=slots.ends_E.numel() - 1)


def _empty(slots: Slots) -> Tensor:
    return slots.place_TK >= slots.ends_E[-1]


def _sum_slots(rows_SO: Tensor, slots: Slots) -> Tensor:
    """Sum over the places of each token, (T, O); uses up the rows.

    If any slot is empty then the last row belongs to one: it becomes the zero that all empty slots read.
    """
    last = rows_SO.shape[0] - 1
    rows_SO[last:].masked_fill_(slots.ends_E[-1:] <= last, 0.0)
    return embedding_bag(slots.place_TK.masked_fill(_empty(slots), last), rows_SO, mode="sum")


def _by_expert(left_SM: Tensor, right_SN: Tensor, slots: Slots) -> Tensor:
    """left^T right over the rows of each expert, (E, M, N); 0 for an expert without rows."""
    product = grouped_mm(left_SM.t(), right_SN, offs=slots.ends_E)
    if product.device.type == "cuda" and not _zeroes_empty_groups(product.device):
        counts_E = slots.ends_E.diff(prepend=slots.ends_E.new_zeros(1))
        product.masked_fill_((counts_E == 0)[:, None, None], 0.0)
    return product


def _zeroes_empty_groups(device: torch.device) -> bool:
    """Not so from compute capability 10 on (pytorch issue 172439), nor in some ROCm builds (pytorch pull 174314)."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] <= 9
