"""Tiny checkpoints with experts, in the layouts of MoE-LLaVA and CuMo, and loops over the same experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.model.formats.layouts import (
    bare,
    clip_features,
    decoder,
    llava_config,
    prefixed,
    projector,
    seeded,
    tower_folder,
    write,
)
from tests.tiny import tiny_llama_tokenizer
from tests.tiny_model import HIDDEN


class SlowMoe(nn.Module):
    """Softmax over all experts, the k best; their probabilities as they are or divided by their sum."""

    def __init__(self, gate: Tensor, experts: list[Callable[[Tensor], Tensor]], k: int, renorm: bool) -> None:
        super().__init__()
        self.gate, self.experts, self.k, self.renorm = gate, experts, k, renorm

    def forward(self, hidden: Tensor) -> Tensor:
        rows = []
        for x in hidden.reshape(-1, hidden.shape[-1]):
            weight, index = (self.gate @ x).softmax(-1).topk(self.k)
            weight = weight / weight.sum() if self.renorm else weight
            chosen = zip(weight, index.tolist(), strict=True)
            rows.append(torch.stack([w * self.experts[e](x[None])[0] for w, e in chosen]).sum(0))
        return torch.stack(rows).reshape(*hidden.shape[:-1], -1)


def random_like(block: nn.Module, seed: int) -> nn.Module:
    """Another feed-forward block of the same shape."""
    return seeded(lambda: copy.deepcopy(block), seed)


def moe_llava(folder: Path, family: str, k: int, **moe: Any) -> tuple[Path, Any, Any, Any]:
    """(directory, decoder, tower, projector)."""
    tower_dir, tower = tower_folder(folder / "tower")
    model, project = decoder(family), projector()
    names = {0: 3, 2: 3}
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for layer, number in names.items():
        block = model.model.layers[layer].mlp
        experts = [random_like(block, 10 * layer + e) for e in range(number)]
        gate = torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(layer))
        head = f"model.layers.{layer}.mlp."
        tensors = {name: value for name, value in tensors.items() if not name.startswith(head)}
        tensors[f"{head}deepspeed_moe.gate.wg.weight"] = gate
        for e, expert in enumerate(experts):
            tensors |= prefixed(f"{head}deepspeed_moe.experts.deepspeed_experts.{e}.", expert.state_dict())
        model.model.layers[layer].mlp = SlowMoe(gate, experts, k, renorm=k == 2)
    tensors |= prefixed("model.mm_projector.image_spatial_proj.", project.state_dict())
    tensors |= prefixed(
        "model.image_tower.image_tower.vision_model.", {bare(n): v for n, v in tower.state_dict().items()}
    )
    options = {"moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": [0, 2], "num_experts": [3, 3]}
    options |= {"top_k_experts": k, "capacity_factor": 1.5, "use_residual": False, **moe}
    raw = llava_config(model, tower_dir, f"moe_llava_{family}", moe=options, mm_image_tower=str(tower_dir))
    raw["mm_vision_tower"] = None
    return write(folder / "source", raw, tensors, tiny_llama_tokenizer()), model, tower, project


def multi_scale(features: Callable[[Tensor], Tensor], scales: list[int]) -> Callable[[Tensor], Tensor]:
    """S2 by loops: each tile of each enlarged picture through the tower, its cells put in place, means taken."""

    def run(pixels: Tensor) -> Tensor:
        found = []
        for scale in scales:
            size = pixels.shape[-1]
            large = nn.functional.interpolate(pixels, size=size * scale, mode="bicubic") if scale > 1 else pixels
            rows = []
            for top in range(scale):
                tiles = []
                for left in range(scale):
                    tile = large[..., top * size : (top + 1) * size, left * size : (left + 1) * size]
                    tiles.append(features(tile)[0].unflatten(0, (2, 2)))
                rows.append(torch.cat(tiles, dim=1))
            grid = torch.cat(rows, dim=0)  # (2 scale, 2 scale, C)
            cells = [
                grid[i * scale : (i + 1) * scale, j * scale : (j + 1) * scale].mean((0, 1))
                for i in range(2)
                for j in range(2)
            ]
            found.append(torch.stack(cells))
        return torch.cat(found, dim=-1)[None]

    return run


def cumo(
    folder: Path, scales: list[int] | None = None, **changes: Any
) -> tuple[Path, Any, Callable[[Tensor], Tensor], nn.Module]:
    """(directory, decoder, features, projector); the tower's last layer has experts that never matter."""
    scales = scales or [1]
    width = 24 * len(scales)
    tower_dir, tower = tower_folder(folder / "tower")
    model = decoder("mistral")
    tensors: dict[str, Tensor] = dict(model.state_dict())
    kept = {bare(n): v for n, v in tower.state_dict().items() if ".mlp." not in n and "post_layernorm" not in n}
    for layer, module in enumerate(tower.encoder.layers):
        experts = [random_like(module.mlp, 20 * layer + e) for e in range(4)]
        gate = torch.randn(4, 24, generator=torch.Generator().manual_seed(50 + layer))
        kept[f"encoder.layers.{layer}.gate.weight"] = gate
        for e, expert in enumerate(experts):
            kept |= prefixed(f"encoder.layers.{layer}.experts.{e}.", expert.state_dict())
        module.mlp = SlowMoe(gate, experts, 2, renorm=True)
    tensors |= prefixed("model.vision_tower.vision_model.", kept)

    def dense() -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))

    experts = [seeded(dense, 90 + e) for e in range(3)]
    gate = torch.randn(3, width, generator=torch.Generator().manual_seed(60))
    tensors["model.mm_projector.gate.weight"] = gate
    for e, expert in enumerate(experts):
        tensors |= prefixed(f"model.mm_projector.experts.{e}.", expert.state_dict())
    given = {"scales": scales, "num_selected": 2, "num_experts": 4, "mm_projector_type": "smoe_mlp", **changes}
    raw = llava_config(model, tower_dir, "llava_mistral", **given)
    path = write(folder / "source", raw, tensors, tiny_llama_tokenizer())
    features = multi_scale(clip_features(tower), scales)
    return path, model, features, SlowMoe(gate, experts, 2, renorm=True)
