"""HyperMoE (2402.12656): noisy top-k routing, and a small expert made from the experts that a token did not use.

    y = MoE(x) + HyperExpert(x; unselected experts)        the second term is `experts/hyper.py`, added by the layer

Knowledge of the unselected experts reaches a token although their feed-forward blocks do not run.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from llava_moe.moe.experts.hyper import HyperExpert, count_sets
from llava_moe.moe.routers.noisy_top_k import NoisyTopKRouter
from llava_moe.moe.types import MlpSpec


class HyperMoERouter(NoisyTopKRouter):
    """The router of `noisy_top_k` with a side branch.

    Raises:
        ValueError: an option is out of range, or too many sets of experts can occur.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(NoisyTopKRouter.Config):
        """The options of `noisy_top_k` and the sizes of the side branch.

        Attributes:
            k, init_std, noise_floor: as in `noisy_top_k`.
            embedding: width of an expert's embedding.
            trunk: width of the hypernetwork before its heads, which hold about 2 D x bottleneck x trunk parameters in
                every layer; the paper has 128 in one network for all layers.
            bottleneck: width of the generated expert.
            max_sets: the most sets of selected experts that weights are made for, in every forward.
        """

        embedding: int = 128
        trunk: int = 16
        bottleneck: int = 64
        max_sets: int = 256

    config: HyperMoERouter.Config

    def __init__(self, hidden: int, num_experts: int, config: HyperMoERouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        for name in ("embedding", "trunk", "bottleneck", "max_sets"):
            if getattr(config, name) < 1:
                raise ValueError(f"hyper_moe router: {name}={getattr(config, name)} must be at least 1")
        sets = count_sets(num_experts, config.k)
        if sets > config.max_sets:
            raise ValueError(
                f"hyper_moe router: {sets} sets of at most {config.k} of {num_experts} experts can be selected, more "
                f"than max_sets={config.max_sets}, and each gets weights of its own; lower k or the number of experts"
            )

    def side_branch(self, spec: MlpSpec) -> nn.Module:
        config = self.config
        return HyperExpert(spec, self.num_experts, config.k, config.embedding, config.trunk, config.bottleneck)
