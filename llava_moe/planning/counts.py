"""Parameters and arithmetic of a model, counted from its modules; the model may be on the meta device.

A multiplication and the addition behind it are two operations. Matrix products and attention are counted, norms and
activations are not: they are below one percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llava_moe.model.sites import find_blocks, num_used_layers
from llava_moe.model.vision_composite import FusedTower, MultiScaleTower, grid_of
from llava_moe.moe import MoELayer


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model.

    Attributes:
        total: all of them.
        active: those that one token meets; of E feed-forward experts only as many as the router uses.
        trainable: those that learn.
    """

    total: int
    active: int
    trainable: int


@dataclass(frozen=True)
class Counts:
    """Parameters by part; a parameter that two modules share counts once."""

    parts: dict[str, PartCount]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        return sum(part.active for part in self.parts.values())

    @property
    def trainable(self) -> int:
        return sum(part.trainable for part in self.parts.values())


def count(model: nn.Module, part_of: Callable[[str], str]) -> Counts:
    """Counts the parameters of a model by part.

    Args:
        part_of: the part that a parameter belongs to, by its name.
    """
    total: dict[str, int] = {}
    trainable: dict[str, int] = {}
    idle: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        total[part] = total.get(part, 0) + parameter.numel()
        trainable[part] = trainable.get(part, 0) + parameter.numel() * parameter.requires_grad
    for name, number in idle_experts(model):
        part = part_of(f"{name}.experts.")
        idle[part] = idle.get(part, 0.0) + number
    # all experts are one part, so nothing but their sum is rounded
    return Counts({p: PartCount(n, n - round(idle.get(p, 0.0)), trainable[p]) for p, n in total.items()})


def idle_experts(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Parameters of experts that one token does not meet, for each layer with experts, ours or transformers' own."""
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield name, module.experts.idle_parameters(module.router.active_experts)
        for native in getattr(module, "native_layers", {}).values():
            yield f"{name}.language_model", native.idle_parameters()


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass.

    Attributes:
        decoder: of one token in the decoder's matrices, vocabulary projection left out.
        attention: of one token in attention proper, at the mean over the positions of a sequence of the given length.
        head: of one token whose logits are computed.
        image: of one picture in tower and projector.
    """

    decoder: float
    attention: float
    head: float
    image: float

    def sequence(self, tokens: int, labels: int, images: float = 1.0) -> float:
        """Operations of one sequence."""
        return tokens * (self.decoder + self.attention) + labels * self.head + images * self.image


def flops(model: Any, sequence_length: int) -> Work:
    """Counts the operations of a forward pass, with causal attention over `sequence_length` positions."""
    text = model.config.text_config
    inner = model.model
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers = len(find_blocks(inner.language_model).layers)
    native = sum(layer.idle_parameters() for layer in inner.native_layers.values())
    # each position looks at half of the sequence in the mean; queries times keys, and weights times values
    attention = 2 * 2 * (sequence_length / 2) * heads * head_dim * layers
    return Work(
        decoder=2.0 * (matrix_parameters(inner.language_model) - native),
        attention=float(attention),
        head=2.0 * model.lm_head.weight.numel(),
        image=tower_flops(inner.vision_tower, model.config.vision_feature_layer) + _projector_flops(model),
    )


def matrix_parameters(module: nn.Module) -> float:
    """Parameters of matrices that one token is multiplied with: no embeddings, no idle experts."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    found = sum(p.numel() for p in module.parameters() if p.ndim >= 2 and id(p) not in tables)
    return found - sum(idle for _, idle in idle_experts(module))


def tower_flops(tower: Any, feature_layer: int | list[int]) -> float:
    """Operations of a tower on one picture; layers behind the selected features are not computed."""
    if isinstance(tower, FusedTower):
        pairs = zip(tower.towers, tower.config.feature_layers or [], strict=True)
        return sum(tower_flops(inner, layer) for inner, layer in pairs)
    if isinstance(tower, MultiScaleTower):
        tiles = sum(scale**2 for scale in tower.config.scales or [])
        return tiles * tower_flops(tower.tower, tower.config.feature_layer)
    config = tower.config
    if not hasattr(config, "num_attention_heads"):  # convolutions: their work is not that of their parameters
        return _measured(tower, int(config.image_size))
    blocks = find_blocks(tower).layers
    used = num_used_layers(len(blocks), feature_layer)
    positions = grid_of(config) ** 2
    matrices = sum(matrix_parameters(block) for block in blocks[:used])
    stem = sum(m.weight.numel() for m in tower.modules() if isinstance(m, nn.Conv2d))
    return 2.0 * positions * (matrices + stem) + 4.0 * positions**2 * int(config.hidden_size) * used


def _measured(tower: nn.Module, size: int) -> float:
    device = next(tower.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.empty(1, 3, size, size, device=device))
    return float(counter.get_total_flops())


def _projector_flops(model: Any) -> float:
    """A projector's matrices, met by each of its input features; exact for a linear map or an MLP."""
    tokens = int(model.config.image_seq_length)
    return 2.0 * tokens * matrix_parameters(model.model.multi_modal_projector)
