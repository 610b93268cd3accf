"""Low-rank adapters in a run (LoRA, 2106.09685; QLoRA, 2305.14314): what learns, what is saved, what is left.

peft puts the adapters into the model in place, so the model's class, its routing scope and its names stay ours. A
checkpoint of such a run holds what learns and nothing else: what is frozen comes from the base again, whose fingerprint
is checked at every start. At the end the adapters lie in `<output_dir>/adapter`, and `<output_dir>/model` is a whole
checkpoint with the adapters merged in.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from llava_moe.config import LoraSection, RecipeError, RunConfig
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.model.assemble import fingerprint, move_into_place
from llava_moe.model.lora_merge import ADAPTERS, FACTS, TRAINED, merge_adapter
from llava_moe.model.lora_targets import Target, linear_pattern, lora_targets
from llava_moe.model.streaming import INDEX_FILE, CheckpointReader, weight_files
from llava_moe.model_card import Origin, write_card
from llava_moe.moe import MoELayer
from llava_moe.planning.lora import AdapterPlan
from llava_moe.planning.memory import zero_setup
from llava_moe.registry import near_misses
from llava_moe.training import distributed
from llava_moe.training.quantize import KINDS as QUANTIZED
from llava_moe.training.quantize import import_bitsandbytes, quantizable, quantize_nf4
from llava_moe.training.stage import LORA, apply_stage

ADAPTER = "adapter"
_NAME = "default"  # peft's name of the one adapter; it is in the names of its parameters
_ADAPTED_PARTS = ("decoder", "experts")


@dataclass(frozen=True)
class Adapters:
    """What was put into a model.

    Attributes:
        config: peft's LoraConfig.
        section: of the recipe.
        base: the checkpoint.
        places: the weight in the model without adapters, and the module that holds its adapter.
        quantized: how many weights are in 4 bits.
    """

    config: Any
    section: LoraSection
    base: Path
    places: dict[str, str]
    quantized: int


def check(config: RunConfig) -> None:
    """Everything that can be checked before a model is loaded.

    Raises:
        RecipeError: a value is refused, or a package is missing that the section needs.
    """
    check_recipe(config)
    if config.lora is None:
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RecipeError("lora needs peft: pip install 'llava-moe[train]'") from error
    if config.lora.quantize is not None:
        import_bitsandbytes()


def check_recipe(config: RunConfig) -> None:
    """Checks what a recipe says of adapters against itself.

    Raises:
        RecipeError: a value is refused, or section and learning rates do not belong together.
    """
    lora, rates = config.lora, config.stage.learning_rates
    if lora is None:
        if LORA in rates:
            raise RecipeError(
                "stage.learning_rates.lora: the recipe has no section lora; add one, e.g. "
                "`lora: {rank: 128, alpha: 256}`"
            )
        return
    if LORA not in rates:
        raise RecipeError("lora: the adapters have no rate; add lora to stage.learning_rates")
    whole = [part for part in _ADAPTED_PARTS if part in rates]
    if whole:
        raise RecipeError(
            f"stage.learning_rates.{whole[0]}: with a section lora the decoder and its experts learn through their "
            f"adapters alone; take {' and '.join(whole)} out of stage.learning_rates, or leave out the section"
        )
    _check_values(lora)
    if config.expert_parallel is not None:
        raise RecipeError(
            f"expert_parallel={config.expert_parallel} does not go with a section lora; leave out one of them"
        )
    if lora.quantize is not None and zero_setup(config.deepspeed, False, "float32")["zero_stage"] == 3:
        raise RecipeError(
            f"lora.quantize={lora.quantize} does not go with ZeRO-3, which would cut the packed weights apart; use "
            "scripts/deepspeed/zero2.json"
        )


def _check_values(lora: LoraSection) -> None:
    if lora.rank < 1:
        raise RecipeError(f"lora.rank={lora.rank} must be at least 1")
    if lora.alpha <= 0:
        raise RecipeError(f"lora.alpha={lora.alpha} must be above 0")
    if not 0 <= lora.dropout < 1:
        raise RecipeError(f"lora.dropout={lora.dropout} must be at least 0 and below 1")
    if lora.quantize is not None and lora.quantize not in QUANTIZED:
        raise RecipeError(f"lora.quantize={lora.quantize!r}: {near_misses(lora.quantize, list(QUANTIZED))}")


def chosen_targets(model: Any, config: RunConfig) -> tuple[Target, ...]:
    """The weights that the recipe adapts; none without the section.

    Raises:
        RecipeError: a target does not exist, or cannot have what the recipe asks for.
    """
    if config.lora is None:
        return ()
    try:
        targets = lora_targets(model, config.lora.targets)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if all(target.kind != "experts" for target in targets):
        return targets
    if config.lora.dropout > 0:
        raise RecipeError(
            f"lora.dropout={config.lora.dropout}: adapters of stacked experts are added to the weights and never see "
            "an input that could be dropped; set lora.dropout: 0, or leave experts out of lora.targets"
        )
    curious = {type(m.router).__name__ for m in model.modules() if isinstance(m, MoELayer) and m.router.needs_experts}
    if curious:
        raise RecipeError(
            f"lora: {', '.join(sorted(curious))} looks at the outputs of all experts, past their adapters; set "
            "lora.targets: [attention, mlp]"
        )
    ours = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, MoELayer))
    if all(target.name.startswith(ours) for target in targets if target.kind == "experts"):
        return targets
    stage = zero_setup(config.deepspeed, False, "float32")["zero_stage"]
    if stage == 3 or config.speed.compile_layers:
        what = "ZeRO-3" if stage == 3 else "speed.compile_layers"
        mend = "use scripts/deepspeed/zero2.json" if stage == 3 else "set it to false"
        raise RecipeError(
            f"lora: under {what} the experts of a decoder that is MoE by itself take no adapters; {mend}, or set "
            "lora.targets: [attention]"
        )
    return targets


def plan_adapters(model: Any, config: RunConfig) -> AdapterPlan | None:
    """Freezes a model without weights as the stage would; the adapters that it would get, None without the section.

    Raises:
        RecipeError, ValueError: the recipe would be refused.
    """
    check_recipe(config)
    stage, lora = config.stage, config.lora
    if lora is None:
        apply_stage(model, stage)
        return None
    targets = chosen_targets(model, config)
    stage.check_decay()
    rates = {part: rate for part, rate in stage.learning_rates.items() if part != LORA}
    if rates:
        apply_stage(model, replace(stage, learning_rates=rates, weight_decay=0.0))
    else:
        model.requires_grad_(False)
    packed = 0
    if lora.quantize is not None:
        packed = sum(target.inputs * target.outputs for target in quantizable(lora_targets(model)))
    return AdapterPlan(targets, lora.rank, lora.dropout > 0, packed)


def add_adapters(model: Any, config: RunConfig, checkpoint: Path, compute_dtype: torch.dtype) -> None:
    """Quantises what the recipe says and puts the adapters in; does nothing without the section.

    Args:
        model: loaded, before `apply_stage`.
        checkpoint: what it was loaded from.
        compute_dtype: of matrix products.

    Raises:
        RecipeError: a target does not exist, or cannot have what the recipe asks for.
    """
    lora = config.lora
    if lora is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    targets = chosen_targets(model, config)
    quantized = 0
    if lora.quantize is not None:
        quantized = quantize_nf4(model, lora_targets(model), compute_dtype)
    dtype = main_dtype(model)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float will do, and is written as it is
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=linear_pattern(model, targets) or [],
        target_parameters=[target.name for target in targets if target.kind == "experts"] or None,
        base_model_name_or_path=str(checkpoint),
    )
    model.is_loaded_in_4bit = quantized > 0  # peft asks the model which kind of linear map to expect
    # The first values follow from the seed alone, on every rank alike.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(settings, model, _NAME)
    del model.is_loaded_in_4bit, model.peft_config
    # DeepSpeed keeps a float32 copy of its own, and wants one dtype; else small steps would be lost in bfloat16.
    kept = torch.float32 if config.deepspeed is None else dtype
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            parameter.data = parameter.data.to(kept)
    model.adapters = Adapters(settings, lora, checkpoint, _places(model), quantized)
    _keep_what_learns(model)
    if model.adapters.places.keys() != {target.name for target in targets}:
        raise AssertionError("peft has put adapters elsewhere than it was told to")


def _is_adapter(name: str) -> bool:
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name


def _plain(name: str) -> str:
    """The name of a parameter in the model without adapters."""
    return name.replace(".base_layer", "")


def _places(model: nn.Module) -> dict[str, str]:
    from peft.tuners.lora.layer import LoraLayer

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # of nested wrappers of stacked weights, each knows which parameter it is for
            found[f"{_plain(path)}.{getattr(module, 'parameter_name', 'weight')}"] = path
    return found


def main_dtype(model: nn.Module) -> torch.dtype:
    """That of most frozen weights; packed ones do not count, nor do adapters."""
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in model.named_parameters():  # never by attribute, which gathers under ZeRO-3
        if parameter.is_floating_point() and not _is_adapter(name):
            sizes[parameter.dtype] += int(getattr(parameter, "ds_numel", parameter.numel()))
    return sizes.most_common(1)[0][0]


def _keep_what_learns(model: Any) -> None:
    """From now on the model saves what learns and its buffers, and misses nothing else when it loads."""

    def kept() -> set[str]:
        return {n for n, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        names = kept()
        for name in [n for n in state if n.startswith(prefix) and n.removeprefix(prefix) not in names]:
            del state[name]

    def forgive(module: nn.Module, incompatible: Any) -> None:
        names = kept()
        # DDP and DeepSpeed may hold the model as `module`
        incompatible.missing_keys[:] = [n for n in incompatible.missing_keys if n.removeprefix("module.") in names]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(forgive)
    model.saved_names = kept


class SmallCheckpoints(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Tells DeepSpeed not to save what is frozen; ZeRO-2 and 3 would, past the model's own state."""

    trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            engine = self.trainer.model_wrapped
            engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)


