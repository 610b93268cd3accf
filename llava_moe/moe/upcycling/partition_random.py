"""Independent-Random of LLaMA-MoE (2406.16554): the neurons are dealt out at random; best of its constructions.

    I_e = part e of E equal parts of a random permutation of the F neurons

Shapes: F neurons, E experts.
"""

from __future__ import annotations

import torch

from llava_moe.moe.upcycling.base import UpcycleJob
from llava_moe.moe.upcycling.partition import Assignment, Partition


class PartitionRandom(Partition):
    """Looks at nothing."""

    def assign(self, job: UpcycleJob) -> Assignment:
        order_F = torch.randperm(job.spec.intermediate, generator=job.generator, device=job.generator.device)
        return Assignment(order_F.reshape(job.num_experts, -1).sort(dim=-1).values)
