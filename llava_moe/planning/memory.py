"""Memory that training takes on one device, by kind, estimated from a model on the meta device.

Weights, gradients and optimiser states are exact up to padding. Activations and logits follow from what autograd keeps
in transformers' layers with SDPA or FlashAttention, for sequences of full length. Left out: the context of the device,
fragmentation, buffers of communication, and under ZeRO-3 the parameters that are gathered ahead.

    per trainable parameter          weights   gradient   optimiser
    plain or DDP, float32               4          4       8 (Adam's two moments)
    plain or DDP, bfloat16 weights      2          2       4
    DeepSpeed, bfloat16                 2          2      12 (float32 copy and moments)
    DeepSpeed, float32                  4          4       8, and 4 more for the copy that ZeRO-1 and 2 keep

ZeRO-1 divides the optimiser by the number of devices, ZeRO-2 the gradients too, ZeRO-3 the weights too (2104.07857,
1910.02054). At the optimiser step DeepSpeed holds its share of the gradients once more in float32 where the model is
bfloat16; by then the activations are gone, so the larger of the two counts. What a kernel works on for a moment is left
out as well.

Letters: D width, Q and KV widths of queries and of keys with values, F width of a feed-forward block, K experts of a
token, V vocabulary, b bytes of a number in matrix products.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llava_moe.config import RecipeError
from llava_moe.model.loss import CHUNK_LOGITS
from llava_moe.model.sites import find_blocks, num_used_layers
from llava_moe.model.vision_composite import FusedTower, MultiScaleTower, grid_of
from llava_moe.moe import MoELayer

_FLOAT32 = 4
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Setup:
    """How a run uses its devices.

    Attributes:
        devices: number of ranks.
        micro_batch: sequences of one device in one forward pass.
        sequence_length: tokens of a sequence, those of pictures included.
        images: pictures, or tiles of them, that go through the tower for a sequence, at the most.
        image_tokens: positions of a sequence that stand for pictures, at the least.
        weight_bytes: of a stored number of the model.
        compute_bytes: of a number in matrix products, as under autocast.
        zero_stage: 0 to 3 with DeepSpeed; None without.
        checkpointing: whether layers are computed again in the backward pass.
        offload_optimiser, offload_weights: whether these lie in the memory of the host.
        expert_parallel: ranks that share the decoder's experts; 1 where every rank holds all.
        fused_loss: whether the loss is made from some positions at a time.
    """

    devices: int = 1
    micro_batch: int = 1
    sequence_length: int = 2048
    images: int = 1
    image_tokens: int = 0
    weight_bytes: int = 4
    compute_bytes: int = 4
    zero_stage: int | None = None
    checkpointing: bool = False
    offload_optimiser: bool = False
    offload_weights: bool = False
    expert_parallel: int = 1
    fused_loss: bool = False

    @property
    def tokens(self) -> int:
        """Of one forward pass on one device."""
        return self.micro_batch * self.sequence_length

    @property
    def labels(self) -> int:
        """Positions with logits, at the most: all but those of pictures."""
        return self.micro_batch * max(self.sequence_length - self.image_tokens, 1)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `host` lies in the host's memory, per device."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    step: int
    host: int = 0

    @property
    def total(self) -> int:
        """The peak: activations and logits are gone when the optimiser steps."""
        return self.weights + self.gradients + self.optimiser + max(self.activations + self.logits, self.step)

    def kinds(self) -> dict[str, int]:
        """Bytes by kind."""
        names = ("weights", "gradients", "optimiser", "activations", "logits", "step")
        return {name: getattr(self, name) for name in names}


def zero_setup(deepspeed: str | None, bf16: bool, dtype: str) -> dict[str, Any]:
    """What a recipe's DeepSpeed file, `train.bf16` and `model.dtype` mean for a `Setup`.

    Raises:
        RecipeError: the file is no DeepSpeed JSON, or the dtype unknown.
    """
    if dtype not in _BYTES:
        raise RecipeError(f"model.dtype={dtype}: must be one of {', '.join(_BYTES)}")
    compute = 2 if bf16 else _BYTES[dtype]
    if deepspeed is None:
        return {"zero_stage": None, "weight_bytes": _BYTES[dtype], "compute_bytes": compute}
    try:
        raw = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        zero = raw.get("zero_optimization", {})
        enabled = raw.get("bf16", {}).get("enabled", False)
        stage = int(zero.get("stage", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RecipeError(f"deepspeed: {deepspeed}: not readable as a DeepSpeed JSON: {error}") from error
    half = bf16 if enabled == "auto" else bool(enabled)
    return {
        "zero_stage": stage,
        "weight_bytes": 2 if half else 4,
        "compute_bytes": 2 if half else 4,
        "offload_optimiser": zero.get("offload_optimizer", {}).get("device", "none") != "none",
        "offload_weights": zero.get("offload_param", {}).get("device", "none") != "none",
    }


def estimate(model: Any, setup: Setup) -> Memory:
    """Estimates what a training step takes; `requires_grad` says what learns."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    stage = setup.zero_stage
    share = [_divided(trainable, setup.devices) if (stage or 0) >= level else trainable for level in (1, 2, 3)]
    held = _divided(total, setup.devices) if (stage or 0) >= 3 else total
    weights, gradients = held * setup.weight_bytes, share[1] * setup.weight_bytes
    if setup.expert_parallel > 1:  # ZeRO's shares stay: 1/N of the experts among 1/N of the ranks
        elsewhere = _elsewhere(model, setup.expert_parallel)
        weights -= elsewhere * setup.weight_bytes
        gradients -= 0 if stage == 2 else elsewhere * setup.weight_bytes
    optimiser = share[0] * optimiser_bytes(setup)
    half = stage is not None and setup.weight_bytes < _FLOAT32
    step = share[0] * _FLOAT32 if half else 0
    host = 0
    if setup.offload_optimiser:  # the gradients go there as they come
        host, optimiser, gradients, step = optimiser + gradients + step, 0, 0, 0
    if setup.offload_weights:
        host, weights = host + weights, 0
    return Memory(weights, gradients, optimiser, activations(model, setup), logits(model, setup), step, host)


