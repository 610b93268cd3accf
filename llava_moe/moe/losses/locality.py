"""The locality loss of LocMoE (2401.13920): tokens should prefer the experts of their own node.

    L = KL(D_c || D_l)      D_c = mean probability mass of each node's experts
                            D_l = (1 - epsilon) * onehot(own node) + epsilon / n

The paper gives neither the estimator of D_c nor what to do about the zeros of a fully local D_l; probability mass and
smoothing are ours. The experts lie on the nodes in order, E / n on each; the ranks likewise. L is about epsilon (and
not quite 0) when all mass is local, and about ln(n / epsilon) when none is. It wants the opposite of balance: use it
beside a balance loss, with a small coefficient. Shapes: E experts, N = n nodes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from llava_moe.moe.losses.base import EPSILON, BalanceLoss, masked_mean
from llava_moe.moe.types import Routing, RoutingContext

if TYPE_CHECKING:
    from llava_moe.moe.routers import Router


class Locality(BalanceLoss):
    """Divergence of the routed mass over nodes from staying on this one."""

    @dataclasses.dataclass(frozen=True)
    class Config(BalanceLoss.Config):
        """Options.

        Attributes:
            num_nodes: n, at least 2; the number of experts must be a multiple of it.
            epsilon: smoothing of the target, between 0 and 1, both excluded.
        """

        num_nodes: int
        epsilon: float = 0.05

    config: Locality.Config

    def __init__(self, config: Locality.Config) -> None:
        super().__init__(config)
        if config.num_nodes < 2:
            raise ValueError(f"locality: num_nodes={config.num_nodes} must be at least 2")
        if not 0 < config.epsilon < 1:
            raise ValueError(f"locality: epsilon={config.epsilon} must be between 0 and 1")

    def check(self, router: Router, part: str = "decoder") -> None:
        super().check(router, part)
        if router.num_experts % self.config.num_nodes:
            raise ValueError(
                f"locality: num_nodes={self.config.num_nodes} must divide the {router.num_experts} experts of a layer"
            )

    @property
    def node(self) -> int:
        """The node of this process: its rank's share of the ranks; 0 in a single process.

        Raises:
            ValueError: the ranks cannot be shared out evenly.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return 0
        if dist.get_world_size() % self.config.num_nodes:
            raise ValueError(f"locality: num_nodes={self.config.num_nodes} must divide {dist.get_world_size()} ranks")
        return dist.get_rank() // (dist.get_world_size() // self.config.num_nodes)

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        num_nodes, epsilon = self.config.num_nodes, self.config.epsilon
        mass_N = masked_mean(routing.probs_TE, context.token_mask_T).reshape(num_nodes, -1).sum(dim=-1)
        # Sigmoid and ReLU routers have probabilities that do not sum to 1.
        mass_N = mass_N / mass_N.sum().clamp(min=EPSILON)
        target_N = torch.full_like(mass_N, epsilon / num_nodes)
        target_N[self.node] += 1 - epsilon
        return (mass_N * (mass_N.clamp(min=EPSILON).log() - target_N.log())).sum()
