"""The default: sort the slots by expert, then one grouped matrix product per projection.

Shapes: T tokens, D hidden, F expert width, E experts, K slots, S = T x K sorted slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_moe.moe.kernels.base import ExpertWeights

_ALIGNMENT_BYTES = 16  # what grouped_mm asks of every row


def grouped(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Same result as `loop` for any routing, without a host synchronisation on the fast path.

    Empty slots are computed with the last expert and weighted by zero: that keeps every row defined (grouped_mm leaves
    rows past its last offset uninitialised) and costs no synchronisation.
    """
    num_experts = weights.first_EFD.shape[0]
    num_tokens, num_slots = index_TK.shape
    empty_TK = index_TK >= num_experts
    weight_TK = weight_TK.masked_fill(empty_TK, 0.0)
    expert_S, order_S = index_TK.clamp(max=num_experts - 1).reshape(-1).sort(stable=True)
    token_S = order_S // num_slots
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=x_TD.device)
    counts_E.scatter_add_(0, expert_S, torch.ones_like(expert_S, dtype=torch.int32))
    ends_E = counts_E.cumsum(0, dtype=torch.int32)

    hidden_SF = weights.activate(_project(x_TD[token_S], weights.first_EFD, weights.first_bias_EF, expert_S, ends_E))
    out_SD = _project(hidden_SF, weights.down_EDF, weights.down_bias_ED, expert_S, ends_E)
    # Back to slot order by a gather with the inverse permutation, then a sum over slots: no atomics, deterministic.
    inverse_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
    out_TKD = out_SD[inverse_S].reshape(num_tokens, num_slots, out_SD.shape[-1])
    return (out_TKD * weight_TK.unsqueeze(-1).to(out_TKD.dtype)).sum(dim=1)


def _project(x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, expert_S: Tensor, ends_E: Tensor) -> Tensor:
    """Rows sorted by expert, (S, I) to (S, O)."""
    if _supported(x_SI, weight_EOI):
        y_SO = torch.nn.functional.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=ends_E)
    else:
        # float64 (gradient checks) and odd widths: the same sorted rows, one matrix product per expert.
        chunks = x_SI.tensor_split(ends_E[:-1].cpu().to(torch.int64))
        pairs = zip(chunks, weight_EOI.unbind(0), strict=True)
        y_SO = torch.cat([rows @ weight_OI.t() for rows, weight_OI in pairs])
    return y_SO if bias_EO is None else y_SO + bias_EO[expert_S]


def _supported(x_SI: Tensor, weight_EOI: Tensor) -> bool:
    size = x_SI.element_size()
    aligned = all(width * size % _ALIGNMENT_BYTES == 0 for width in weight_EOI.shape[1:])
    return aligned and x_SI.dtype in (torch.float32, torch.bfloat16, torch.float16)
