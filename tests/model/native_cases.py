"""What the tests of decoders with experts of their own share: tiny ones of five families, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.moe import BALANCE_LOSSES
from tests.tiny import tiny_tokenizer
from tests.tiny_model import tiny_config, tiny_processor

E, K = 8, 3
BIAS = "e_score_correction_bias"
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_QWEN = {"moe_intermediate_size": 24, "num_experts": E}
# name: model_type, values of its config, layers with experts
DECODERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "mixtral": ("mixtral", {"num_local_experts": E}, [0, 1, 2]),
    "qwen2_moe": ("qwen2_moe", {**_QWEN, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]}, [0, 2]),
    "qwen3_moe": ("qwen3_moe", {**_QWEN, "norm_topk_prob": True, "head_dim": 8, "mlp_only_layers": [0]}, [1, 2]),
    "olmoe": ("olmoe", {"num_experts": E}, [0, 1, 2]),
    "deepseek_v3": (
        "deepseek_v3",
        {**MLA, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": E, "n_group": 4,
         "topk_group": 2, "first_k_dense_replace": 1},
        [1, 2],
    ),
}  # fmt: skip
every_decoder = pytest.mark.parametrize("name", DECODERS)


def text_config(name: str, **changes: Any) -> Any:
    model_type, values, _ = DECODERS[name]
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
        "num_experts_per_tok": K, "tie_word_embeddings": False, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return CONFIG_MAPPING[model_type](**{**sizes, **values, **changes})


def native_model(name: str, seed: int = 0, **changes: Any) -> LlavaMoeForConditionalGeneration:
    """Gates of unequal taste, and a bias that moves the selection where there is one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaMoeForConditionalGeneration(tiny_config(text_config=text_config(name, **changes))).eval()
        for layer in model.model.native_layers.values():
            for parameter in [*layer.router.gate.parameters(), *layer.experts.parameters()]:
                parameter.normal_(std=0.3)
            for buffer in layer.router.gate.buffers():
                buffer.normal_(std=0.1)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(std=0.3)
    return model


def write_native(folder: Path, name: str, **changes: Any) -> Path:
    model, processor = native_model(name, **changes), tiny_processor()
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.pad_token_id
    model.save_pretrained(folder, save_original_format=True)
    processor.save_pretrained(folder)
    return folder


def sites(name: str) -> list[tuple[str, int]]:
    return [("decoder", index) for index in DECODERS[name][2]]


def switch(loss: str = "switch", **options: Any) -> Any:
    return BALANCE_LOSSES.get(loss).build(options)
