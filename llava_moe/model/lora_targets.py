"""Which weights of a decoder get low-rank adapters (LoRA, 2106.09685), told from the modules alone.

LLaVA-1.5 adapts every linear map of its language model: not the tower, not the projector, not the vocabulary
projection. So do we, and of a sparse decoder also the stacked weights of the experts. Routers and other small parts of
an MoE layer have no adapters; they can learn whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_moe.model.sites import find_blocks
from llava_moe.moe import MoELayer
from llava_moe.registry import near_misses

DECODER = "model.language_model"
KINDS = ("attention", "mlp", "experts")
_OTHER = "other"  # linear maps of the decoder outside its layers
_STACKED = ("gate_up_proj", "up_proj", "down_proj")
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Target:
    """One weight with an adapter.

    Attributes:
        name: of the parameter in the model without adapters.
        kind: one of `KINDS`, or "other".
        inputs, outputs: its widths; of stacked weights, those of one expert.
        experts: how many are stacked; 1 of a linear map.
        active: the share of its experts that one token meets.
        layer: index of the decoder layer; None outside of the layers.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    experts: int = 1
    active: float = 1.0
    layer: int | None = None

    @property
    def path(self) -> str:
        """What is matched: of a linear map the module, of stacked weights the parameter."""
        return self.name if self.kind == "experts" else self.name.removesuffix(".weight")

    def adapter_size(self, rank: int) -> int:
        """Parameters of its adapter; the rank is that of each expert."""
        return self.experts * rank * (self.inputs + self.outputs)


def lora_targets(model: Any, names: Sequence[str] = ()) -> tuple[Target, ...]:
    """The weights of a model that get adapters, in the order of its modules.

    Args:
        model: one of ours, with or without weights, before adapters are put in.
        names: kinds (attention: all linear maps of a layer but those of its feed-forward block, mlp, experts), or
            regular expressions that the end of a path must match from a dot on: `q_proj`, `layers\\.[0-3]\\..*`.
            None at all means every one there is.

    Raises:
        ValueError: a name matches nothing.
    """
    every = list(_all_targets(model))
    if not names:
        return tuple(every)
    chosen: set[str] = set()
    for name in names:
        found = [t for t in every if t.kind == name] if name in KINDS else _matching(name, every)
        if not found:
            raise ValueError(_nothing_found(name, every))
        chosen.update(target.name for target in found)
    return tuple(target for target in every if target.name in chosen)


def _matching(name: str, every: list[Target]) -> list[Target]:
    try:
        pattern = re.compile(rf"(?:.*\.)?(?:{name})")
    except re.error as error:
        raise ValueError(f"lora.targets: {name!r} is no regular expression: {error}") from error
    return [target for target in every if pattern.fullmatch(target.path)]


def _nothing_found(name: str, every: list[Target]) -> str:
    ends = list(dict.fromkeys(target.path.rsplit(".", 1)[1] for target in every))
    if name in KINDS:
        kinds = list(dict.fromkeys(target.kind for target in every))
        return f"lora.targets: this decoder has no {name} to adapt; it has {', '.join(kinds)}"
    return (
        f"lora.targets: {name!r} is none of {', '.join(KINDS)}, and matches the end of no path in the decoder "
        f"(they end in {', '.join(ends)}); {near_misses(name, [*KINDS, *ends])}"
    )


def _all_targets(model: Any) -> Iterator[Target]:
    decoder = model.model.language_model
    blocks = find_blocks(decoder)
    active = dict(_active_shares(model, decoder))
    skipped = [path for path, module in decoder.named_modules() if isinstance(module, MoELayer)]
    gates = {id(module) for layer in model.model.native_layers.values() for module in layer.router.gate.modules()}
    for path, module in decoder.named_modules():
        layer = _layer_of(path, blocks.path)
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # empty under ZeRO-3
            if name in _STACKED and len(shape) == 3:
                experts, one, other = shape
                inputs, outputs = (one, other) if getattr(module, "is_transposed", False) else (other, one)
                full = f"{DECODER}.{path}.{name}"
                yield Target(full, "experts", inputs, outputs, experts, active.get(path, 1.0), layer)
        inside = any(path.startswith(f"{owner}.") for owner in skipped) or id(module) in gates
        # a gate with a single output is a vector, of which no adapter is smaller
        if isinstance(module, nn.Linear) and not inside and module.out_features > 1:
            kind = _OTHER
            if layer is not None:
                kind = "mlp" if f"{path}.".startswith(f"{blocks.block_path(layer)}.") else "attention"
            name = f"{DECODER}.{path}.weight"
            yield Target(name, kind, module.in_features, module.out_features, layer=layer)


def _layer_of(path: str, layers: str) -> int | None:
    match = re.match(rf"{re.escape(layers)}\.(\d+)\.", path)
    return None if match is None else int(match[1])


def _active_shares(model: Any, decoder: nn.Module) -> Iterator[tuple[str, float]]:
    """(path of routed experts, share of them that one token meets)."""
    paths = {id(module): path for path, module in decoder.named_modules()}
    for path, module in decoder.named_modules():
        if isinstance(module, MoELayer):
            yield f"{path}.experts", min(1.0, module.router.active_experts / module.experts.kinds.count("ffn"))
    for layer in model.model.native_layers.values():
        yield paths[id(layer.experts)], min(1.0, layer.router.active_experts / layer.router.num_experts)


def linear_pattern(model: nn.Module, targets: Sequence[Target]) -> str | None:
    """One regular expression that matches exactly the linear maps among the targets; None where there are none.

    Files with it stay readable: a 7B decoder has 224 linear maps of 7 names.
    """
    paths = {target.path for target in targets if target.kind != "experts"}
    if not paths:
        return None
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups: dict[str, list[str]] = {}
    for path in linears:
        groups.setdefault(_NUMBER.sub(".#.", path), []).append(path)
    patterns = []
    for group, members in groups.items():
        taken = [path for path in members if path in paths]
        if len(taken) == len(members):
            patterns.append(re.escape(group).replace(r"\#", "#").replace("#", r"\d+"))
        else:
            patterns += [re.escape(path) for path in taken]
    pattern = "|".join(patterns)
    if {path for path in linears if re.fullmatch(pattern, path)} != paths:
        raise AssertionError(f"the pattern {pattern} does not match what it was made from")
    return pattern
