"""HyperRouter scores (Do et al., 2312.07035): a frozen random hypernetwork makes the router's weights from what learns.

    h = ReLU(v A1^T + b1)        [W | b] = reshape(h A2^T + b2, (E, D + 1))        z = x W^T + b

Only the embedding v learns: between a trained router, which collapses, and a frozen one, which is weak.
Shapes: T tokens, D hidden width, E experts, H width of the hypernetwork.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.scorers.base import Scorer, Scores, float32_linear
from llava_moe.moe.types import RoutingContext


class HyperScorer(Scorer):
    """One embedding of width D for the layer, and a hypernetwork of two linear maps.

    Raises:
        ValueError: the width is below 1.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Scorer.Config):
        """Options.

        Attributes:
            width: H; the authors' scripts use 64 and the class they call 256 by default.
            freeze: whether the hypernetwork stays as it was drawn, as in the paper; LibMoE lets it learn.
        """

        width: int = 64
        freeze: bool = True

    config: HyperScorer.Config
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __init__(self, hidden: int, num_experts: int, config: HyperScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        if config.width < 1:
            raise ValueError(f"scorer hyper: width={config.width} must be at least 1")
        self.embedding = nn.Parameter(torch.empty(hidden))
        outputs = num_experts * (hidden + 1)
        shapes = {
            "in_weight": (config.width, hidden),
            "in_bias": (config.width,),
            "out_weight": (outputs, config.width),
            "out_bias": (outputs,),
        }
        for name, shape in shapes.items():
            # Buffers and not frozen parameters: a training stage decides what learns by the names of parameters.
            if config.freeze:
                self.register_buffer(name, torch.empty(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The embedding from N(0, 1); the hypernetwork as torch.nn.Linear starts."""
        nn.init.normal_(self.embedding, generator=generator)
        for weight, bias in ((self.in_weight, self.in_bias), (self.out_weight, self.out_bias)):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        hidden_1H = float32_linear(self.embedding.unsqueeze(0), self.in_weight, self.in_bias).relu()
        rows_EX = float32_linear(hidden_1H, self.out_weight, self.out_bias).reshape(self.num_experts, self.hidden + 1)
        logits_TE = float32_linear(x_TD, rows_EX[:, : self.hidden], rows_EX[:, self.hidden])
        return Scores(logits_TE, logits_TE)
