"""Noise upcycling, as described in Drop-Upcycling (Nakamura et al., 2502.19261): copies with Gaussian noise on top.

    W_e = W + m n        for each entry: m ~ Bernoulli(fraction), n ~ N(0, std^2)

Every expert has draws of its own. Biases stay.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.upcycling.base import Contract, UpcycleJob, Upcycler, stack
from llava_moe.moe.upcycling.from_scratch import gaussian


class Noise(Upcycler):
    """E copies, each with noise of its own."""

    @dataclasses.dataclass(frozen=True)
    class Config(Upcycler.Config):
        """Options.

        Attributes:
            std: standard deviation of the noise.
            fraction: share of the entries that get some, 0..1; the paper's own share is not known to us.
        """

        std: float = 0.02
        fraction: float = 0.5

    config: Noise.Config

    def __init__(self, config: Noise.Config) -> None:
        super().__init__(config)
        if config.std < 0:
            raise ValueError(f"upcycler noise: std={config.std} must be at least 0")
        if not 0 <= config.fraction <= 1:
            raise ValueError(f"upcycler noise: fraction={config.fraction} must be between 0 and 1")
        if config.std == 0 or config.fraction == 0:
            self.contract = Contract.EXACT_ANY_ROUTER

    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        tensors = stack([job.dense] * job.num_experts, job.num_experts, job.spec)
        if self.contract is Contract.EXACT_ANY_ROUTER:
            return tensors
        for name, tensor in tensors.items():
            if not name.endswith("_bias"):
                for expert in tensor:
                    self._disturb(expert, job.generator)
        return tensors

    def _disturb(self, matrix: Tensor, generator: torch.Generator) -> None:
        noise = gaussian(matrix.shape, generator) * self.config.std
        hit = torch.rand(matrix.shape, generator=generator, device=generator.device) < self.config.fraction
        matrix.copy_(matrix.float() + (noise * hit).to(matrix.device))
