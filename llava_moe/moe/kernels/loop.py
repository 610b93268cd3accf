"""The oracle: one expert after another, nothing clever. Any dtype, any width.

Shapes: T tokens, D hidden, F expert width, E experts, K slots, S tokens of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from llava_moe.moe.kernels.base import ExpertWeights


def loop(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Gathers each expert's tokens, runs it, and adds the weighted result back."""
    num_experts = weights.first_EFD.shape[0]
    # Unbound once: indexing `first_EFD[e]` inside the loop would back-propagate a zero tensor of the whole stack for
    # every expert, which makes the backward quadratic in their number.
    first = weights.first_EFD.unbind(0)
    down = weights.down_EDF.unbind(0)
    first_bias = [None] * num_experts if weights.first_bias_EF is None else weights.first_bias_EF.unbind(0)
    down_bias = [None] * num_experts if weights.down_bias_ED is None else weights.down_bias_ED.unbind(0)
    y_TD = x_TD.new_zeros(x_TD.shape[0], weights.down_EDF.shape[1])
    for e in range(num_experts):
        token_S, slot_S = torch.where(index_TK == e)
        hidden_SF = weights.activate(linear(x_TD[token_S], first[e], first_bias[e]))
        out_SD = linear(hidden_SF, down[e], down_bias[e])
        weighted_SD = out_SD * weight_TK[token_S, slot_S].unsqueeze(-1).to(out_SD.dtype)
        y_TD = y_TD.index_add(0, token_S, weighted_SD)
    return y_TD