def _divided(number: int, devices: int) -> int:
    return -(-number // devices)


def _elsewhere(model: Any, ranks: int) -> int:
    """Parameters of the decoder's experts that other ranks hold."""
    layers = (m for m in model.modules() if isinstance(m, MoELayer) and m.site[0] == "decoder")
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    return experts - _divided(experts, ranks)


def share_of(number: int, setup: Setup, level: int) -> int:
    """Of so many parameters those that one device holds, where ZeRO from `level` on divides them."""
    return _divided(number, setup.devices) if (setup.zero_stage or 0) >= level else number


def optimiser_bytes(setup: Setup) -> int:
    """Bytes of the optimiser for each trainable parameter."""
    if setup.zero_stage is None:
        return 2 * setup.weight_bytes
    copies = setup.weight_bytes < _FLOAT32 or setup.zero_stage in (1, 2)
    return (3 if copies else 2) * _FLOAT32


def logits(model: Any, setup: Setup) -> int:
    """Logits of the positions with labels, their float32 log-probabilities and gradient at the peak of the loss.

    With a fused loss those of some positions, and the gradients that are there before the backward pass begins.
    """
    b, head = setup.compute_bytes, model.lm_head.weight
    per_logit = 2 * _FLOAT32 + (b if b < _FLOAT32 else 0)
    if not setup.fused_loss:
        return setup.labels * int(head.shape[0]) * per_logit
    rows = min(setup.labels, max(1, CHUNK_LOGITS // int(head.shape[0])))
    taken = setup.labels * int(head.shape[1]) * b + (head.numel() * _FLOAT32 if head.requires_grad else 0)
    return rows * int(head.shape[0]) * per_logit + taken


def activations(model: Any, setup: Setup) -> int:
    """What is kept from the forward to the backward pass, up to the last hidden states."""
    inner = model.model
    tower_learns = _learns(inner.vision_tower)
    before_decoder = tower_learns or _learns(inner.multi_modal_projector) or _learns(model.get_input_embeddings())
    tokens, b = setup.tokens, setup.compute_bytes
    text = model.config.text_config
    blocks = find_blocks(inner.language_model)
    kept = _stack(
        [_decoder_layer(layer, blocks.name, text, b) * tokens for layer in _reached(blocks.layers, before_decoder)],
        tokens * int(text.hidden_size) * b,
        setup.checkpointing,
    )
    kept += tokens * int(text.hidden_size) * (_FLOAT32 + 2 * b)  # the last norm, and the states at the labels
    images = setup.micro_batch * setup.images
    if tower_learns:
        kept += _tower(inner.vision_tower, model.config.vision_feature_layer, images, setup)
    if _learns(inner.multi_modal_projector) or tower_learns:
        kept += images * _projector(model, setup)
    return kept + _autocast_copies(model, setup)


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _reached(layers: nn.ModuleList, all_of_them: bool) -> list[nn.Module]:
    """The layers that the backward pass goes through: all behind the first thing that learns."""
    first = 0 if all_of_them else next((i for i, layer in enumerate(layers) if _learns(layer)), len(layers))
    return list(layers[first:])


def _stack(layers: list[int], inputs: int, checkpointing: bool) -> int:
    """Bytes of a stack of layers; with checkpointing their inputs, and the largest one while it is computed again."""
    if not checkpointing or not layers:
        return sum(layers)
    return len(layers) * inputs + max(layers)


def _decoder_layer(layer: nn.Module, block: str, text: Any, b: int) -> int:
    """Bytes of one token: two RMS norms, attention and the feed-forward block.

    A norm keeps its input in float32 and, where it learns, what it scales; a linear map keeps its input where it
    learns; attention keeps queries, keys, values and its output.
    """
    D, heads = int(text.hidden_size), int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or D // heads)
    Q = heads * head_dim
    KV = 2 * int(getattr(text, "num_key_value_heads", None) or heads) * head_dim
    learns = _learns(layer)
    norms = 2 * (_FLOAT32 + (2 * b if learns else 0)) * D
    attention = b * (2 * Q + KV)
    if any(name.endswith(("q_norm.weight", "k_norm.weight")) for name, _ in layer.named_parameters()):
        attention += (_FLOAT32 + (b if learns else 0)) * (Q + KV // 2)
    return norms + attention + _feed_forward(getattr(layer, block), b, D)


def _feed_forward(block: nn.Module, b: int, width: int) -> int:
    """Bytes of one token in a dense or sparse feed-forward block."""
    if isinstance(block, MoELayer):
        # The kernels keep what comes out of the first matrix and compute the rest again.
        spec, k = block.experts.spec, min(float(block.router.active_experts), float(block.experts.num_experts))
        inside = 2 if spec.gated else 1
        kept = k * b * inside * spec.intermediate + (2 * b * width if _learns(block) else 0)
        if block.shared is not None:
            kept += b * inside * block.shared.spec.intermediate
        return round(kept + _FLOAT32 * (width + 2 * block.experts.num_experts))
    experts: Any = getattr(block, "experts", None)
    if experts is not None:  # of transformers' own
        k = int(getattr(getattr(block, "gate", None), "top_k", 1))
        shared = [m for name, m in block.named_children() if name.startswith("shared_expert") and "gate" not in name]
        inside = k * b * (2 * width + 4 * experts.down_proj.shape[-1])
        return inside + _FLOAT32 * width + sum(_feed_forward(m, b, width) for m in shared)
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    down = linears[-1]
    gated = sum(m.out_features for m in linears[:-1]) >= 2 * down.in_features
    inside = (3 if gated else 1) + (1 if _learns(down) else 0)
    return b * inside * down.in_features


def _tower(tower: Any, feature_layer: int | list[int], images: int, setup: Setup) -> int:
    """Bytes of a transformer tower that learns; of one of convolutions, twelve times its last grid."""
    if isinstance(tower, FusedTower):
        pairs = zip(tower.towers, tower.config.feature_layers or [], strict=True)
        return sum(_tower(inner, layer, images, setup) for inner, layer in pairs)
    if isinstance(tower, MultiScaleTower):
        tiles = sum(scale**2 for scale in tower.config.scales or [])
        return _tower(tower.tower, tower.config.feature_layer, images * tiles, setup)
    b, config = setup.compute_bytes, tower.config
    positions, D = images * grid_of(config) ** 2, int(config.hidden_size)
    if not hasattr(config, "num_attention_heads"):
        return 12 * positions * D * b
    blocks = find_blocks(tower)
    used = blocks.layers[: num_used_layers(len(blocks.layers), feature_layer)]
    # two layer norms with input and output, and attention
    layers = [positions * (4 * b * D + 4 * b * D + _feed_forward(getattr(x, blocks.name), b, D)) for x in used]
    return _stack(layers, positions * D * b, setup.checkpointing)


def _projector(model: Any, setup: Setup) -> int:
    """Bytes of one picture in the projector."""
    b, tokens = setup.compute_bytes, int(model.config.image_seq_length)
    projector = model.model.multi_modal_projector
    width = int(model.config.vision_config.hidden_size)
    if isinstance(projector, MoELayer):
        return tokens * _feed_forward(projector, b, width)
    outputs = sum(m.out_features for m in projector.modules() if isinstance(m, nn.Linear))
    return b * tokens * (width + 2 * outputs)


def _autocast_copies(model: Any, setup: Setup) -> int:
    """Autocast keeps a rounded copy of each matrix for the backward pass; with checkpointing only of one layer."""
    if setup.compute_bytes >= setup.weight_bytes:
        return 0
    blocks = find_blocks(model.model.language_model).layers
    of_blocks = sum(p.numel() for p in blocks.parameters() if p.ndim >= 2)
    head = model.lm_head.weight.numel()
    return setup.compute_bytes * (head + (of_blocks // len(blocks) if setup.checkpointing else of_blocks))
