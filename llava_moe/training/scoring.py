"""Scores on small local tasks while a run trains: every N steps the live model answers, as in `llava-moe eval`.

The questions are answered after the step (and after what controllers do at its end) and before it is logged and saved.
So the scores of step N are those of the weights that a checkpoint of step N holds, they stand in the row of step N in
the metrics file, and a resumed run neither repeats a step's scoring nor misses one: what was scored behind the
checkpoint belongs to steps that are run again.

Nothing of the run may change by it: random states, training modes and accelerate's counters are put back, and the
losses are bit-equal to those of a run without the section. Each rank answers its share of the questions with its own
copy of the model; where a model is split among ranks (ZeRO-3, expert parallelism) the section is refused.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llava_moe.config import RecipeError, RunConfig, ScoringSection
from llava_moe.planning.memory import zero_setup

if TYPE_CHECKING:
    from llava_moe.evaluation.live import LiveScorer

FOLDER = "scores"


def check_scoring(config: RunConfig) -> None:
    """What can be said of the section without its data; nothing happens without one.

    Raises:
        RecipeError: a value is refused, a task is not local, lmms-eval is not there, or each rank would hold only a
            part of the model.
    """
    section = config.scoring
    if section is None:
        return
    for key in ("every", "batch_size", *(["limit"] if section.limit is not None else [])):
        if getattr(section, key) < 1:
            raise RecipeError(f"scoring.{key}={getattr(section, key)} must be a whole number of at least 1")
    if not section.tasks:
        raise RecipeError("scoring.tasks is empty: name at least one local task, e.g. [local_gqa]")
    if importlib.util.find_spec("lmms_eval") is None:
        raise RecipeError("scoring needs lmms-eval: install the extra `eval` with scripts/install.sh, or leave it out")
    from llava_moe.evaluation import EvaluationError
    from llava_moe.evaluation.live import check_local

    try:
        check_local(section.tasks)
    except EvaluationError as error:
        raise RecipeError(f"scoring.tasks: {error}") from error
    if zero_setup(config.deepspeed, False, "float32")["zero_stage"] == 3:
        raise RecipeError(
            f"scoring: ZeRO-3 ({config.deepspeed}) leaves each rank with a part of the weights, and ranks that answer "
            "questions of their own would wait for each other for ever; use ZeRO-2, or leave the section out and score "
            "checkpoints with `llava-moe eval`"
        )
    if config.expert_parallel is not None:
        raise RecipeError(
            f"scoring: expert_parallel={config.expert_parallel} leaves each rank with a part of the experts, and ranks "
            "that answer questions of their own would wait for each other for ever; leave one of the two out"
        )


def live_scorer(config: RunConfig) -> LiveScorer | None:
    """The tasks of a run, read and checked; None without the section.

    Raises:
        RecipeError: see `check_scoring`, or the data are missing or wrong.
    """
    check_scoring(config)
    section = config.scoring
    if section is None:
        return None
    from llava_moe.evaluation import EvaluationError
    from llava_moe.evaluation.live import LiveScorer

    try:
        return LiveScorer(Path(section.data), section.tasks, section.batch_size, section.limit)
    except EvaluationError as error:
        raise RecipeError(f"scoring: {error}") from error


class ScoringCallback(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Scores when a step's number is a multiple of `every`.

    Args:
        scorer: the tasks.
        section: how often.
        processor: of the run.
        output_dir: of the run; answers go to `<output_dir>/scores/step-N`.
    """

    def __init__(self, scorer: LiveScorer, section: ScoringSection, processor: Any, output_dir: str | Path) -> None:
        self.scorer = scorer
        self.every = section.every
        self.processor = processor
        self.folder = Path(output_dir) / FOLDER
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_logging(args, state.logging_steps, self.every)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        start = time.perf_counter()
        with untouched(self.trainer.model):
            found = self.scorer.score(self.trainer.model, self.processor, self.folder / f"step-{state.global_step}")
        shared = [{name: task["score"] for name, task in found.get("tasks", {}).items()}]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0)  # only rank 0 has seen all answers
        scores = shared[0]
        self.trainer.metrics.tell(scores=scores, scoring_seconds=round(time.perf_counter() - start, 2))
        self.trainer.stopwatch.paused()


def check_logging(args: TrainingArguments, logging_steps: float, every: int) -> None:
    """Scores stand in the row of their step, so that step must be a logged one.

    Raises:
        RecipeError: it is not.
    """
    strategy = IntervalStrategy(args.logging_strategy)
    if strategy is not IntervalStrategy.STEPS:
        raise RecipeError(f"scoring needs train.logging_strategy: steps, not {strategy.value}")
    if logging_steps >= 1 and every % logging_steps:
        raise RecipeError(
            f"scoring.every={every} must be a multiple of train.logging_steps={logging_steps:g}: scores are written "
            "beside the loss of their step"
        )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within it anything may be computed with the model; afterwards the run goes on as if nothing had been.

    The model answers in the dtype of its weights, as a checkpoint loaded in that dtype would: accelerate's autocast is
    taken off meanwhile.
    """
    modes = {module: module.training for module in model.modules()}
    python, numbers, states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # of this rank's device alone: asking for those of others would put a context on each
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    # lmms-eval makes an Accelerator of its own, which shares this with the Trainer's
    accumulation = dict(GradientState._shared_state)
    patched = model.__dict__.pop("forward") if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched
        GradientState._shared_state.update(accumulation)
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(states)
        if device is not None:
            torch.cuda.set_rng_state(device)


def attach(trainer: Any, scorer: LiveScorer | None, config: RunConfig, processor: Any) -> None:
    """Adds the callback behind all others that act at the end of a step; nothing happens without a scorer."""
    if scorer is None or config.scoring is None:
        return
    callback = ScoringCallback(scorer, config.scoring, processor, config.output_dir)
    check_logging(trainer.args, trainer.args.logging_steps, config.scoring.every)
    callback.trainer = trainer
    trainer.add_callback(callback)
