"""The sparsity control of ReMoE (2412.14711): moves the coefficient of the L1 loss until k gates are open.

    s = mean over layers of 1 - open gates / (T E)
    lambda <- lambda * rate  if s < 1 - k / E,  else  lambda / rate          after each optimiser step

Open gates are counted over all micro-batches and ranks of the step. At exactly the target lambda falls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llava_moe.moe.controllers.base import Controller, take
from llava_moe.moe.controllers.stats import StepStats
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.selectors import SELECTORS
from llava_moe.moe.types import SiteKey

LOSS = "relu_l1"


class ReMoELambda(Controller):
    """The factor of the loss `relu_l1` at layers with ReLU gates; at other layers that loss gets the factor 0."""

    drives = (LOSS,)

    @dataclasses.dataclass(frozen=True)
    class Config(Controller.Config):
        """Options.

        Attributes:
            k: open gates of a token to aim at, the mean over tokens and layers.
            initial: first lambda, above 0.
            rate: what lambda is multiplied or divided by in each step, above 1.
        """

        k: int = 1
        initial: float = 1e-8
        rate: float = 1.2

    config: ReMoELambda.Config

    def __init__(self, config: ReMoELambda.Config, layers: Mapping[SiteKey, MoELayer]) -> None:
        super().__init__(config, layers)
        if config.initial <= 0 or config.rate <= 1:
            raise ValueError(
                f"controller remoe_lambda: initial={config.initial} must be above 0 and rate={config.rate} above 1"
            )
        relu = SELECTORS.get("relu")
        self.sites = [site for site, layer in layers.items() if any(isinstance(m, relu) for m in layer.modules())]
        if not self.sites:
            raise ValueError("controller remoe_lambda: no layer has ReLU gates; use the router remoe")
        fewest = min(layers[site].router.num_experts for site in self.sites)
        if not 1 <= config.k <= fewest:
            raise ValueError(f"controller remoe_lambda: k={config.k} must be from 1 to the {fewest} experts of a layer")
        self.coefficient = torch.tensor(config.initial, dtype=torch.float32)

    @torch.no_grad()
    def step(self, stats: StepStats) -> dict[str, Tensor | float]:
        sites = [site for site in self.sites if site in stats.layers]
        if not sites:
            return {"lambda": self.coefficient}
        open_L, target_L = [], []
        for site in sites:
            seen, num_experts = stats.layers[site], self.layers[site].router.num_experts
            open_L.append(seen.load_E.sum() / (seen.num_tokens.clamp(min=1) * num_experts))
            target_L.append(torch.full_like(open_L[-1], self.config.k) / num_experts)
        # Shares of open gates are compared, not of closed ones: 1 - x would round away what "exactly" means.
        open_, target = torch.stack(open_L).mean(), torch.stack(target_L).mean()
        now = self.coefficient.to(open_.device)
        self.coefficient = torch.where(open_ > target, now * self.config.rate, now / self.config.rate)
        return {"lambda": self.coefficient, "sparsity": 1 - open_}

    def factor(self, loss: str, site: SiteKey) -> Tensor | float:
        if loss != LOSS:
            return 1.0
        return self.coefficient if site in self.sites else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"lambda": self.coefficient}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.coefficient = take(state, "lambda", self.coefficient)
