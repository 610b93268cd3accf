"""transformers' Trainer with three overrides: the loss, the optimiser's groups, the sampler. Nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer

from llava_moe.data.packing import useful_share
from llava_moe.training.controllers import ControllerCallback, Controllers, measure
from llava_moe.training.objective import Balance, balance_terms, combine
from llava_moe.training.sampler import EpochCallback, EpochSampler
from llava_moe.training.telemetry import RoutingMeter


class LlavaMoeTrainer(Trainer):  # type: ignore[misc]  # transformers types it as Any
    """Trains any stage.

    Args:
        parameter_groups: from `stage.apply_stage`.
        balance: the balance losses with their coefficients.
        controllers: what acts on routers and losses after every step.
    """

    # The objective has divided by the label tokens of the whole step; the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        parameter_groups: list[dict[str, Any]],
        balance: Balance,
        controllers: Controllers,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.parameter_groups = parameter_groups
        self.balance = balance
        self.controllers = controllers
        self.meter = RoutingMeter()
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
        output = model(**inputs, loss_only=True, use_cache=False, num_items_in_batch=num_items_in_batch)
        scope = self.model.model.scope
        routings = output.routings or {}
        objective = combine(
            output.loss,
            balance_terms(routings, scope, self.balance.losses, self.controllers.factor),
            self.balance.coefficients,
            accumulation_steps=self.current_gradient_accumulation_steps,
            world_size=self.accelerator.num_processes,
        )
        stats = measure(routings, scope)
        if model.training:
            self.controllers.observe(stats)
        parts = {**objective.parts, "useful_tokens": useful_share(inputs)}
        self.meter.update(parts, routings, scope, stats)
        return (objective.total, output) if return_outputs else objective.total

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
