"""One stage from recipe to checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from llava_moe.config import RecipeError, RunConfig, dump_resolved, load_recipe
from llava_moe.data.check import check_sources
from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.model.assemble import check_checkpoint, fingerprint, load_model, move_into_place
from llava_moe.model_card import Origin, write_card
from llava_moe.training import distributed
from llava_moe.training.arguments import training_arguments
from llava_moe.training.card import run_origin
from llava_moe.training.controllers import Controllers, moe_layers
from llava_moe.training.data import PackingCheck, Sources, plain_sources, prepare_index, training_data
from llava_moe.training.feature_cache import feature_store
from llava_moe.training.images import match_images
from llava_moe.training.objective import Balance
from llava_moe.training.stage import apply_stage, count_trainable
from llava_moe.training.start import start_point
from llava_moe.training.telemetry import FILE as TELEMETRY
from llava_moe.training.telemetry import TelemetryCallback, read_telemetry
from llava_moe.training.trainer import LlavaMoeTrainer

DONE = "done.json"
RECIPE = "recipe.yaml"
START = "start.json"
MODEL = "model"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(config: RunConfig) -> Path:
    """Runs the stage and returns the directory of the final checkpoint, `<output_dir>/model`.

    A finished run is left as it is; an interrupted one goes on from its last whole checkpoint.

    Raises:
        RecipeError, DataError, CheckpointError, ValueError: something does not fit; nothing was computed yet.
    """
    started = time.perf_counter()
    out = Path(config.output_dir)
    final = out / MODEL
    if _is_done(config):
        print(f"train: {final} is finished already")
        return final
    arguments = training_arguments(config)
    if arguments.n_gpu > 1:
        raise RecipeError(f"one process for {arguments.n_gpu} GPUs: start the run with scripts/train/*.sh")
    plain = plain_sources(config)
    if plain is not None and config.data.check_images and distributed.rank() == 0:
        check_sources(plain).raise_if_broken()
    checkpoint = start_point(config)
    processor = load_processor(
        checkpoint,
        template=config.data.template,
        image_mode=config.data.image_mode,
        template_options=config.data.template_options,
        tiling=config.data.tiling,
        num_frames=config.data.num_frames,
    )
    sources = prepare_index(config, processor) if plain is None else plain
    trainer = _make_trainer(config, arguments, checkpoint, processor, sources)
    if distributed.rank() == 0:
        dump_resolved(config, out / RECIPE)
        start = {"checkpoint": str(checkpoint), "fingerprint": fingerprint(checkpoint)}
        (out / START).write_text(json.dumps(start, indent=2))
        _announce(config, trainer, checkpoint)
    last = last_whole_checkpoint(out)
    if last is not None and distributed.rank() == 0:
        print(f"train: going on from {last}")
    if last is not None:
        trainer.controllers.load(last)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    earlier = _earlier_seconds(out, last)
    facts = {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started + earlier, 1),
        "trainable": count_trainable(trainer.model),
        "world_size": trainer.args.world_size,
        "bf16": trainer.args.bf16,
    }
    report = trainer.train_dataset.report()
    origin = None
    if distributed.rank() == 0:
        origin = run_origin(config, checkpoint, (out / RECIPE).read_text(), report, facts)
    _save(trainer, processor, final, origin)
    if distributed.rank() == 0:
        facts["seconds"] = round(time.perf_counter() - started + earlier, 1)
        done = {"stage": config.stage.name, "start": str(checkpoint), **facts, "data": report}
        _finish(out, trainer, done)
    return final


def _make_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    checkpoint: Path,
    processor: LlavaMoeProcessor,
    sources: Sources,
) -> LlavaMoeTrainer:
    if config.model.dtype not in _DTYPES:
        raise RecipeError(f"model.dtype={config.model.dtype}: must be one of {', '.join(_DTYPES)}")
    model = load_model(checkpoint, _DTYPES[config.model.dtype], config.model.attn_implementation)
    match_images(model, processor)
    groups = apply_stage(model, config.stage)
    balance, layers = Balance.build(config.balance), moe_layers(model)
    balance.check(layers)
    controllers = Controllers.build(config.balance, layers, balance.losses)
    store = None
    if config.data.feature_cache is not None:
        if any(p.requires_grad for p in model.get_submodule("model.vision_tower").parameters()):
            raise RecipeError("data.feature_cache needs a frozen tower, but the stage trains parts of it")
        store = feature_store(config.data.feature_cache, model, processor, sources)
    dataset, collator = training_data(config, processor, sources, store)
    telemetry = TelemetryCallback(config.output_dir)
    trainer = LlavaMoeTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[telemetry, *([PackingCheck(collator)] if config.data.packing else [])],
        parameter_groups=groups,
        balance=balance,
        controllers=controllers,
    )
    telemetry.trainer = trainer
    return trainer


def _is_done(config: RunConfig) -> bool:
    """Whether the output directory holds this very run, finished.

    Raises:
        RecipeError: it holds a run, finished or not, of another recipe or from another start point.
    """
    out = Path(config.output_dir)
    if (out / RECIPE).is_file():
        differing = sorted(_differences(asdict(load_recipe(out / RECIPE)), asdict(config)))
        if differing:
            raise RecipeError(
                f"{out} holds a run of another recipe (different: {', '.join(differing[:5])}); "
                "choose another output_dir, or delete it"
            )
    if config.model.checkpoint is not None and (out / START).is_file():
        began_from = json.loads((out / START).read_text())["fingerprint"]
        if began_from != fingerprint(check_checkpoint(config.model.checkpoint)):
            raise RecipeError(
                f"{config.model.checkpoint} has changed since the run in {out} began from it; "
                "delete that folder to train again, or choose another output_dir"
            )
    return (out / DONE).is_file() and (out / MODEL / "config.json").is_file()


def _differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        return [d for k in keys for d in _differences(one.get(k), other.get(k), f"{prefix}{k}.")]
    return [] if one == other else [prefix.rstrip(".")]


def last_whole_checkpoint(out: Path) -> Path | None:
    """The newest `checkpoint-N` that was written to its end; trainer_state.json is the last file to be written."""
    whole = [path for path in out.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _is_json(path: Path) -> bool:
    """Whether the file is there and whole."""
    try:
        json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def _announce(config: RunConfig, trainer: LlavaMoeTrainer, checkpoint: Path) -> None:
    report = trainer.train_dataset.report()
    accumulation, batch = trainer.args.gradient_accumulation_steps, trainer.args.per_device_train_batch_size
    world = trainer.args.world_size
    steps = trainer.args.max_steps
    if steps <= 0:
        steps = math.ceil(len(trainer.train_dataset) / (batch * accumulation * world) * trainer.args.num_train_epochs)
    print(
        f"train: stage {config.stage.name} from {checkpoint}\n"
        f"  trainable {count_trainable(trainer.model):,} values in {', '.join(config.stage.learning_rates)}\n"
        f"  data {report}\n"
        f"  about {steps} steps of {batch} x {accumulation} x {world} (per device x accumulation x ranks), "
        f"{'bfloat16' if trainer.args.bf16 else 'float32'}, deepspeed {config.deepspeed or 'off'}",
        flush=True,
    )


def _save(trainer: LlavaMoeTrainer, processor: LlavaMoeProcessor, final: Path, origin: Origin | None) -> None:
    """Every rank takes part (ZeRO-3 gathers); the directory takes its name only when it is whole.

    Args:
        origin: for the model card; None on the ranks that do not write it.
    """
    partial = final.with_name(final.name + ".partial")
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
    distributed.barrier()
    trainer.model.save_original_format = True  # the names that llava-hf readers know; see docs/architecture.md
    trainer.save_model(str(partial))
    distributed.barrier()
    if origin is not None:
        (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and the recipe says the same
        processor.save_pretrained(partial)
        with distributed.unpartitioned():
            write_card(partial, origin)
        move_into_place(partial, final)
    distributed.barrier()


def _earlier_seconds(out: Path, last: Path | None) -> float:
    """Seconds that the interrupted run had spent up to its last checkpoint, from its telemetry."""
    if last is None or not (out / TELEMETRY).is_file():
        return 0.0
    step, total, previous = int(last.name.rsplit("-", 1)[1]), 0.0, 0
    for row in read_telemetry(out):
        if row["step"] <= step:
            total += row["seconds_per_step"] * (row["step"] - previous)
            previous = row["step"]
    return total


def _finish(out: Path, trainer: LlavaMoeTrainer, facts: dict[str, Any]) -> None:
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    trainer.controllers.save(out)
    (out / DONE).write_text(json.dumps(facts, indent=2))
    for path in out.glob("checkpoint-*"):  # optimiser states; the final model is whole
        shutil.rmtree(path)
    print(f"train: finished {facts['stage']} in {facts['seconds']:.0f} s -> {out / MODEL}\n  data {facts['data']}")
