"""Cosine routing: how well a token's direction agrees with each expert's (studied in 2405.14131).

    z_e = x . w_e / (|x| |w_e|) / temperature        then any selector, by default softmax, top-k, renormalised

Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.scored import AnySelectorRouter
from llava_moe.moe.scorers.cosine import CosineScorer


class CosineRouter(AnySelectorRouter):
    """A cosine scorer; LibMoE's first version has the selector double_softmax with a bias."""

    @dataclasses.dataclass(frozen=True)
    class Config(AnySelectorRouter.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            selector: a name of `SELECTORS` that takes a k; its other options in `selector_args`.
            temperature: what the cosines are divided by; at 1 the softmax over them is nearly flat.
            learn_temperature: whether it is learned, starting from `temperature`.
            init_std: standard deviation of the initial rows.
        """

        temperature: float = 1.0
        learn_temperature: bool = False
        init_std: float = 0.02

    config: CosineRouter.Config

    def make_scorer(self) -> CosineScorer:
        config = self.config
        options = CosineScorer.Config(config.temperature, config.learn_temperature, config.init_std)
        return CosineScorer(self.hidden, self.num_experts, options)
