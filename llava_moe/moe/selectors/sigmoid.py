"""Sigmoid top-k selection: sigma-MoE (Csordas et al., 2310.10837), and LibMoE's renormalised variant.

    s = sigmoid(z)        S = top-k
    sigmoid_topk          g = s_S                 the experts do not compete: no weight depends on another's score
    sigmoid_topk_renorm   g = s_S / sum(s_S)

`probs_TE` is s / sum(s) over all experts, so that balance losses see shares that sum to 1.
Shapes: T tokens, E experts, K slots of a token.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_moe.moe.component import check_k
from llava_moe.moe.selectors.base import Selection, Selector
from llava_moe.moe.types import RoutingContext


class SigmoidTopK(Selector):
    """The k largest sigmoids as they are.

    Raises:
        ValueError: k is not between 1 and E, or the dropout is no share below 1.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Selector.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            expert_dropout: in training, the probability that an expert is left out for the whole batch; k experts
                always remain.
        """

        k: int = 2
        expert_dropout: float = 0.0

    config: SigmoidTopK.Config
    normalised = False

    def __init__(self, num_experts: int, config: SigmoidTopK.Config) -> None:
        super().__init__(num_experts, config)
        check_k("selector", config.k, num_experts)
        if not 0 <= config.expert_dropout < 1:
            raise ValueError(f"selector: expert_dropout={config.expert_dropout} must be at least 0 and below 1")
        self.stochastic = config.expert_dropout > 0

    @property
    def active_experts(self) -> float:
        return self.config.k

    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        # The sigmoid is monotone, and in float32 flat beyond 17: the scores themselves tell experts apart there.
        ranked_TE = scores_TE
        if self.training and self.config.expert_dropout:
            ranked_TE = scores_TE.masked_fill(self._dropped_E(scores_TE.device), -math.inf)
        index_TK = ranked_TE.topk(self.config.k, dim=-1).indices
        probs_TE = F.logsigmoid(scores_TE).softmax(dim=-1)
        return Selection(probs_TE, index_TK, self._weights(scores_TE.gather(-1, index_TK)))

    def _dropped_E(self, device: torch.device) -> Tensor:
        draw_E = torch.rand(self.num_experts, dtype=torch.float32, device=device)
        dropped_E = draw_E < self.config.expert_dropout
        return dropped_E.scatter(0, draw_E.topk(self.config.k).indices, False)

    def _weights(self, kept_TK: Tensor) -> Tensor:
        """Combine weights from the scores of the chosen experts."""
        return kept_TK.sigmoid()


class SigmoidTopKRenorm(SigmoidTopK):
    """The k largest sigmoids divided by their sum."""

    normalised = True

    def _weights(self, kept_TK: Tensor) -> Tensor:
        # softmax(log s) = s / sum(s), also where every s underflows to 0.
        return F.logsigmoid(kept_TK).softmax(dim=-1)
