"""Expert parallelism: each rank holds, trains and saves a part of the decoder's experts (`expert_parallel: N`).

N consecutive ranks share the experts of a layer; tokens travel to the rank of their expert and back. Everything else of
the model is on every rank, as under ZeRO-1 and 2. Routers, balance losses, controllers and telemetry see what they see
without it, and so does whoever reads a checkpoint: it is gathered when it is written. docs/expert_parallelism.md says
when it is worth its traffic, what else was tried and why this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_moe.config import RecipeError, RunConfig
from llava_moe.moe import MoELayer
from llava_moe.moe.experts import StackedExperts

_KEY = "expert_parallel"
_PART = "decoder"  # the experts of towers and projectors are small, and stay whole on every rank
_STAGES = (1, 2)
_TESTED = "0.19."  # the engine's treatment of experts is no stable interface
# What stands between two ranks that must meet in every layer, or undoes what `gather_on_save` does.
_REFUSED_ARGUMENTS = {
    "auto_find_batch_size": "a rank that runs out of memory would leave the others waiting in an exchange",
    "torch_compile": "the host must know how many rows travel, and nobody has tried that under a compiler",
}
_REFUSED_SECTIONS = {
    "expert_parallel": "DeepSpeed's AutoEP replaces the routers too; leave its section out",
    "tensor_parallel": "together with tensor parallelism it was not tried",
    "data_types": "with gradients of another dtype than the model's it was not tried",
}


def check_recipe(config: RunConfig, world_size: int) -> None:
    """Checks what the recipe and its DeepSpeed file say; does nothing where the key is absent.

    Raises:
        RecipeError: a value is refused, or does not go together with expert parallelism.
    """
    size = config.expert_parallel
    if size is None:
        return
    if size < 2:
        raise RecipeError(f"{_KEY}={size}: must be a number of ranks, at least 2; null for every expert on every rank")
    if world_size % size:
        raise RecipeError(f"{_KEY}={size}: must divide the number of ranks, and this run has {world_size}")
    for key, why in _REFUSED_ARGUMENTS.items():
        if config.train.get(key):
            raise RecipeError(f"train.{key} does not go with {_KEY}: {why}")
    if config.lora is not None:
        raise RecipeError(f"lora does not go with {_KEY}: adapters are small; leave {_KEY} out, or take ZeRO-3")
    if config.speed.compile_layers:
        raise RecipeError(f"speed.compile_layers does not go with {_KEY}: {_REFUSED_ARGUMENTS['torch_compile']}")
    if config.deepspeed is None:
        raise RecipeError(f"{_KEY}={size} needs DeepSpeed; set deepspeed: scripts/deepspeed/zero2.json, or zero1.json")
    _check_deepspeed(config.deepspeed)


def _check_deepspeed(path: str) -> None:
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        zero = raw.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RecipeError(f"deepspeed: {path}: not readable as a DeepSpeed JSON: {error}") from error
    if stage == 3:
        raise RecipeError(
            f"{_KEY}: {path} is ZeRO-3, which spreads all parameters over all ranks, experts included; leave "
            f"{_KEY} out, or take scripts/deepspeed/zero2.json"
        )
    if stage not in _STAGES:
        raise RecipeError(
            f"{_KEY}: {path} is ZeRO-{stage}, under which DeepSpeed clips by a wrong norm (a mean over ranks that hold "
            "different experts); take scripts/deepspeed/zero1.json or zero2.json"
        )
    for section, why in _REFUSED_SECTIONS.items():
        if raw.get(section):
            raise RecipeError(f"{_KEY}: {path} has a section {section}: {why}")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise RecipeError(f"{_KEY}: {path} has zero_optimization.{key}, which was not tried with it; leave it out")
    for key in ("contiguous_gradients", "reduce_scatter"):
        if not zero.get(key, True):
            raise RecipeError(f"{_KEY}: {path}: zero_optimization.{key} must be true, DeepSpeed asks it for experts")
    if (raw.get("checkpoint") or {}).get("load_universal"):
        raise RecipeError(f"{_KEY}: {path}: checkpoint.load_universal does not know experts that are spread over ranks")


def spread_layers(model: nn.Module, size: int) -> dict[str, MoELayer]:
    """The layers whose experts will be spread, by path.

    Raises:
        RecipeError: there is none, or one cannot be.
    """
    if any(getattr(module, "native_layers", None) for module in model.modules()):
        raise RecipeError(f"{_KEY}: this decoder has experts of its own, which stay as they are; use ZeRO-3 for them")
    found = {path: m for path, m in model.named_modules() if isinstance(m, MoELayer) and m.site[0] == _PART}
    if not found:
        raise RecipeError(f"{_KEY}={size}: no layer of the decoder has experts that could be spread; leave it out")
    for path, layer in found.items():
        kind, router = type(layer.experts), layer.router
        if kind is not StackedExperts:
            raise RecipeError(
                f"{_KEY}: {path}: experts {kind.__name__} cannot be spread, only stacked ones; use ZeRO-3"
            )
        if layer.experts.num_experts % size:
            raise RecipeError(f"{_KEY}={size}: {path}: must divide its {layer.experts.num_experts} experts")
        if router.needs_experts:
            raise RecipeError(
                f"{_KEY}: {path}: the router {type(router).__name__} looks at the outputs of experts when it likes, "
                "and ranks must meet in every exchange; use ZeRO-3"
            )
        if not all(p.requires_grad for p in layer.experts.parameters()):
            raise RecipeError(
                f"{_KEY}: {path}: its experts do not learn in this stage, and DeepSpeed restores only those that do; "
                f"name experts in stage.learning_rates, or leave {_KEY} out"
            )
    return found


def spread(model: nn.Module, groups: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Leaves on each rank its part of the decoder's experts, and returns the optimiser's groups that fit.

    Args:
        groups: from `stage.apply_stage`.

    Raises:
        RecipeError: see `spread_layers`; or the installed DeepSpeed is another one than this was tried with.
    """
    layers = spread_layers(model, size)
    import deepspeed

    if not deepspeed.__version__.startswith(_TESTED):
        raise RecipeError(
            f"{_KEY}: was tried with DeepSpeed {_TESTED}*, and {deepspeed.__version__} is installed; install that, or "
            f"use ZeRO-3 without {_KEY}"
        )
    deepspeed.init_distributed()  # nothing if it is there
    from llava_moe.training.expert_shard import ParallelExperts

    gone: set[int] = set()
    taken: dict[int, list[nn.Parameter]] = {}
    for layer in layers.values():
        gone |= {id(p) for p in layer.experts.parameters()}
        key = id(layer.experts.down_proj)
        layer.experts = ParallelExperts(layer.experts, size)  # type: ignore[arg-type]
        taken[key] = [p for p in layer.experts.parameters() if p.requires_grad]
    return [made for group in groups for made in _split(group, gone, taken, f"ep_size_{size}")]