def watch_checkpoints(trainer: Any) -> None:
    """To be called once the trainer is made."""
    callback = SmallCheckpoints()
    callback.trainer = trainer
    trainer.add_callback(callback)


def describe(model: Any) -> str:
    """What the adapters are, in whole lines; nothing without adapters."""
    made: Adapters | None = model.adapters
    if made is None:
        return ""
    size = sum(p.numel() for name, p in model.named_parameters() if _is_adapter(name))
    stacked = sum(name.rsplit(".", 1)[1] != "weight" for name in made.places)
    line = f"  lora: {size:,} values in adapters of rank {made.section.rank} on {len(made.places)} weights"
    if stacked:
        line += f", {stacked} of them stacked experts"
    if made.quantized:
        whole = "; stacked experts, embeddings and the vocabulary projection are not quantised"
        line += f"\n  nf4: {made.quantized:,} weights of linear maps in 4 bits{whole}"
    return line + "\n"


def save_adapted(trainer: Any, processor: LlavaMoeProcessor, final: Path, origin: Origin | None) -> None:
    """Writes `<output_dir>/adapter`, and from it and the base the whole model; every rank takes part.

    Args:
        final: the directory of the whole model.
        origin: for its card; None on the ranks that do not write.
    """
    folder = final.with_name(ADAPTER)
    partial_folder = folder.with_name(f"{ADAPTER}.partial")
    if distributed.rank() == 0:
        shutil.rmtree(partial_folder, ignore_errors=True)  # of a run that was killed while it wrote
    distributed.barrier()
    trainer.save_model(str(partial_folder))
    distributed.barrier()
    if origin is not None:
        with distributed.unpartitioned():
            write_adapter(partial_folder, trainer.model)
            processor.save_pretrained(partial_folder)
            move_into_place(partial_folder, folder)
            merge_adapter(folder, trainer.model.adapters.base, final, lambda made, _: write_card(made, origin))
    distributed.barrier()


def write_adapter(folder: Path, model: Any) -> None:
    """Turns what `save_model` wrote into an adapter directory, see `llava_moe.model.lora_merge`."""
    made: Adapters = model.adapters
    reader = CheckpointReader(folder)
    adapters, trained = {}, {}
    for name in reader.infos:
        if _is_adapter(name):
            adapters[f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"] = reader.read(name)
        else:
            trained[_plain(name)] = reader.read(name)
    save_file(adapters, folder / ADAPTERS, metadata={"format": "pt"})
    save_file(trained, folder / TRAINED, metadata={"format": "pt"})
    for file in (*weight_files(folder), folder / INDEX_FILE, folder / TRAINING_ARGS_NAME):
        file.unlink(missing_ok=True)
    made.config.save_pretrained(str(folder))
    main = main_dtype(model)
    others = {
        _plain(name): _name_of(parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not _is_adapter(name) and parameter.dtype != main
    }
    facts = {
        **asdict(made.section),
        "base": str(made.base),
        "base_fingerprint": fingerprint(made.base),
        "dtype": _name_of(main),
        "dtypes": others,
        "adapted": made.places,
        "versions": {name: version(name) for name in ("llava-moe", "torch", "transformers", "peft")},
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
