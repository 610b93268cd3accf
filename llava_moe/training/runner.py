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

from llava_moe.config import RecipeError, RunConfig, dump_resolved, load_recipe
from llava_moe.data.check import check_sources
from llava_moe.data.collator import Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.model.assemble import check_checkpoint, fingerprint, load_model
from llava_moe.training import distributed
from llava_moe.training.arguments import training_arguments
from llava_moe.training.controllers import Controllers, moe_layers
from llava_moe.training.feature_cache import feature_store
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
    sources = [(Path(s.path), Path(s.image_folder)) for s in config.data.sources]
    if not sources:
        raise RecipeError("data.sources is empty: name at least one LLaVA JSON file and its image folder")
    if config.data.check_images and distributed.rank() == 0:
        check_sources(sources).raise_if_broken()
    checkpoint = start_point(config)
    processor = load_processor(
        checkpoint,
        template=config.data.template,
        image_mode=config.data.image_mode,
        template_options=config.data.template_options,
    )
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
    _save(trainer, processor, final)
    if distributed.rank() == 0:
        seconds = time.perf_counter() - started + _earlier_seconds(out, last)
        _finish(config, trainer, checkpoint, seconds)
    return final


def _make_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    checkpoint: Path,
    processor: LlavaMoeProcessor,
    sources: list[tuple[Path, Path]],
) -> LlavaMoeTrainer:
    if config.model.dtype not in _DTYPES:
        raise RecipeError(f"model.dtype={config.model.dtype}: must be one of {', '.join(_DTYPES)}")
    model = load_model(checkpoint, _DTYPES[config.model.dtype], config.model.attn_implementation)
    groups = apply_stage(model, config.stage)
    balance, layers = Balance.build(config.balance), moe_layers(model)
    balance.check(layers)
    controllers = Controllers.build(config.balance, layers, balance.losses)
    store = None
    if config.data.feature_cache is not None:
        if any(p.requires_grad for p in model.get_submodule("model.vision_tower").parameters()):
            raise RecipeError("data.feature_cache needs a frozen tower, but the stage trains parts of it")
        store = feature_store(config.data.feature_cache, model, processor, sources)
    dataset = ConversationDataset(
        sources,
        processor,
        max_length=config.data.max_length,
        overlong=config.data.overlong,  # type: ignore[arg-type]  # checked there
        feature_store=store,
    )
    collator = Collator(
        pad_token_id=processor.pad_token_id,
        image_token_id=processor.image_token_id,
        num_image_tokens=processor.num_image_tokens,
        image_shape=processor.image_shape if store is None else None,
        feature_shape=None if store is None else store.feature_shape,
    )
    telemetry = TelemetryCallback(config.output_dir)
    trainer = LlavaMoeTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[telemetry],
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


def _save(trainer: LlavaMoeTrainer, processor: LlavaMoeProcessor, final: Path) -> None:
    """Every rank takes part (ZeRO-3 gathers); the directory takes its name only when it is whole."""
    partial = final.with_name(final.name + ".partial")
    trainer.model.save_original_format = True  # the names that llava-hf readers know; see docs/architecture.md
    trainer.save_model(str(partial))
    distributed.barrier()
    if distributed.rank() == 0:
        processor.save_pretrained(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
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


def _finish(config: RunConfig, trainer: LlavaMoeTrainer, checkpoint: Path, seconds: float) -> None:
    out = Path(config.output_dir)
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    trainer.controllers.save(out)
    facts = {
        "stage": config.stage.name,
        "start": str(checkpoint),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "trainable": count_trainable(trainer.model),
        "data": trainer.train_dataset.report(),
        "world_size": trainer.args.world_size,
        "bf16": trainer.args.bf16,
    }
    (out / DONE).write_text(json.dumps(facts, indent=2))
    for path in out.glob("checkpoint-*"):  # optimiser states; the final model is whole
        shutil.rmtree(path)
    print(f"train: finished {config.stage.name} in {seconds:.0f} s -> {out / MODEL}")