def _split(
    group: dict[str, Any], gone: set[int], taken: dict[int, list[nn.Parameter]], name: str
) -> list[dict[str, Any]]:
    """A group without experts, and one of experts, marked as DeepSpeed asks."""
    others = {**group, "params": [p for p in group["params"] if id(p) not in gone]}
    experts = [new for p in group["params"] for new in taken.get(id(p), [])]
    spread_group = {**group, "params": experts, "moe": True, "name": name}
    return [made for made in (others, spread_group) if made["params"]]


def learning_names(model: nn.Module) -> list[str]:
    """Names of the parameters that learn, as they are in a model whose experts are not spread."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = getattr(parameter, "whole_names", None)
            layer = name.rsplit(".shard.", 1)[0]
            found += [name] if whole is None else [f"{layer}.{each}" for each in whole]
    return found


def gather_on_save(trainer: Any) -> None:
    """Makes every checkpoint that the trainer writes hold all experts, in the layout of a run without this."""
    from llava_moe.training.expert_shard import ParallelExperts

    local = trainer.accelerator.get_state_dict

    def whole(model: nn.Module, unwrap: bool = True) -> dict[str, Tensor]:
        """Every rank calls it under DeepSpeed; only those that write keep the experts."""
        state: dict[str, Tensor] = local(model, unwrap)
        for path, module in trainer.model.named_modules():
            if isinstance(module, ParallelExperts):
                for key in [key for key in state if key.startswith(f"{path}.")]:
                    del state[key]
                state.update({f"{path}.{k}": v for k, v in module.gathered(bool(trainer.args.should_save)).items()})
        return state

    trainer.accelerator.get_state_dict = whole
