"""transformers' Trainer with three overrides: the loss, the optimiser's groups, the sampler. Nothing else.

A fourth, around the loader, only reads the clock.

How checkpoints are written and a run is stopped is in `survival.py`, which changes no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llava_moe.training.alarms import Alarms
from llava_moe.training.controllers import ControllerCallback, Controllers, measure
from llava_moe.training.metrics import SiteLosses
from llava_moe.training.objective import Balance, combine, mean_over_layers, site_losses
from llava_moe.training.sampler import EpochCallback, EpochSampler
from llava_moe.training.skipping import Skips
from llava_moe.training.survival import SAMPLE_IDS, SurvivingTrainer
from llava_moe.training.telemetry import RoutingMeter
from llava_moe.training.throughput import StepCounts, Stopwatch


class LlavaMoeTrainer(SurvivingTrainer):
    """Trains any stage.

    Args:
        parameter_groups: from `stage.apply_stage`.
        balance: the balance losses with their coefficients.
        controllers: what acts on routers and losses after every step.
        meter: what is measured of the routing.
        alarms: what looks at the rows of the log.
    """

    # The objective has divided by the label tokens of the whole step; the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        parameter_groups: list[dict[str, Any]],
        balance: Balance,
        controllers: Controllers,
        meter: RoutingMeter,
        alarms: Alarms,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.parameter_groups = parameter_groups
        self.balance = balance
        self.controllers = controllers
        self.meter = meter
        self.alarms = alarms
        self.site_losses = SiteLosses()
        self.counts = StepCounts(int(self.model.config.image_token_id))
        self.stopwatch = Stopwatch()
        self.skips = Skips()
        self.add_callback(self.skips)
        self._epoch = EpochCallback()
        self.add_callback(self._epoch)
        self.add_callback(ControllerCallback(controllers, balance))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sample_ids = inputs.pop(SAMPLE_IDS, None)
        self.skips.take(inputs)
        output = model(**inputs, loss_only=True, use_cache=False, num_items_in_batch=num_items_in_batch)
        scope = self.model.model.scope
        routings = output.routings or {}
        losses = site_losses(routings, scope, self.balance.losses, self.controllers.factor)
        terms = mean_over_layers(losses)
        objective = combine(
            output.loss,
            terms,
            self.balance.coefficients,
            accumulation_steps=self.current_gradient_accumulation_steps,
            world_size=self.accelerator.num_processes,
        )
        if model.training:
            self.health.observe(sample_ids, objective)
            if self.controllers.by_name:
                self.controllers.observe(measure(routings, scope))
            self.meter.update(objective.parts, routings, scope, terms)
            self.site_losses.update(losses)
            self.counts.update(inputs)
        return (objective.total, output) if return_outputs else objective.total

    def save_beside_weights(self, folder: Path) -> None:
        self.controllers.save(folder)
        self.skips.save(folder)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(self.stopwatch.timed(epoch_iterator), num_batches, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            self.optimizer = optimizer_class(self.parameter_groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(dataset)
        # The stock grouping would decode every image to learn the lengths; our data sets know them.
        grouped = self.args.train_sampling_strategy == "group_by_length"
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        has_image = getattr(dataset, "has_image", None)
        self._epoch.sampler = EpochSampler(dataset.lengths, seed, step if grouped else 0, has_image)
        return self._epoch.sampler
