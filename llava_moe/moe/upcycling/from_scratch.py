"""Experts that take nothing over from the dense block: the control that upcycling is measured against."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.upcycling.base import UpcycleJob, Upcycler, stack


class FromScratch(Upcycler):
    """Weights drawn from N(0, std^2), biases 0; shapes, dtype and device are those of the dense block."""

    @dataclasses.dataclass(frozen=True)
    class Config(Upcycler.Config):
        """Options.

        Attributes:
            std: standard deviation of the weights.
        """

        std: float = 0.02

    config: FromScratch.Config

    def __init__(self, config: FromScratch.Config) -> None:
        super().__init__(config)
        if config.std <= 0:
            raise ValueError(f"upcycler from_scratch: std={config.std} must be above 0")

    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        tensors = stack([job.dense] * job.num_experts, job.num_experts, job.spec)
        for name, tensor in tensors.items():
            if name.endswith("_bias"):
                tensor.zero_()
                continue
            for expert in tensor:
                expert.copy_(gaussian(expert.shape, job.generator) * self.config.std)
        return tensors


def gaussian(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard normal float32 numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
