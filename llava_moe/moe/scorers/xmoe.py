"""XMoE scores (Chi et al., 2204.09179): the cosine to expert embeddings in a space of few dimensions.

    h = x W_p^T        z_e = cos(h, s_e) / temperature

The paper learns the temperature. Two released variants are options: LibMoE has `embedding_norm` 1.5, a fixed
temperature of 0.3 and the selector double_softmax; torchscale has `normalise_input` false, a fixed temperature of 1
and orthogonal embeddings. Both rescale the embeddings in place before each use; here they are rescaled inside the
forward, with the same scores, and the gradient goes through the rescaling.
Shapes: T tokens, D hidden width, E experts, W routing width.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe.scorers.base import Scorer, Scores, copy_first_of_group, float32_linear
from llava_moe.moe.scorers.temperature import Temperature
from llava_moe.moe.types import RoutingContext
from llava_moe.registry import near_misses

INITS = ("normal", "orthogonal")
# As in `cosine`: a token that is projected to zero scores 0 everywhere.
LEAST_NORM = 1e-6


class XMoEScorer(Scorer):
    """A projection to W dimensions, and one embedding for each expert there.

    Raises:
        ValueError: the width is below 1, the temperature or the norm is not above 0, or the init is unknown.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Scorer.Config):
        """Options.

        Attributes:
            width: W; None takes max(2, E // 2).
            temperature: what the scores are divided by.
            learn_temperature: whether it is learned, starting from `temperature`.
            normalise_input: whether the projected token is divided by its length.
            embedding_norm: length that every expert embedding is brought to.
            embedding_init: one of `INITS`: normal with standard deviation 0.02, or orthogonal with gain 0.32.
        """

        width: int | None = None
        temperature: float = 0.3
        learn_temperature: bool = True
        normalise_input: bool = True
        embedding_norm: float = 1.0
        embedding_init: str = "normal"

    config: XMoEScorer.Config

    def __init__(self, hidden: int, num_experts: int, config: XMoEScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        width = max(2, num_experts // 2) if config.width is None else config.width
        if width < 1:
            raise ValueError(f"scorer xmoe: width={width} must be at least 1")
        if not config.embedding_norm > 0:
            raise ValueError(f"scorer xmoe: embedding_norm={config.embedding_norm} must be above 0")
        if config.embedding_init not in INITS:
            hint = near_misses(config.embedding_init, list(INITS))
            raise ValueError(f"scorer xmoe: unknown embedding_init {config.embedding_init!r}; {hint}")
        self.temperature = Temperature("scorer xmoe", config.temperature, config.learn_temperature)
        self.projection = nn.Parameter(torch.empty(width, hidden))
        self.embeddings = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.projection, std=0.02, generator=generator)
        if self.config.embedding_init == "orthogonal":
            # In float32: the decomposition behind it does not exist in half precision.
            drawn_EW = torch.empty(self.embeddings.shape, dtype=torch.float32, device=self.embeddings.device)
            self.embeddings.copy_(nn.init.orthogonal_(drawn_EW, gain=0.32, generator=generator))
        else:
            nn.init.normal_(self.embeddings, std=0.02, generator=generator)
        self.temperature.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        low_TW = float32_linear(x_TD, self.projection)
        if self.config.normalise_input:
            low_TW = F.normalize(low_TW, dim=-1, eps=LEAST_NORM)
        rows_EW = F.normalize(self.embeddings.float(), dim=-1, eps=LEAST_NORM) * self.config.embedding_norm
        logits_TE = self.temperature(float32_linear(low_TW, rows_EW))
        return Scores(logits_TE, logits_TE)

    def tie_rows(self, group: int) -> None:
        copy_first_of_group(self.embeddings, group)
