"""Normalised linear scores (Skywork-MoE, 2406.06563): the gate keeps a chosen sharpness whatever the router's weights.

    y = x W^T (+ b)        z = scale * (y - mean_e(y)) / std_e(y)        for each token, over its E scores

The standard deviation is that of the E scores themselves (divided by E). Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from llava_moe.moe.scorers.base import Scores
from llava_moe.moe.scorers.linear import LinearScorer
from llava_moe.moe.types import RoutingContext

# Added to the variance: the scores of a token that are all equal become 0.
LEAST_VARIANCE = 1e-10


class LogitNormScorer(LinearScorer):
    """A linear scorer whose scores of each token have mean 0 and standard deviation `scale`.

    Raises:
        ValueError: the scale is not above 0.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(LinearScorer.Config):
        """Options.

        Attributes:
            bias, init_std: as for the scorer linear.
            scale: lambda; a larger one makes the gate sharper.
        """

        scale: float = 1.0

    config: LogitNormScorer.Config

    def __init__(self, hidden: int, num_experts: int, config: LogitNormScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        if not config.scale > 0:
            raise ValueError(f"scorer logit_norm: scale={config.scale} must be above 0")

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        raw_TE = super().forward(x_TD, context).logits_TE
        centred_TE = raw_TE - raw_TE.mean(dim=-1, keepdim=True)
        variance_T1 = centred_TE.square().mean(dim=-1, keepdim=True)
        logits_TE = self.config.scale * centred_TE * (variance_T1 + LEAST_VARIANCE).rsqrt()
        return Scores(logits_TE, logits_TE)
