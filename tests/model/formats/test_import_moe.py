"""MoE-LLaVA and CuMo; against loops over the same experts that are written out here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from llava_moe.convert import import_checkpoint
from llava_moe.model.assemble import load_model
from llava_moe.model.formats import Options
from llava_moe.model.modeling import CheckpointError
from tests.model.formats.layouts import (
    ROWS,
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
from tests.model.formats.test_import_llava import compare
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
    import copy

    return seeded(lambda: copy.deepcopy(block), seed)


def moe_llava(folder: Path, family: str, k: int, **moe: Any) -> tuple[Path, Any, Any, Any]:
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


@pytest.mark.parametrize(("family", "k"), [("llama", 2), ("llama", 1), ("qwen2", 2), ("stablelm", 2)])
def test_moe_llava(tmp_path: Path, family: str, k: int) -> None:
    path, model, tower, project = moe_llava(tmp_path, family, k)
    facts = import_checkpoint(path, tmp_path / "out", Options(), "v1")
    assert facts["layout"] == "moe_llava"
    part = load_model(tmp_path / "out").config.moe["decoder"]
    assert part["layers"] == [0, 2]
    assert part["router"]["args"] == {"k": k, "convention": "softmax_topk_renorm" if k == 2 else "softmax_topk"}
    compare(tmp_path / "out", model, clip_features(tower), project)


def test_moe_llava_refusals(tmp_path: Path) -> None:
    path, *_ = moe_llava(tmp_path, "llama", 2, top_k_experts=4)
    with pytest.raises(CheckpointError, match=r"moe\.top_k_experts is 4"):
        import_checkpoint(path, tmp_path / "out", Options(), "v1")


def cumo(folder: Path, **changes: Any) -> tuple[Path, Any, Callable[[Tensor], Tensor], nn.Module]:
    """(directory, decoder, features, projector); the tower's last layer has experts that never matter."""
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
    experts = [random_like(projector(), 90 + e) for e in range(3)]
    gate = torch.randn(3, 24, generator=torch.Generator().manual_seed(60))
    tensors["model.mm_projector.gate.weight"] = gate
    for e, expert in enumerate(experts):
        tensors |= prefixed(f"model.mm_projector.experts.{e}.", expert.state_dict())
    raw = llava_config(model, tower_dir, "llava_mistral", scales=[1], num_selected=2, num_experts=4, **changes)
    path = write(folder / "source", raw, tensors, tiny_llama_tokenizer())
    return path, model, clip_features(tower), SlowMoe(gate, experts, 2, renorm=True)


def test_cumo(tmp_path: Path) -> None:
    path, model, features, project = cumo(tmp_path)
    facts = import_checkpoint(path, tmp_path / "out", Options(), "mistral_instruct")
    assert facts["layout"] == "cumo"
    config = load_model(tmp_path / "out").config
    assert sorted(config.moe) == ["projector", "vision"]
    assert config.moe["vision"]["layers"] == [0, 1]
    compare(tmp_path / "out", model, features, project)


def test_cumo_with_many_scales(tmp_path: Path) -> None:
    path, *_ = cumo(tmp_path)
    import json

    raw = json.loads((path / "config.json").read_text()) | {"scales": [1, 3]}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"scales=\[1, 3\] is a multi-scale"):
        import_checkpoint(path, tmp_path / "out", Options(), "mistral_instruct")


def test_a_tower_in_clip_bin_and_a_mixtral_decoder(tmp_path: Path) -> None:
    tower_dir, tower = tower_folder(tmp_path / "tower")
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": ROWS, "num_local_experts": 4}
    model = seeded(lambda: AutoModelForCausalLM.from_config(MixtralConfig(**sizes, pad_token_id=0)), 7)
    model.save_pretrained(tmp_path / "stock")  # transformers writes the names that published Mixtrals have
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in tensors
    experts = [random_like(projector(), 90 + e) for e in range(2)]
    gate = torch.randn(2, 24, generator=torch.Generator().manual_seed(60))
    tensors["model.mm_projector.gate.weight"] = gate
    for e, expert in enumerate(experts):
        tensors |= prefixed(f"model.mm_projector.experts.{e}.", expert.state_dict())
    raw = llava_config(model, tower_dir, "llava_mixtral", scales=[1], num_selected=2)
    path = write(tmp_path / "source", raw, tensors, tiny_llama_tokenizer())
    torch.save(prefixed("vision_model.", {bare(n): v for n, v in tower.state_dict().items()}), path / "clip.bin")
    import_checkpoint(path, tmp_path / "out", Options(), "mistral_instruct")
    config = load_model(tmp_path / "out").config
    assert config.moe["decoder"]["num_experts"] == 4
    assert config.text_config.model_type in ("llama", "mistral")
    compare(tmp_path / "out", model, clip_features(tower), SlowMoe(gate, experts, 2, renorm=True))
