"""The way of controllers through a run: measured in every micro-batch, acting after every step, saved and resumed.

Knobs of routers are buffers of the model and travel with it. What a controller keeps besides (a coefficient) lies in
`controllers.safetensors`, in every checkpoint and beside the final model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llava_moe.config import BalanceSection, RecipeError
from llava_moe.moe import CONTROLLERS, Controller, LayerStats, MoELayer, Routing, RoutingScope, SiteKey
from llava_moe.moe.controllers import StepSums
from llava_moe.registry import RegistryError
from llava_moe.training.objective import Balance

FILE = "controllers.safetensors"


def check_options(section: BalanceSection) -> None:
    """What can be said of the controllers without a model.

    Raises:
        RecipeError: a controller is unknown, or does not have an option.
    """
    for name, options in section.controller_options().items():
        try:
            CONTROLLERS.get(name).parse(options)
        except RegistryError as error:
            raise RecipeError(f"balance.controllers: {error}") from error
        except ValueError as error:
            raise RecipeError(f"balance.controllers.{name}: {error}") from error


def moe_layers(model: nn.Module) -> dict[SiteKey, MoELayer]:
    """Every layer that routes, by its site; those of a decoder with experts of its own come as `NativeLayer`."""
    found: dict[SiteKey, Any] = {module.site: module for module in model.modules() if isinstance(module, MoELayer)}
    for module in model.modules():
        found |= getattr(module, "native_layers", {})
    return found


def measure(routings: Mapping[SiteKey, Routing], scope: RoutingScope) -> dict[SiteKey, LayerStats]:
    """What each layer did in one forward."""
    return {
        site: LayerStats.measure(routing, scope.context_of(site).token_mask_T) for site, routing in routings.items()
    }


class Controllers:
    """All controllers of a run as one."""

    def __init__(self, controllers: Mapping[str, Controller]) -> None:
        self.by_name = dict(controllers)
        self._sums = StepSums()
        self._told: dict[str, dict[str, Tensor | float]] = {}

    @staticmethod
    def build(section: BalanceSection, layers: Mapping[SiteKey, MoELayer], losses: Collection[str]) -> Controllers:
        """Makes them for these layers.

        Raises:
            RecipeError: a controller is unknown, refuses an option, finds no knob, or drives a loss that is not named.
        """
        check_options(section)
        made = {}
        for name, options in section.controller_options().items():
            try:
                made[name] = CONTROLLERS.get(name).build(options, layers)
            except ValueError as error:
                raise RecipeError(f"balance.controllers.{name}: {error}") from error
            absent = [loss for loss in made[name].drives if loss not in losses]
            if absent:
                raise RecipeError(
                    f"balance.controllers.{name} drives the loss {absent[0]}; name it in balance.losses (with "
                    "the coefficient 1 where the controller sets it)"
                )
        return Controllers(made)

    def start(self, step: int, num_steps: int) -> None:
        """Before the first forward of a step, which counts from 1."""
        for controller in self.by_name.values():
            controller.start(step, num_steps)

    def observe(self, stats: Mapping[SiteKey, LayerStats]) -> None:
        """Takes what the layers did in one micro-batch of training."""
        if self.by_name:
            self._sums.add(stats)

    def finish(self, step: int, num_steps: int) -> None:
        """After the optimiser step; every rank must call it."""
        if self.by_name:
            stats = self._sums.finish(step, num_steps)
            self._told = {name: controller.step(stats) for name, controller in self.by_name.items()}

    def factor(self, loss: str, site: SiteKey) -> Tensor | float:
        """The product of the factors of all controllers that drive this loss."""
        product: Tensor | float = 1.0
        for controller in self.by_name.values():
            if loss in controller.drives:
                product = controller.factor(loss, site) * product
        return product

    def logged(self) -> dict[str, dict[str, float]]:
        """What each controller said of the last step; reading it waits for the device."""
        return {name: {key: float(v) for key, v in told.items()} for name, told in self._told.items() if told}

    def state_dict(self) -> dict[str, Tensor]:
        """float32 tensors by "controller.key"."""
        return {f"{n}.{key}": v for n, controller in self.by_name.items() for key, v in controller.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state back.

        Raises:
            ValueError: it is not the state of these controllers.
        """
        stray = [key for key in state if key.partition(".")[0] not in self.by_name]
        if stray:
            raise ValueError(f"controller state {stray[0]} belongs to no controller of this run")
        for name, controller in self.by_name.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            controller.load_state_dict(own)

    def save(self, folder: Path) -> None:
        """Writes `controllers.safetensors` into the folder, whole or not at all; nothing without a controller."""
        if not self.by_name:
            return
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.partial"
        save_file({key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}, partial)
        partial.rename(folder / FILE)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is missing, or holds the state of other controllers.
        """
        if not self.by_name:
            return
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: the state of {', '.join(self.by_name)} cannot be restored")
        self.load_state_dict(load_file(path))


class ControllerCallback(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Calls losses and controllers at the right moments of the Trainer's loop."""

    def __init__(self, controllers: Controllers, balance: Balance) -> None:
        self.controllers = controllers
        self.balance = balance

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balance.start_step()
        self.controllers.start(state.global_step + 1, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controllers.finish(state.global_step, state.max_steps)
