"""HyperRouter (Do et al., 2312.07035): a frozen random network makes the router's matrix, and its input learns.

    [W | b] = hypernetwork(v)        z = x W^T + b        S = top-k        g = softmax(z_S)

The paper trains with a growing k: `selector_args` {scheduled_k: true} and the controller k_schedule.
Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.scored import AnySelectorRouter
from llava_moe.moe.scorers.hyper import HyperScorer


class HyperRouter(AnySelectorRouter):
    """D trainable numbers for each layer."""

    @dataclasses.dataclass(frozen=True)
    class Config(AnySelectorRouter.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            selector: a name of `SELECTORS` that takes a k; its other options in `selector_args`.
            width: width of the hypernetwork.
            freeze: whether the hypernetwork stays as it was drawn; LibMoE lets it learn.
        """

        selector: str = "topk_softmax"
        width: int = 64
        freeze: bool = True

    config: HyperRouter.Config

    def make_scorer(self) -> HyperScorer:
        options = HyperScorer.Config(width=self.config.width, freeze=self.config.freeze)
        return HyperScorer(self.hidden, self.num_experts, options)
