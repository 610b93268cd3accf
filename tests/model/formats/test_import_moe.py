"""MoE-LLaVA and CuMo; against loops over the same experts that are written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from llava_moe.convert import import_checkpoint
from llava_moe.model.assemble import load_model
from llava_moe.model.formats import Options
from llava_moe.model.modeling import CheckpointError
from tests.model.formats.layouts import (
    ROWS,
    bare,
    clip_features,
    llava_config,
    prefixed,
    projector,
    seeded,
    tower_folder,
    write,
)
from tests.model.formats.moe_layouts import SlowMoe, cumo, moe_llava, random_like
from tests.model.formats.test_import_llava import compare
from tests.tiny import tiny_llama_tokenizer
from tests.tiny_model import HIDDEN


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


def test_residual_experts_are_refused(tmp_path: Path) -> None:
    """DeepSpeed's residual MoE: a dense block beside the experts, and a learned mix of the two."""
    path, *_ = moe_llava(tmp_path, "llama", 2, use_residual=True)
    residual = {"model.layers.0.mlp.coefficient.weight": torch.zeros(2, HIDDEN)}
    save_file(load_file(path / "model.safetensors") | residual, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mlp\.coefficient\.weight: residual experts \(use_residual\)"):
        import_checkpoint(path, tmp_path / "out", Options(), "v1")


@pytest.mark.parametrize("scales", [[1], [1, 2], [1, 3]])
def test_cumo(tmp_path: Path, scales: list[int]) -> None:
    path, model, features, project = cumo(tmp_path, scales)
    facts = import_checkpoint(path, tmp_path / "out", Options(), "mistral_instruct")
    assert facts["layout"] == "cumo"
    config = load_model(tmp_path / "out").config
    assert sorted(config.moe) == ["projector", "vision"]
    assert config.moe["vision"]["layers"] == [0, 1]
    assert config.image_seq_length == 4
    compare(tmp_path / "out", model, features, project)


@pytest.mark.parametrize("scales", [[1, 1.5], [2, 3], [3, 1]])
def test_scales_that_cannot_be_had(tmp_path: Path, scales: list[Any]) -> None:
    path, *_ = cumo(tmp_path)
    raw = json.loads((path / "config.json").read_text()) | {"scales": scales}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"scales=\[.*must be whole numbers that ascend from 1"):
        import_checkpoint(path, tmp_path / "out", Options(), "mistral_instruct")


def test_a_tower_in_clip_bin_and_a_mixtral_decoder(tmp_path: Path) -> None:
    tower_dir, tower = tower_folder(tmp_path / "tower")
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": ROWS, "num_local_experts": 4}
    model = seeded(lambda: AutoModelForCausalLM.from_config(MixtralConfig(**sizes, pad_token_id=0)), 7)
    model.save_pretrained(tmp_path / "stock")  # transformers writes the names that published Mixtrals have
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
