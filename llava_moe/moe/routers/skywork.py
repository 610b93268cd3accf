"""Skywork-MoE gating (2406.06563): router logits normalised for each token before the softmax.

    y = x W^T (+ b)        z = scale * (y - mean_e(y)) / std_e(y)        then any selector

The paper's other half, a balance coefficient for each layer, is the controller skywork_alpha.
Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.scored import AnySelectorRouter
from llava_moe.moe.scorers.logit_norm import LogitNormScorer


class SkyworkRouter(AnySelectorRouter):
    """A normalised linear scorer; softmax, top-k and renormalisation by default."""

    @dataclasses.dataclass(frozen=True)
    class Config(AnySelectorRouter.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            selector: a name of `SELECTORS` that takes a k; its other options in `selector_args`.
            scale: lambda, the standard deviation of a token's logits; a larger one makes the gate sharper.
            bias: whether the scorer has a bias (initially zero).
            init_std: standard deviation of the initial scorer weights.
        """

        scale: float = 1.0
        bias: bool = False
        init_std: float = 0.02

    config: SkyworkRouter.Config

    def make_scorer(self) -> LogitNormScorer:
        config = self.config
        options = LogitNormScorer.Config(bias=config.bias, init_std=config.init_std, scale=config.scale)
        return LogitNormScorer(self.hidden, self.num_experts, options)
