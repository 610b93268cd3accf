"""Every expert's slots padded to one length, then one `bmm` for each projection. Plain autograd.

Costs: the host reads the loads once, and padding is computed. The length is that of the fullest expert, but at most
twice the mean load; a fuller expert takes several rows of the batch, each with a copy of its weights. So at most
3 S + E slots are computed and 1.5 E experts' weights are copied, however lopsided the loads.
On a GPU the backward of a gather adds atomically: the last bits of the gradients may differ from run to run.
Shapes: T tokens, D hidden, F expert width, H = 2F when gated else F, O output width, E experts, K slots, S filled
slots, N rows of the batch, L their length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_moe.moe.kernels.base import ExpertWeights
from llava_moe.moe.kernels.slots import sort_slots


def batched(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Same result as `loop` for any routing. On a GPU the host waits once, for the loads."""
    num_experts = weights.first_EFD.shape[0]
    slots = sort_slots(index_TK, num_experts)
    experts, counts = slots.loads()
    filled = sum(counts)
    # Without any slot one row of padding is computed: every parameter then gets its gradient of zero.
    length = min(max(counts, default=1), max(1, -(-2 * filled // num_experts)))
    rows, end = [], 0
    for e, count in zip(experts, counts, strict=True):
        start, end = end, end + count
        rows += [(e, lo, min(lo + length, end)) for lo in range(start, end, length)]
    rows = rows or [(0, 0, 0)]
    columns = torch.tensor(rows, device=x_TD.device).t().contiguous()
    expert_N, start_N, end_N = columns.unbind(0)
    # One row for each expert in order: the stacks are used as they are.
    chosen_N = None if [e for e, _, _ in rows] == list(range(num_experts)) else expert_N

    rows_NLD = _pad(x_TD, slots.token_S, start_N, length)
    hidden_NLH = _project(rows_NLD, weights.first_EFD, weights.first_bias_EF, chosen_N)
    out_NLO = _project(weights.activate(hidden_NLH), weights.down_EDF, weights.down_bias_ED, chosen_N)

    # Where each slot stands in the padded batch; an empty slot reads the first place, and its weight is cut off.
    empty_TK = slots.place_TK >= filled
    place_TK = slots.place_TK.masked_fill(empty_TK, 0)
    row_TK = torch.searchsorted(end_N, place_TK, right=True).clamp_(max=len(rows) - 1)
    position_TK = row_TK * length + place_TK - start_N[row_TK]
    weight_TK = weight_TK.masked_fill(empty_TK, 0.0).to(out_NLO.dtype)
    return (out_NLO.flatten(0, 1)[position_TK] * weight_TK.unsqueeze(-1)).sum(dim=1)


def _pad(x_TD: Tensor, token_S: Tensor, start_N: Tensor, length: int) -> Tensor:
    """(N, L, D). Behind its last slot a row goes on with others' tokens: their output is never read."""
    if token_S.numel() == 0:
        return x_TD.new_zeros(start_N.numel(), length, x_TD.shape[1])
    place_NL = start_N.unsqueeze(1) + torch.arange(length, device=x_TD.device)
    return x_TD[token_S[place_NL.clamp_(max=token_S.numel() - 1)]]


def _project(rows_NLI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, chosen_N: Tensor | None) -> Tensor:
    """(N, L, I) to (N, L, O), each row of the batch by its expert."""
    if chosen_N is not None:
        weight_EOI = weight_EOI.index_select(0, chosen_N)
        bias_EO = None if bias_EO is None else bias_EO.index_select(0, chosen_N)
    if bias_EO is None:
        return torch.bmm(rows_NLI, weight_EOI.transpose(1, 2))
    return torch.baddbmm(bias_EO.unsqueeze(1), rows_NLI, weight_EOI.transpose(1, 2))
