"""Sparse upcycling (Komatsuzaki et al., 2212.05055): every expert starts as a copy of the dense block.

    E_e = FFN for every e, so sum_e g_e E_e(x) = FFN(x) sum_e g_e

With combine weights that sum to 1 the layer equals the dense block for any router; otherwise its output is the dense
one times their sum. The router's gradient from the task loss is exactly zero at that point, because all experts agree;
the experts part as soon as they see different tokens. An optimiser's moments can be copied the same way.
"""

from __future__ import annotations

from torch import Tensor

from llava_moe.moe.upcycling.base import Contract, UpcycleJob, Upcycler, stack


class Copy(Upcycler):
    """E identical experts."""

    contract = Contract.EXACT_ANY_ROUTER

    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        return stack([job.dense] * job.num_experts, job.num_experts, job.spec)
