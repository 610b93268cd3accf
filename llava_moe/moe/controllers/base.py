"""The contract of a controller: it turns a knob of the routers after each optimiser step, by what was measured.

A knob is a float32 buffer of a router, a scorer, a selector or a capacity, so it is part of the checkpoint and of the
model that is served; or the factor of a balance loss, which the objective asks for. Shapes: E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.component import Component
from llava_moe.moe.controllers.stats import StepStats
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.types import SiteKey


class Controller(Component, ABC):
    """Acts after the optimiser step. Equal stats on every rank must lead to equal knobs: no randomness of its own.

    Args:
        config: its options.
        layers: every MoE layer of the model.

    Attributes:
        drives: the balance losses that `factor` answers for, or without which it is nothing; training refuses a recipe
            that does not name them.

    Raises:
        ValueError: no layer has the knob that it turns.
    """

    kind: ClassVar[str] = "controller"
    drives: tuple[str, ...] = ()

    def __init__(self, config: Any, layers: Mapping[SiteKey, MoELayer]) -> None:
        self.config = config
        self.layers = dict(layers)

    @classmethod
    def build(cls, args: Mapping[str, Any], layers: Mapping[SiteKey, MoELayer]) -> Controller:
        """Makes the controller from a recipe's mapping."""
        return cls(cls.parse(args), layers)

    def start(self, step: int, num_steps: int) -> None:  # an optional hook
        """Called before the forward of every step, and after a resume; `step` counts from 1."""

    @abstractmethod
    def step(self, stats: StepStats) -> dict[str, Tensor | float]:
        """Called after the optimiser step; what it returns is logged (scalars, read only when a line is written)."""

    def factor(self, loss: str, site: SiteKey) -> Tensor | float:
        """What the objective multiplies the named loss of that layer by, besides its coefficient."""
        return 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """float32 state that is not in the model's own buffers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state back.

        Raises:
            ValueError: it is the state of another controller.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")


def knobs(layers: Mapping[SiteKey, MoELayer], name: str) -> dict[SiteKey, list[nn.Module]]:
    """The modules with a buffer of that name inside each layer; layers without one are left out."""
    found: dict[SiteKey, list[nn.Module]] = {}
    for site, layer in layers.items():
        owners = [m for m in layer.modules() if _has_buffer(m, name)]
        if owners:
            found[site] = owners
    return found


def _has_buffer(module: nn.Module, name: str) -> bool:
    try:
        module.get_buffer(name)  # asked and not looked up: a stock router has its bias under another name
    except AttributeError:
        return False
    return True


def take(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The one tensor that a controller keeps, in float32 and on the device of the present one.

    Raises:
        ValueError: the state holds something else.
    """
    if set(state) != {name} or state[name].shape != like.shape:
        found = {key: tuple(value.shape) for key, value in state.items()}
        raise ValueError(f"controller state must hold {name!r} of shape {tuple(like.shape)}, but holds {found}")
    return state[name].to(device=like.device, dtype=torch.float32)
