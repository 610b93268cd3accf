"""What the device could do and what training asks of it: peak rates, the operations of a step, memory.

Model FLOPs utilisation (MFU) as in PaLM (2204.02311, appendix B): the operations that the model needs, over what the
device could do in the same time. What is computed again under checkpointing counts once; padding does not count, nor do
experts that a token does not meet. Three things differ from PaLM's 6 N + 12 L H Q T:

- Attention is causal: a token attends to itself and those before it in its own sample, half of PaLM's square.
- Parts that are frozen are counted by what they do. Each matrix multiplies once forward, once backward for its own
  gradient if it learns, and once backward for the gradient of its input if something learns at it or before it. So a
  frozen tower counts its forward pass alone, a frozen decoder behind a projector that learns two thirds of training.
- Logits are counted at the positions that have a label, as they are computed there alone.

The work of adapters (LoRA) is left out; a device that the table does not know has no MFU.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava_moe.model.sites import find_blocks
from llava_moe.moe import MoELayer
from llava_moe.planning.counts import flops, matrix_parameters, tower_flops
from llava_moe.planning.shapes import model_on_meta
from llava_moe.training import distributed
from llava_moe.training.throughput import Counts

# Dense products with float32 accumulation in 1e12 operations per second, from the vendors' data sheets (without
# sparsity, where a sheet gives only the sparse number half of it). The whole name must match: a slice of a GPU (MIG), a
# laptop's or a cut-down variant has another peak under nearly the same name.
_BF16: dict[str, float] = {
    r"(NVIDIA )?A100.*(PCIe|PCIE|SXM4).*": 312.0,
    r"NVIDIA H100 PCIe": 756.0,
    r"NVIDIA H100 NVL": 835.0,
    r"NVIDIA H100 80GB HBM3": 989.0,  # SXM
    r"NVIDIA H200 NVL": 835.0,
    r"NVIDIA H200": 989.0,
    r"NVIDIA B200": 2250.0,
    r"NVIDIA L40S": 362.0,
    r"(NVIDIA )?RTX A6000": 154.8,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"NVIDIA GeForce RTX 3090": 71.0,
    r"AMD Instinct MI300X( OAM)?": 1307.4,
}
_FP16_ONLY: dict[str, float] = {
    r"Tesla V100-SXM2.*": 125.0,
    r"Tesla V100-PCIE.*": 112.0,
}


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Operations per second of matrix products in this precision; None where no number is at hand.

    Args:
        device: as `torch.cuda.get_device_name` gives it.
        dtype: of the products. There are numbers for bfloat16 and float16, which have one rate where both are known.
    """
    if dtype not in (torch.bfloat16, torch.float16) or " MIG " in device:
        return None
    table = _BF16 if dtype == torch.bfloat16 else {**_BF16, **_FP16_ONLY}
    return next((1e12 * rate for name, rate in table.items() if re.fullmatch(name, device)), None)


def product_dtype(args: Any, model: nn.Module) -> torch.dtype:
    """The precision of the matrix products of a run."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else next(model.parameters()).dtype


def peak_memory_gib(device: torch.device) -> float:
    """The most memory so far: what tensors took on a GPU, what the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass(frozen=True)
class TrainingWork:
    """Operations of training, forward and backward, by the convention at the head of this file.

    Attributes:
        token: of one token in the decoder's matrices.
        pair: of attention between two tokens.
        label: of one position with logits.
        picture: of one picture in the tower.
        feature: of one picture's features in the projector.
    """

    token: float
    pair: float
    label: float
    picture: float
    feature: float

    def total(self, counts: Counts) -> float:
        """Operations of all that was counted."""
        return (
            self.token * counts.tokens
            + self.pair * counts.pairs
            + self.label * counts.labels
            + self.picture * counts.pictures
            + self.feature * (counts.pictures + counts.features)
        )


def training_work(config: Any, learning: Collection[str]) -> TrainingWork:
    """Counts on a hollow copy, since parameters may be partitioned among ranks (ZeRO-3) or wrapped.

    Args:
        config: of the model.
        learning: names of the parameters that learn; adapters tell from where on gradients pass.
    """
    with distributed.unpartitioned():
        model = model_on_meta(config)
    inner, text = model.model, model.model.language_model
    matrices = _Matrices(model, learning)
    forward = flops(model, 2)  # at a mean of one position looked at: attention is that of a pair
    tower = tower_flops(inner.vision_tower, model.config.vision_feature_layer)

    def passes(*fragments: str) -> bool:
        return any(fragment in name for name in learning for fragment in fragments)

    back = passes(".vision_tower.")
    picture = tower * (1 + back + matrices.learning_share(inner.vision_tower))
    back = back or passes(".multi_modal_projector.", ".image_newline")
    feature = (forward.image - tower) * (1 + back + matrices.learning_share(inner.multi_modal_projector))
    back = back or passes(".embed_tokens.")
    blocks = find_blocks(text)
    path = f".language_model.{blocks.path}."
    token = pair = 0.0
    rest = matrix_parameters(text) - sum(layer.idle_parameters() for layer in inner.native_layers.values())
    for index, block in enumerate(blocks.layers):
        back = back or passes(f"{path}{index}.")
        active, learns = matrices.of(block)
        token += 2.0 * (active * (1 + back) + learns)
        pair += forward.attention / len(blocks.layers) * (3 if back else 1)
        rest -= active
    token += 2.0 * rest * (1 + back)
    label = forward.head * (1 + back + matrices.learns(model.lm_head.weight))
    return TrainingWork(token, pair, label, picture, feature)


class _Matrices:
    """Parameters in matrices that one token meets, and how many of them learn."""

    def __init__(self, model: nn.Module, learning: Collection[str]) -> None:
        self._learning = {id(p) for name, p in model.named_parameters() if name in set(learning)}
        self._share = dict(_active_shares(model))

    def learns(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._learning

    def of(self, module: nn.Module) -> tuple[float, float]:
        """All that are met, and those of them that learn."""
        met = learns = 0.0
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                active = parameter.numel() * self._share.get(id(parameter), 1.0)
                met += active
                learns += active * self.learns(parameter)
        return met, learns

    def learning_share(self, module: nn.Module) -> float:
        met, learns = self.of(module)
        return learns / met if met else 0.0


def _active_shares(model: nn.Module) -> Iterator[tuple[int, float]]:
    """For each parameter that belongs to one expert the share of it that one token meets."""
    for module in model.modules():
        experts: list[tuple[list[nn.Parameter], float]] = []
        if isinstance(module, MoELayer):
            own = [p for name, p in module.experts.named_parameters() if module.experts.belongs_to_one_expert(name)]
            experts.append((own, module.experts.idle_parameters(module.router.active_experts)))
        for native in getattr(module, "native_layers", {}).values():
            experts.append((list(native.experts.parameters()), native.idle_parameters()))
        for parameters, idle in experts:
            size = sum(parameter.numel() for parameter in parameters)
            yield from ((id(parameter), 1.0 - idle / size) for parameter in parameters)
