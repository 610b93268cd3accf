"""Group-limited top-k selection: DeepSeek-V3 (2412.19437) and the device-limited softmax of DeepSeek-V2 (2405.04434).

    s = sigmoid(z) or softmax(z)        s' = s + b
    The experts lie in groups of consecutive ones. A group scores the sum of its two best s' (V3) or its best one (V2);
    the best `topk_groups` stay, and S is the top-k of s' within them.
    g = scale * s_S / sum(s_S), or scale * s_S where not renormalised

The bias b decides who is selected and never enters the weights; the controller loss_free_bias moves it.
`probs_TE` is s, for sigmoids divided by their sum over all experts. Shapes: T tokens, E experts, K slots of a token,
G groups.
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
from llava_moe.registry import near_misses

SCORES = ("sigmoid", "softmax")
GROUP_SCORES = ("top2", "max")


class GroupLimited(Selector):
    """Top-k within the best groups, by biased scores.

    Raises:
        ValueError: the groups do not divide the experts, or the kept groups hold fewer than k of them; or a name or a
            number is not admitted.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Selector.Config):
        """Options.

        Attributes:
            k: experts of a token.
            num_groups: number of groups, a divisor of E; 1 puts no limit.
            topk_groups: groups that a token may use.
            score: one of `SCORES`.
            group_score: one of `GROUP_SCORES`: the sum of a group's two best biased scores, or its best one.
            renormalise: whether the weights are divided by their sum.
            scale: what the weights are multiplied by at the end.
        """

        k: int = 2
        num_groups: int = 1
        topk_groups: int = 1
        score: str = "sigmoid"
        group_score: str = "top2"
        renormalise: bool = True
        scale: float = 1.0

    config: GroupLimited.Config
    float32_buffers = ("selection_bias_E",)
    selection_bias_E: Tensor

    def __init__(self, num_experts: int, config: GroupLimited.Config) -> None:
        super().__init__(num_experts, config)
        self._check()
        self.normalised = config.renormalise and config.scale == 1.0
        self.register_buffer("selection_bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def _check(self) -> None:
        config, experts, where = self.config, self.num_experts, "selector group_limited"
        check_k(where, config.k, experts)
        for key, known in (("score", SCORES), ("group_score", GROUP_SCORES)):
            if (name := getattr(config, key)) not in known:
                raise ValueError(f"{where}: unknown {key} {name!r}; {near_misses(name, list(known))}")
        groups, kept = config.num_groups, config.topk_groups
        if groups < 1 or experts % groups:
            raise ValueError(f"{where}: num_groups={groups} must divide the {experts} experts")
        if not 1 <= kept <= groups:
            raise ValueError(f"{where}: topk_groups={kept} must be between 1 and the {groups} groups")
        reachable = kept * experts // groups
        if config.k > reachable:
            raise ValueError(f"{where}: k={config.k} must be at most the {reachable} experts of {kept} groups")
        if not config.scale > 0:
            raise ValueError(f"{where}: scale={config.scale} must be above 0")

    @property
    def active_experts(self) -> float:
        return self.config.k

    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        if self.config.score == "sigmoid":
            probs_TE, log_TE = scores_TE.sigmoid(), F.logsigmoid(scores_TE)
        else:
            probs_TE, log_TE = scores_TE.softmax(dim=-1), scores_TE
        index_TK = self._choose(probs_TE.detach() + self.selection_bias_E)
        if self.config.renormalise:
            # softmax(log s) = s / sum(s), also where every s underflows to 0.
            weight_TK = log_TE.gather(-1, index_TK).softmax(dim=-1)
        else:
            weight_TK = probs_TE.gather(-1, index_TK)
        shares_TE = log_TE.softmax(dim=-1) if self.config.score == "sigmoid" else probs_TE
        return Selection(shares_TE, index_TK, weight_TK * self.config.scale)

    def _choose(self, biased_TE: Tensor) -> Tensor:
        """int64 (T, K): the experts with the best scores in the groups that stay."""
        groups, kept = self.config.num_groups, self.config.topk_groups
        if kept < groups:
            width = self.num_experts // groups
            biased_TGe = biased_TE.reshape(-1, groups, width)
            best = min(2, width) if self.config.group_score == "top2" else 1
            group_TG = biased_TGe.topk(best, dim=-1).values.sum(dim=-1)
            away_TG = torch.ones_like(group_TG, dtype=torch.bool)
            away_TG = away_TG.scatter(1, group_TG.topk(kept, dim=-1).indices, False)
            biased_TE = biased_TGe.masked_fill(away_TG.unsqueeze(-1), -math.inf).reshape(-1, self.num_experts)
        return biased_TE.topk(self.config.k, dim=-1).indices
