"""The adaptive balance coefficients of Skywork-MoE (2406.06563): more pressure where tokens are dropped.

    alpha_l <- decay * alpha_l + (1 - decay) * min(ratio * d_l, maximum)      d_l = share of the slots that were dropped

Each layer has its own. alpha is the whole coefficient of the loss: give it the coefficient 1 in the recipe.
Shapes: L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llava_moe.moe.capacity import DROPPED
from llava_moe.moe.controllers.base import Controller, take
from llava_moe.moe.controllers.stats import StepStats
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey


class SkyworkAlpha(Controller):
    """The factor of one balance loss at each layer; a layer without a capacity drops nothing and falls to 0."""

    @dataclasses.dataclass(frozen=True)
    class Config(Controller.Config):
        """Options.

        Attributes:
            ratio: xi, coefficient for each share of dropped slots.
            maximum: largest alpha.
            decay: beta, of the moving average, from 0 and below 1.
            initial: alpha before the first step; the paper prints none.
            loss: the balance loss that it drives.
        """

        ratio: float = 0.2
        maximum: float = 0.01
        decay: float = 0.99
        initial: float = 0.0
        loss: str = "switch"

    config: SkyworkAlpha.Config

    def __init__(self, config: SkyworkAlpha.Config, layers: Mapping[SiteKey, MoELayer]) -> None:
        super().__init__(config, layers)
        if config.ratio <= 0 or config.maximum <= 0:
            raise ValueError(
                f"controller skywork_alpha: ratio={config.ratio} and maximum={config.maximum} must be above 0"
            )
        if not 0 <= config.decay < 1:
            raise ValueError(f"controller skywork_alpha: decay={config.decay} must be at least 0 and below 1")
        if not 0 <= config.initial <= config.maximum:
            raise ValueError(f"controller skywork_alpha: initial={config.initial} must be from 0 to maximum")
        if not any(layer.capacity is not None or DROPPED in layer.router.extras for layer in layers.values()):
            raise ValueError("controller skywork_alpha: no layer drops tokens; give the layers a `capacity`")
        self.drives = (config.loss,)
        self.sites = sorted(layers)
        self.alpha_L = torch.full((len(self.sites),), config.initial, dtype=torch.float32)

    @torch.no_grad()
    def step(self, stats: StepStats) -> dict[str, Tensor | float]:
        if stats.layers:
            device = next(iter(stats.layers.values())).load_E.device
            none = torch.zeros((), device=device)
            rates = [stats.layers[site].drop_rate if site in stats.layers else none for site in self.sites]
            wanted_L = (self.config.ratio * torch.stack(rates)).clamp(max=self.config.maximum)
            decay = self.config.decay
            self.alpha_L = decay * self.alpha_L.to(device) + (1 - decay) * wanted_L
        return {"mean": self.alpha_L.mean(), "largest": self.alpha_L.max()}

    def factor(self, loss: str, site: SiteKey) -> Tensor | float:
        return self.alpha_L[self.sites.index(site)] if loss == self.config.loss else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"alpha_L": self.alpha_L}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.alpha_L = take(state, "alpha_L", self.alpha_L)
