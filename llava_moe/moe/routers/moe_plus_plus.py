"""MoE++ (2410.07348): a router over feed-forward and zero-computation experts, with its "gating residuals".

    z^(j) = W^(j) x^(j) + W_g^(j) z^(j-1)        the first MoE layer has no z^(j-1)
    p = softmax(z)        S = top-k        g = softmax of z over the chosen experts without the zero experts

A chosen zero expert has weight 0 and the others of the token share the rest, so with k = 2 its mate gets weight 1. What
is handed on are the logits with their own residual in them. Shapes: T tokens, D hidden width, E experts of all kinds.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_moe.moe.component import check_k
from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers import SCORERS, float32_linear
from llava_moe.moe.types import Routing, RoutingContext
from llava_moe.registry import near_misses

if TYPE_CHECKING:
    from llava_moe.moe.experts import Experts

KINDS = ("linear", "two_layer")


class MoEPlusPlusRouter(Router):
    """Needs experts of the kind `special`; until a layer attaches them, all experts count as feed-forward ones.

    The extra `zero_compute_E` is true for the experts without a feed-forward block, for the loss `heterogeneous`.
    """

    needs_previous = True
    extras = ("zero_compute_E",)

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E, computation-free ones included.
            scorer: "linear" as in the paper, or "two_layer", the tanh network of the released code.
            scorer_args: options of that scorer.
            init_std: standard deviation of the initial W_g.
        """

        k: int = 2
        scorer: str = "linear"
        scorer_args: dict[str, Any] = dataclasses.field(default_factory=dict)
        init_std: float = 0.02

    config: MoEPlusPlusRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: MoEPlusPlusRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        check_k("moe_plus_plus router", config.k, num_experts)
        if config.scorer not in KINDS:
            hint = near_misses(config.scorer, list(KINDS))
            raise ValueError(f"moe_plus_plus router: unknown scorer {config.scorer!r}; {hint}")
        self.scorer = SCORERS.get(config.scorer).build(hidden, num_experts, config.scorer_args)
        self.residual = nn.Parameter(torch.empty(num_experts, num_experts))
        # Saved with the model: what a buffer held would be lost on the way through the meta device.
        self.register_buffer("zero_E", torch.zeros(num_experts, dtype=torch.bool))
        self.register_buffer("zero_compute_E", torch.zeros(num_experts, dtype=torch.bool))
        self.zero_E: Tensor
        self.zero_compute_E: Tensor
        nn.init.normal_(self.residual, std=config.init_std)

    @property
    def active_experts(self) -> float:
        return self.config.k

    def attach(self, experts: Experts) -> None:
        if all(kind == "ffn" for kind in experts.kinds):
            raise ValueError("moe_plus_plus router: needs zero, copy or constant experts; use the experts 'special'")
        self.zero_E.copy_(torch.tensor([kind == "zero" for kind in experts.kinds]))
        self.zero_compute_E.copy_(torch.tensor([kind != "ffn" for kind in experts.kinds]))
        # Where all k slots can be zero experts, a token's weights may all be 0.
        self.normalised = experts.kinds.count("zero") < self.config.k

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.scorer.reset_parameters(generator)
        nn.init.normal_(self.residual, std=self.config.init_std, generator=generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TE = self.scorer(x_TD, context).logits_TE
        # Zeros in the first layer: W_g then has a gradient of 0 and not none, which would stall ZeRO and DDP.
        before_TE = torch.zeros_like(logits_TE) if context.previous is None else context.previous.logits_TE
        if before_TE.shape != logits_TE.shape:
            raise ValueError(
                f"moe_plus_plus router: the MoE layer before layer {context.layer} has logits of shape "
                f"{tuple(before_TE.shape)}, this one {tuple(logits_TE.shape)}; all need the same number of experts"
            )
        logits_TE = logits_TE + float32_linear(before_TE, self.residual)
        probs_TE = logits_TE.softmax(dim=-1)
        index_TK = logits_TE.topk(self.config.k, dim=-1).indices
        zero_TK = self.zero_E[index_TK]
        # A row of zero experts alone would be a softmax of nothing; its weights are all set to 0 below.
        hidden_TK = zero_TK & ~zero_TK.all(dim=-1, keepdim=True)
        chosen_TK = logits_TE.gather(-1, index_TK).masked_fill(hidden_TK, -torch.inf)
        weight_TK = chosen_TK.softmax(dim=-1).masked_fill(zero_TK, 0.0)
        return Routing(logits_TE, probs_TE, index_TK, weight_TK, {"zero_compute_E": self.zero_compute_E})
