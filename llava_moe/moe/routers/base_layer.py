"""BASE layers (Lewis et al., 2103.16716): a balanced assignment in training in the place of a balance loss.

    training    a = the assignment with the largest sum of x_t c_a(t), no expert with more than ceil(T / E) tokens
    evaluation  a(t) = argmax_e x_t c_e
    y = alpha E_a(x), with residual + (1 - alpha) x          alpha = sigmoid(x c_a)

T counts the real tokens of this rank's micro-batch; the paper also shuffles tokens between ranks, which this does not.
Padding gets no expert in training. The assignment runs on the host (`balanced.py`): that is the method.
Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.routers.balanced import balanced_assignment
from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers import float32_linear
from llava_moe.moe.types import MlpSpec, Routing, RoutingContext


class BaseLayerRouter(Router):
    """One expert for each token; `centroids` (E, D) learn through alpha."""

    token_choice = False
    causal_safe = False
    normalised = False

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            residual: adds (1 - alpha) x, as the paper does where the layer stands by itself. A block of a transformer
                has its own residual path, so the default is not to.
            init_gain: length of the initial centroids, which are orthogonal.
        """

        residual: bool = False
        init_gain: float = 0.1

    config: BaseLayerRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: BaseLayerRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        if config.init_gain <= 0:
            raise ValueError(f"base_layer router: init_gain={config.init_gain} must be above 0")
        self.centroids = nn.Parameter(torch.empty(num_experts, hidden))
        self.reset_parameters()

    @property
    def active_experts(self) -> float:
        return 1

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        # The decomposition behind it does not exist in half precision.
        drawn = torch.empty(self.centroids.shape, dtype=torch.float32, device=self.centroids.device)
        self.centroids.copy_(nn.init.orthogonal_(drawn, gain=self.config.init_gain, generator=generator))

    def side_branch(self, spec: MlpSpec) -> nn.Module | None:
        if not self.config.residual:
            return None
        if spec.output != spec.hidden:
            raise ValueError(f"base_layer router: residual needs an output as wide as the input; {spec.output} is not")
        return _Residual()

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TE = float32_linear(x_TD, self.centroids)
        probs_TE = logits_TE.sigmoid()
        index_T = logits_TE.argmax(dim=-1)
        if self.training:
            index_T = self._balanced(logits_TE, context.token_mask_T)
        index_T1 = index_T.unsqueeze(-1)
        weight_T1 = nn.functional.pad(probs_TE, (0, 1)).gather(-1, index_T1)
        return Routing(logits_TE, probs_TE, index_T1, weight_T1)

    def _balanced(self, logits_TE: Tensor, mask_T: Tensor) -> Tensor:
        """Experts of the real tokens; the index E for padding."""
        token_S = mask_T.nonzero().squeeze(-1)
        empty_T = torch.full(mask_T.shape, self.num_experts, device=mask_T.device)
        return empty_T.index_copy(0, token_S, balanced_assignment(logits_TE[token_S]))


class _Residual(nn.Module):
    """(1 - alpha) x, where alpha is a token's combine weight."""

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return (1 - routing.weight_TK.sum(-1, keepdim=True)).to(x_TD.dtype) * x_TD
