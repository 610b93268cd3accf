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
from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.model.assemble import check_checkpoint, fingerprint, load_model, move_into_place
from llava_moe.model.attention import attention_of
from llava_moe.model_card import Origin, write_card
from llava_moe.training import checkpoints, distributed, expert_parallel, lora
from llava_moe.training.alarms import Alarms, check_telemetry, make_meter, summary
from llava_moe.training.arguments import training_arguments
from llava_moe.training.card import run_origin
from llava_moe.training.checkpoints import describe_last, last_whole_checkpoint
from llava_moe.training.controllers import Controllers, moe_layers
from llava_moe.training.data import PackingCheck, Sources, check_plain, plain_sources, prepare_index, training_data
from llava_moe.training.feature_cache import feature_store
from llava_moe.training.images import match_images
from llava_moe.training.metrics import spent_seconds
from llava_moe.training.objective import Balance
from llava_moe.training.preflight import check_image_folders, check_space
from llava_moe.training.progress import spare_logs
from llava_moe.training.reshard import reshard
from llava_moe.training.scoring import attach, live_scorer
from llava_moe.training.speed import INTERCHANGEABLE, apply_speed, attention_for, check_speed, speed_facts
from llava_moe.training.stage import apply_stage, count_trainable
from llava_moe.training.start import start_point
from llava_moe.training.stopping import Interrupted, StopRequest
from llava_moe.training.trainer import LlavaMoeTrainer
from llava_moe.training.watch import watch

DONE = "done.json"
RECIPE = "recipe.yaml"
START = "start.json"
MODEL = "model"
_HALF = (f"{MODEL}.partial", f"{lora.ADAPTER}.partial")  # while the end of a run is written
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(config: RunConfig) -> Path:
    """Runs the stage and returns the directory of the final checkpoint, `<output_dir>/model`.

    A finished run is left as it is; an interrupted one goes on from its last whole checkpoint.

    Raises:
        RecipeError, DataError, CheckpointError, ValueError: something does not fit; nothing was computed yet.
        NotFiniteError, SaveError: the training cannot go on; see there.
        Interrupted: it was asked to stop, and has saved.
    """
    final = Path(config.output_dir) / MODEL
    if _is_done(config):
        if distributed.rank() == 0:
            checkpoints.clear(final.parent, everything=True)  # of a kill after the end
        print(f"train: {final} is finished already")
        return final
    request = StopRequest(config.output_dir)
    with request.listening(), request.naming_who_is_gone():
        _train(config, request, final)
    return final


def _train(config: RunConfig, request: StopRequest, final: Path) -> None:
    started, out = time.perf_counter(), final.parent
    spare_logs()
    arguments = training_arguments(config)
    _check_early(config, arguments)
    last = _resume_point(config, arguments, request)
    plain = plain_sources(config)
    check_image_folders(config)
    scorer = live_scorer(config)
    if plain is not None:
        check_plain(config, plain)
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
    attach(trainer, scorer, config, processor)
    if distributed.rank() == 0:
        dump_resolved(config, out / RECIPE)
        start = {"checkpoint": str(checkpoint), "fingerprint": fingerprint(checkpoint)}
        _write_json(out / START, start)
        _announce(config, trainer, checkpoint)
        check_space(trainer, out)
        if last is not None:
            print(f"train: going on from {last}", flush=True)
    if last is not None:
        trainer.controllers.load(last)
        trainer.skips.load(last)
        trainer.alarms.resume(out, last)
    trainer.stop_request = request
    trainer.run(last)
    if trainer.was_stopped:
        _leave(trainer, out, request)
    earlier = 0.0 if last is None else spent_seconds(out, int(last.name.rsplit("-", 1)[1]))
    facts = {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started + earlier, 1),
        **_how(trainer),
    }
    report = {**trainer.train_dataset.report(), **trainer.skips.report()}
    origin = None
    if distributed.rank() == 0:
        origin = run_origin(config, checkpoint, (out / RECIPE).read_text(), report, facts)
    with checkpoints.writing("the final model", out, *(out / name for name in _HALF)):
        _save(trainer, processor, final, origin)
    if distributed.rank() == 0:
        facts["seconds"] = round(time.perf_counter() - started + earlier, 1)
        done = {"stage": config.stage.name, "start": str(checkpoint), **facts, "data": report, "alarms": summary(out)}
        _finish(out, trainer, done)
        request.forget()


def _check_early(config: RunConfig, arguments: TrainingArguments) -> None:
    """Raises RecipeError for what the recipe may not ask for, or not of this machine; nothing is read for it."""
    if arguments.n_gpu > 1:
        raise RecipeError(f"one process for {arguments.n_gpu} GPUs: start the run with scripts/train/*.sh")
    check_speed(config, arguments)
    lora.check(config)
    check_telemetry(config.telemetry)
    expert_parallel.check_recipe(config, arguments.world_size)


def _how(trainer: LlavaMoeTrainer) -> dict[str, Any]:
    """What learned, and by what means."""
    return {
        "trainable": count_trainable(trainer.model),
        "world_size": trainer.args.world_size,
        "bf16": trainer.args.bf16,
        **speed_facts(trainer.model),
    }


