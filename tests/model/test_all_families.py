"""Every causal language model of transformers: its feed-forward block becomes experts exactly, or is refused."""

from __future__ import annotations

import warnings
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

from huggingface_hub.errors import StrictDataclassError  # isort: skip
import torch  # isort: skip
from torch import nn  # isort: skip
from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # isort: skip
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # isort: skip

from llava_moe.model.sites import activation_name, find_blocks, mlp_spec
from llava_moe.moe import LayerPlan, build_layer
from llava_moe.moe.upcycling import Copy, DenseMlp

_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "d_model": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "num_layers": 2, "ffn_hidden_size": 48,
    "pad_token_id": 0,
}  # fmt: skip
_REFUSALS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, AssertionError)
_LARGEST = 3_000_000  # families that do not know these keys would build their full-size default


def tiny(model_type: str) -> nn.Module | None:
    """A tiny decoder of the family, or None where these sizes do not make one."""
    try:
        config = CONFIG_MAPPING[model_type](**_SMALL).get_text_config()
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        return AutoModelForCausalLM.from_config(config) if size < _LARGEST else None
    except (*_REFUSALS, StrictDataclassError):
        # each family refuses odd sizes in its own way; how many are left is asserted below
        return None


def difference(model: nn.Module) -> float:
    """Largest difference between a dense block and two copies of it behind a router, relative to the output."""
    blocks = find_blocks(model.base_model)
    block = getattr(blocks.layers[0], blocks.name).float().eval()
    spec = mlp_spec(block, activation_name(model.config))
    layer = build_layer(LayerPlan(num_experts=2, experts_args={"kernel": "loop"}), spec)
    layer.experts.load_state_dict(Copy.build({})(DenseMlp.read(block, spec), spec, 2, torch.Generator()))
    x = torch.randn(1, 5, spec.hidden)
    with torch.no_grad():
        expected = block(x)
        found = layer(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    return float((found - expected).abs().max() / expected.abs().max())


def test_exact_or_refused() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    exact, refused, wrong = [], {}, {}
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model = tiny(model_type)
        if model is None:
            continue
        try:
            found = difference(model)
        except ValueError as error:
            refused[model_type] = str(error)
            continue
        if found <= 1e-5:
            exact.append(model_type)
        else:
            wrong[model_type] = found
    assert not wrong, wrong
    assert "ffn_sub_norm" in refused["bitnet"]
    assert len(exact) >= 60, exact
    assert {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "gemma2",
        "gemma3_text",
        "smollm3",
        "olmo2",
        "stablelm",
    } <= set(exact)
    said = ("found ", "linear children are", "names no activation", "it also has", "but its spec asks for")
    assert all(any(words in text for words in said) for text in refused.values()), refused
