"""XMoE routing (Chi et al., 2204.09179): cosines in a space of few dimensions, against representation collapse.

    h = x W_p^T        z_e = cos(h, s_e) / temperature        then any selector

LibMoE's variant (2411.00918): `embedding_norm` 1.5, `learn_temperature` false, `selector` double_softmax.
Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.scored import AnySelectorRouter
from llava_moe.moe.scorers.xmoe import XMoEScorer


class XMoERouter(AnySelectorRouter):
    """A projection, one embedding for each expert, and the cosine between them."""

    @dataclasses.dataclass(frozen=True)
    class Config(AnySelectorRouter.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            selector: a name of `SELECTORS` that takes a k; its other options in `selector_args`.
            width: dimensions of the routing space; None takes max(2, E // 2).
            temperature: what the scores are divided by.
            learn_temperature: whether it is learned, starting from `temperature`.
            normalise_input: whether the projected token is divided by its length.
            embedding_norm: length that every expert embedding is brought to.
            embedding_init: "normal" or "orthogonal".
        """

        width: int | None = None
        temperature: float = 0.3
        learn_temperature: bool = True
        normalise_input: bool = True
        embedding_norm: float = 1.0
        embedding_init: str = "normal"

    config: XMoERouter.Config

    def make_scorer(self) -> XMoEScorer:
        config = self.config
        options = XMoEScorer.Config(
            width=config.width,
            temperature=config.temperature,
            learn_temperature=config.learn_temperature,
            normalise_input=config.normalise_input,
            embedding_norm=config.embedding_norm,
            embedding_init=config.embedding_init,
        )
        return XMoEScorer(self.hidden, self.num_experts, options)
