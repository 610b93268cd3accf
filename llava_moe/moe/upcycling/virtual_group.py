"""Virtual-group upcycling into fine-grained experts (He et al., 2410.07524, "Upcycling LLMs into MoE").

The dense block is split along its neurons into G shards, and the list of shards is repeated E / G times. The G experts
of one replica have equal router rows, so at the start a top-k router with k a multiple of G takes whole replicas.

Then the output is W / G of the dense one, where W is the sum of a token's combine weights, and the factor s = G / W
makes up for it:
    weights that sum to 1            W = 1,     s = G            exact for every router
    softmax, then top-k              W = k / E  at equal scores, s = G E / k   exact at equal scores only
                                     (the paper writes E for the number of replicas, so its form is E G^2 / T)
`down` puts s on the down weights. `cube_root` is the paper's rule: with n multiplicative factors on the way through the
block (each matrix, squared ReLU counting twice) every matrix is multiplied by s^(1/n). It is exact only where the
activation is homogeneous (relu, relu2): with SwiGLU and random weights the output is 20 % off at s = 8, and 30 % at 64.
A down bias is in every shard, so it is added with weight W and divided by W alone.
Shapes: E experts, F dense width, G shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_moe.moe.types import MlpSpec
from llava_moe.moe.upcycling.base import Contract, DenseMlp, UpcycleJob, Upcycler, even_share, gates_of, stack
from llava_moe.moe.upcycling.drop import redraw_neurons
from llava_moe.registry import near_misses

if TYPE_CHECKING:
    from llava_moe.moe.routers.base import Router

SCALINGS = ("down", "cube_root")


class VirtualGroup(Upcycler):
    """E / G replicas of the dense block, each in G shards."""

    contract = Contract.EXACT_ANY_ROUTER
    needs_router = True

    @dataclasses.dataclass(frozen=True)
    class Config(Upcycler.Config):
        """Options.

        Attributes:
            granularity: G; divides the width and the number of experts.
            scaling: one of `SCALINGS`.
            shuffle: whether each replica is split after a random permutation of its neurons (Qwen2-57B-A14B).
            redraw: share of each expert's neurons that start anew, as in `drop` (Qwen2-57B-A14B: 0.5).
        """

        granularity: int = 8
        scaling: str = "down"
        shuffle: bool = False
        redraw: float = 0.0

    config: VirtualGroup.Config

    def __init__(self, config: VirtualGroup.Config) -> None:
        super().__init__(config)
        if config.granularity < 1:
            raise ValueError(f"upcycler virtual_group: granularity={config.granularity} must be at least 1")
        if config.scaling not in SCALINGS:
            hint = near_misses(config.scaling, list(SCALINGS))
            raise ValueError(f"upcycler virtual_group: unknown scaling {config.scaling!r}; {hint}")
        if not 0 <= config.redraw <= 1:
            raise ValueError(f"upcycler virtual_group: redraw={config.redraw} must be between 0 and 1")
        if config.scaling != "down" or config.redraw > 0:
            self.contract = Contract.NONE

    def expert_spec(self, spec: MlpSpec, num_experts: int) -> MlpSpec:
        granularity = self.config.granularity
        if num_experts % granularity:
            raise ValueError(
                f"upcycler virtual_group: granularity={granularity} must divide the number of experts, {num_experts}"
            )
        return spec.with_width(even_share("upcycler virtual_group", spec.intermediate, granularity))

    def prepare_router(self, router: Router) -> None:
        router.tie_rows(self.config.granularity)

    def contract_with(self, router: Router) -> Contract:
        if self.contract is not Contract.EXACT_ANY_ROUTER or not self._takes_whole_replicas(router):
            return Contract.NONE
        return Contract.EXACT_ANY_ROUTER if router.normalised else Contract.EXACT_UNIFORM_ROUTER

    def _takes_whole_replicas(self, router: Router) -> bool:
        """Looks at the routing of random tokens: whether the experts of a replica always have equal weights."""
        if router.needs:
            return False
        x_TD = torch.randn(64, router.hidden, generator=torch.Generator().manual_seed(0))
        gates_TE = gates_of(router, x_TD)
        gates_TRG = gates_TE.unflatten(-1, (-1, self.config.granularity))
        return bool((gates_TRG.amax(-1) - gates_TRG.amin(-1) < 1e-4).all())

    def factor(self, router: Router) -> float:
        """The s of the head of this file, G / W, with W at equal scores.

        Raises:
            ValueError: the router gives no weight at all at equal scores.
        """
        # All scores of a router with tied rows are equal at a token of zeros.
        total = 1.0 if router.normalised else float(gates_of(router, torch.zeros(1, router.hidden)).sum())
        if total <= 0:
            name = type(router).__name__
            raise ValueError(f"upcycler virtual_group: {name} gives experts of equal scores no weight to scale up")
        return self.config.granularity / total

    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        G, spec, dense = self.config.granularity, job.spec, job.dense
        shard = self.expert_spec(spec, job.num_experts)
        scale = self.factor(job.given_router())
        # Together the shards of a replica have G times the bias, with the factor s / G on top.
        dense = dense.scaled(1.0, bias=scale / G)
        dense = dense.scaled(scale, bias=1.0) if self.config.scaling == "down" else _spread(dense, scale, spec)
        shards = (dense.take(neurons, spec) for neurons in self._neurons(job))
        tensors = stack(shards, job.num_experts, spec)
        redraw_neurons(tensors, shard, self.config.redraw, True, job.generator)
        return tensors

    def _neurons(self, job: UpcycleJob) -> Iterator[Tensor]:
        """The neurons of each expert, replica after replica."""
        neurons_F = torch.arange(job.spec.intermediate)
        for _ in range(job.num_experts // self.config.granularity):
            if self.config.shuffle:
                generator = job.generator
                neurons_F = torch.randperm(job.spec.intermediate, generator=generator, device=generator.device)
            yield from neurons_F.reshape(self.config.granularity, -1)


def _spread(dense: DenseMlp, scale: float, spec: MlpSpec) -> DenseMlp:
    """The factor in equal parts on every matrix; a bias before the activation belongs to its matrix."""
    factors = 1 + (2 if spec.activation == "relu2" else 1) + int(spec.gated)
    part = scale ** (1 / factors)
    first = (dense.first.float() * part).to(dense.first.dtype)
    bias = dense.first_bias
    first_bias = None if bias is None else (bias.float() * part).to(bias.dtype)
    return dataclasses.replace(dense.scaled(part, bias=1.0), first=first, first_bias=first_bias)
