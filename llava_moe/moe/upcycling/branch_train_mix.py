"""Branch-Train-MiX (Sukhbaatar et al., 2403.07816): the experts are the feed-forward blocks of several dense models.

    E_e = FFN of model e        every other tensor: the mean over the models

Models that were trained apart from one seed model give one expert each, in the order in which they are named; the seed
model may be one of them. Whoever writes the checkpoint averages with `mean_tensor`; the router is drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_moe.moe.upcycling.base import UpcycleJob, Upcycler, stack


class BranchTrainMix(Upcycler):
    """Expert e is the block of parent e; with identical parents this is `copy`."""

    def num_parents(self, num_experts: int) -> int:
        return num_experts

    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        return stack(job.parents, len(job.parents), job.spec)


def mean_tensor(tensors: Sequence[Tensor]) -> Tensor:
    """The arithmetic mean of the same tensor of several models, added up in float32, in the dtype of the first.

    Raises:
        ValueError: there is none, or their shapes differ.
    """
    if not tensors or any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(f"only tensors of one shape have a mean, not {[tuple(t.shape) for t in tensors]}")
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)