def _resume_point(config: RunConfig, arguments: TrainingArguments, request: StopRequest) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None to begin.

    Raises:
        RecipeError: a run that is divided among the ranks like this one cannot go on from it.
    """
    out = Path(config.output_dir)
    request.look_after_peers()
    if distributed.rank() == 0:
        checkpoints.clear(out)
    last: Path | None = distributed.first(last_whole_checkpoint(out))
    if last is not None:
        now = checkpoints.layout_of(config, arguments.world_size)
        checkpoints.check_layout(last, now)
        reshard(last, config, arguments, now)
    return last


def _leave(trainer: LlavaMoeTrainer, out: Path, request: StopRequest) -> None:
    """After a stop that was asked for.

    Raises:
        Interrupted: always.
    """
    if distributed.rank() == 0:
        request.forget()
    distributed.barrier()
    where = f"stopped at step {trainer.state.global_step}; {describe_last(out)}"
    raise Interrupted(f"{where}; start the run again to go on", agreed=True)


def _make_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    checkpoint: Path,
    processor: LlavaMoeProcessor,
    sources: Sources,
) -> LlavaMoeTrainer:
    if config.model.dtype not in _DTYPES:
        raise RecipeError(f"model.dtype={config.model.dtype}: must be one of {', '.join(_DTYPES)}")
    model = load_model(checkpoint, _DTYPES[config.model.dtype], attention_for(config, arguments, checkpoint))
    match_images(model, processor)
    lora.add_adapters(model, config, checkpoint, torch.bfloat16 if arguments.bf16 else model.dtype)
    groups = apply_stage(model, config.stage)
    balance, layers = Balance.build(config.balance), moe_layers(model)
    balance.check(layers)
    controllers = Controllers.build(config.balance, layers, balance.losses)
    meter, alarms = make_meter(config.telemetry), Alarms.build(config, layers)
    store = None
    if config.data.feature_cache is not None:
        if any(p.requires_grad for p in model.get_submodule("model.vision_tower").parameters()):
            raise RecipeError("data.feature_cache needs a frozen tower, but the stage trains parts of it")
        store = feature_store(config.data.feature_cache, model, processor, sources)
    dataset, collator = training_data(config, processor, sources, store, attention_of(model))
    if config.expert_parallel is not None:
        groups = expert_parallel.spread(model, groups, config.expert_parallel)
    apply_speed(model, config, arguments)
    trainer = LlavaMoeTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[PackingCheck(collator)] if config.data.packing else [],
        parameter_groups=groups,
        balance=balance,
        controllers=controllers,
        meter=meter,
        alarms=alarms,
    )
    trainer.skips.policy = config.data.on_problem
    watch(trainer, config)
    if config.lora is not None:
        lora.watch_checkpoints(trainer)
    if config.expert_parallel is not None:
        expert_parallel.gather_on_save(trainer)
    return trainer


def _is_done(config: RunConfig) -> bool:
    """Whether the output directory holds this very run, finished.

    Raises:
        RecipeError: it holds a run, finished or not, of another recipe or from another start point.
    """
    out = Path(config.output_dir)
    if (out / RECIPE).is_file():
        found = {*_differences(asdict(load_recipe(out / RECIPE)), asdict(config))} - INTERCHANGEABLE
        # what is watched and scored changes nothing
        differing = sorted(key for key in found if key.split(".")[0] not in ("telemetry", "scoring"))
        if differing and not checkpoints.is_only_divided_otherwise(config, differing):
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
        f"{lora.describe(trainer.model)}"
        f"  data {report}\n"
        f"  about {steps} steps of {batch} x {accumulation} x {world} (per device x accumulation x ranks), "
        f"{'bfloat16' if trainer.args.bf16 else 'float32'}, deepspeed {config.deepspeed or 'off'}\n"
        f"  {', '.join(f'{name} {value}' for name, value in speed_facts(trainer.model).items())}",
        flush=True,
    )


def _save(trainer: LlavaMoeTrainer, processor: LlavaMoeProcessor, final: Path, origin: Origin | None) -> None:
    """Every rank takes part (ZeRO-3 gathers); the directory takes its name only when it is whole.

    Args:
        origin: for the model card; None on the ranks that do not write it.
    """
    if trainer.model.adapters is not None:
        lora.save_adapted(trainer, processor, final, origin)
        return
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
        checkpoints.flush(partial)
        move_into_place(partial, final)
    distributed.barrier()


def _finish(out: Path, trainer: LlavaMoeTrainer, facts: dict[str, Any]) -> None:
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    trainer.controllers.save(out)
    _write_json(out / DONE, facts)
    checkpoints.clear(out, everything=True)  # optimiser states; the final model is whole
    print(f"train: finished {facts['stage']} in {facts['seconds']:.0f} s -> {out / MODEL}\n  data {facts['data']}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")  # a kill must not leave half of it under the name
    partial.write_text(json.dumps(content, indent=2))
    partial.rename(path)
