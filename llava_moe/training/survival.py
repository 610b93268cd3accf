"""What makes a run survive: checkpoints that appear whole, a stop that was asked for, losses that are not finite.

`SurvivingTrainer` lays this around transformers' Trainer: it tells the Trainer where to write, gives what was written
its name when it is whole, and looks at the gradient's norm. It changes no number of the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from transformers import Trainer, TrainerCallback

from llava_moe.data.broken import split
from llava_moe.training import checkpoints, distributed
from llava_moe.training.checkpoints import PARTIAL, Layout
from llava_moe.training.health import Health
from llava_moe.training.stopping import Interrupted, StopRequest, ignore_in_worker

SAMPLE_IDS = "sample_ids"


class Identified:
    """A collator whose batches say which samples they hold, as a list of strings under `sample_ids`.

    Args:
        collator: makes the batch; of samples, or of packs of samples.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]]) -> None:
        self.collator = collator
        self._is_prepared = False

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if not self._is_prepared and get_worker_info() is not None:
            ignore_in_worker()
            self._is_prepared = True
        items = [item for sample in samples for item in (sample if isinstance(sample, list) else [sample])]
        return {**self.collator(samples), SAMPLE_IDS: [str(item["sample_id"]) for item in split(items)[0]]}


class _NothingLeftError(Exception):
    """All steps were done before the run was interrupted."""


class Guard(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Looks after a run at the end of every step."""

    def __init__(self, trainer: SurvivingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.health = Health(args.output_dir, args.device)
        request = self.trainer.stop_request
        if request is not None:
            if any(distributed.gather(request.is_asked)):
                raise Interrupted("stopped before the first step; nothing was lost", agreed=True)
            request.training = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _NothingLeftError

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.health.start(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        request = self.trainer.stop_request
        at_once = control.should_save or control.should_training_stop
        if self.trainer.health.finish(request is not None and request.is_asked, at_once):
            self._stop(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Another step would be lost time if the request came while the checkpoint was written.
        request = self.trainer.stop_request
        if any(distributed.gather(request is not None and request.is_asked)):
            self._stop(args, state, control)
            control.should_save = False

    def _stop(self, args: Any, state: Any, control: Any) -> None:
        self.trainer.was_stopped = state.global_step < state.max_steps
        control.should_training_stop = True
        if self.trainer.was_stopped:
            control.should_save = True
            control.should_log = True  # the mean of the steps since the last line would be lost


class SurvivingTrainer(Trainer):  # type: ignore[misc]  # transformers types it as Any
    """A Trainer whose checkpoints are whole or not there, that stops when asked, and never saves a NaN.

    Attributes:
        stop_request: set by the runner; None never stops.
        was_stopped: whether the training ended before its last step because it was asked to.
        health: of this training.
        num_kept: checkpoints that stay, `train.save_total_limit`; None keeps all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_request: StopRequest | None = None
        self.was_stopped = False
        self.health = Health(self.args.output_dir, self.args.device)
        self._writing_to: Path | None = None
        # transformers would delete older checkpoints before the new one has its name
        self.num_kept, self.args.save_total_limit = self.args.save_total_limit, None
        self.add_callback(Guard(self))

    def run(self, checkpoint: Path | None) -> None:
        """Trains to the end, from a checkpoint if there is one.

        Raises:
            NotFiniteError, SaveError: see there.
            Interrupted: asked to, before the first step.
        """
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except _NothingLeftError:
            # transformers would train one step too many where the last one does not end an epoch
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.health.settle()
        if not self.was_stopped:
            self.health.check_weights(self.model)

    def get_train_dataloader(self) -> DataLoader[Any]:
        plain, self.data_collator = self.data_collator, Identified(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def save_beside_weights(self, folder: Path) -> None:
        """Writes what belongs into a checkpoint besides transformers' files; rank 0 calls it."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16:  # whose loss scale makes it infinite on purpose, now and then
            self.health.record.grad_norm = norm.detach() if isinstance(norm, Tensor) else norm
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(super()._get_output_dir(trial) if self._writing_to is None else self._writing_to)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        out = Path(self.args.output_dir)
        final = out / f"checkpoint-{self.state.global_step}"
        self.health.settle()
        self.health.check_weights(self.model)
        if distributed.first(checkpoints.is_whole(final)):
            return  # of this very step: an epoch has ended with a step that was saved
        folder = out / PARTIAL
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
        distributed.barrier()
        self._writing_to = folder
        with checkpoints.writing(final.name, out, folder):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            if distributed.local_rank() == 0:
                checkpoints.flush(folder)  # each machine what it has written
            distributed.barrier()
            if distributed.rank() == 0:
                self.save_beside_weights(folder / final.name)
                checkpoints.commit(folder / final.name, final, self._layout())
                checkpoints.keep_newest(out, self.num_kept)
        distributed.barrier()

    def _layout(self) -> Layout:
        args, plugin = self.args, self.accelerator.state.deepspeed_plugin
        sharded = plugin is not None and plugin.zero_stage > 0
        return Layout(
            args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps, bool(sharded)
        )
