"""Loss-free balancing (2408.15664; DeepSeek-V3 2412.19437): a bias on the selection scores instead of a loss.

    b_e <- b_e + u * sign(mean load - load_e)        after each optimiser step

The bias decides who is selected and never enters the combine weights, so it has no gradient. DeepSeek-V3 stops moving
it for the last part of training. Shapes: E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llava_moe.moe.controllers.base import Controller, knobs
from llava_moe.moe.controllers.stats import StepStats
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey

KNOB = "selection_bias_E"


class LossFreeBias(Controller):
    """Moves every layer's `selection_bias_E` by `rate` towards balance."""

    @dataclasses.dataclass(frozen=True)
    class Config(Controller.Config):
        """Options.

        Attributes:
            rate: u, the size of a move, above 0; 1e-4 is slow, 1e-2 oscillates.
            stop_fraction: the last share of the run in which the bias stays as it is, from 0 and below 1.
        """

        rate: float = 1e-3
        stop_fraction: float = 0.0

    config: LossFreeBias.Config

    def __init__(self, config: LossFreeBias.Config, layers: Mapping[SiteKey, MoELayer]) -> None:
        super().__init__(config, layers)
        if config.rate <= 0:
            raise ValueError(f"controller loss_free_bias: rate={config.rate} must be above 0")
        if not 0 <= config.stop_fraction < 1:
            stop = config.stop_fraction
            raise ValueError(f"controller loss_free_bias: stop_fraction={stop} must be at least 0 and below 1")
        self.knobs = knobs(layers, KNOB)
        if not self.knobs:
            raise ValueError("controller loss_free_bias: no router has a selection bias; use the router deepseek_v3")
        for site, owners in self.knobs.items():
            num_experts = layers[site].router.num_experts
            if any(owner.get_buffer(KNOB).numel() != num_experts for owner in owners):
                raise ValueError(
                    f"controller loss_free_bias: at {site} a bias is not for all {num_experts} experts of the layer, "
                    "and the load is counted over all of them"
                )

    @torch.no_grad()
    def step(self, stats: StepStats) -> dict[str, Tensor | float]:
        if stats.step <= (1 - self.config.stop_fraction) * stats.num_steps:
            for site in self.knobs.keys() & stats.layers.keys():
                load_E = stats.layers[site].load_E
                move_E = self.config.rate * torch.sign(load_E.mean() - load_E)
                for owner in self.knobs[site]:
                    owner.get_buffer(KNOB).add_(move_E)
        biases = [owner.get_buffer(KNOB) for owners in self.knobs.values() for owner in owners]
        return {"largest_bias": torch.stack([bias_E.abs().max() for bias_E in biases]).max()}
