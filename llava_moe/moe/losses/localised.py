"""Localised balancing (LoRAMoE, 2312.09979): experts of two types, each meant for one type of token.

    L = CV^2(I * Q)      Q_me = mean probability of expert e over the tokens of type m
                         I_me = 1 - delta where the expert is of type m, 1 + delta where it is not

In the paper a sample has a task type; here a token has a modality (`context.modality_T`: 0 text, 1 image), and Q takes
the mean over its tokens and not their sum, so that 576 image tokens do not outweigh 50 of text. A modality without a
token in the micro-batch does not count. Within each type the experts are balanced.

The paper and its code print 1 + delta for the matching type. Products are equal, and the loss 0, where the matching
experts have (1 - delta) / 2 of the mass: less than the others. That is the same loss with the names of the two types
exchanged; here the names are those of what minimising does, and a matching group ends with (1 + delta) / 2.
With delta = 0 it is the plain CV^2. Shapes: T tokens, E experts, M = 2 modalities.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean, squared_variation
from llava_moe.moe.types import Routing, RoutingContext

if TYPE_CHECKING:
    from llava_moe.moe.routers import Router


class Localised(BalanceLoss):
    """Squared variation of the probability mass by modality, weighted by whether expert and modality match."""

    @dataclasses.dataclass(frozen=True)
    class Config(BalanceLoss.Config):
        """Options.

        Attributes:
            delta: how much more of its own type an expert shall take, from 0 and below 1.
            image_experts: the experts meant for image tokens, the others being for text; null takes the second half,
                the larger one where E is odd.
        """

        delta: float = 0.1
        image_experts: tuple[int, ...] | None = None

    config: Localised.Config

    def __init__(self, config: Localised.Config | None = None) -> None:
        super().__init__(config)
        if not 0 <= self.config.delta < 1:
            raise ValueError(f"localised: delta={self.config.delta} must be at least 0 and below 1")
        self._factors: dict[tuple[int, torch.device], Tensor] = {}

    def check(self, router: Router, part: str = "decoder") -> None:
        super().check(router, part)
        if part != "decoder":
            raise ValueError(f"localised compares tokens of text and image, and the {part} has no text")
        self._image_experts(router.num_experts)

    def _image_experts(self, num_experts: int) -> tuple[int, ...]:
        chosen = self.config.image_experts
        if chosen is None:
            return tuple(range(num_experts // 2, num_experts))
        if not all(isinstance(e, int) and 0 <= e < num_experts for e in chosen):
            raise ValueError(f"localised: image_experts={list(chosen)} must be numbers from 0 to {num_experts - 1}")
        return chosen

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        if context.modality_T is None:
            raise ValueError("localised needs to know which tokens are image: call the model with input_ids")
        probs_TE = routing.probs_TE
        of_type_MT = [context.token_mask_T & (context.modality_T == m) for m in (0, 1)]
        mass_ME = torch.stack([masked_mean(probs_TE, mask_T) for mask_T in of_type_MT])
        factor_ME = self._factor_ME(routing.num_experts, probs_TE.device)
        present_M1 = torch.stack([mask_T.any() for mask_T in of_type_MT]).unsqueeze(-1)
        return squared_variation(factor_ME * mass_ME, present_M1.expand_as(mass_ME))

    def _factor_ME(self, num_experts: int, device: torch.device) -> Tensor:
        """I of the formula, text first; kept, because a copy to the device makes the host wait."""
        key = (num_experts, device)
        if key not in self._factors:
            image, delta = self._image_experts(num_experts), self.config.delta
            to_image = [1 + delta if e not in image else 1 - delta for e in range(num_experts)]
            to_text = [1 + delta if e in image else 1 - delta for e in range(num_experts)]
            self._factors[key] = torch.tensor([to_text, to_image], dtype=torch.float32, device=device)
        return self._factors[key]
