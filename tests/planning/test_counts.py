"""Parameter counts are exact, by part and for known models; operations agree with what torch counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from llava_moe.config import StageSection
from llava_moe.model.upcycling import count_parameters
from llava_moe.planning import Setup, count, estimate, flops, model_on_meta
from llava_moe.planning.counts import tower_flops
from llava_moe.training.stage import apply_stage, part_of
from tests.tiny_model import HIDDEN, INTERMEDIATE, TINY_MOE, tiny_config, tiny_model, tiny_moe, tiny_text_config

REPO = Path(__file__).parents[2]
FACTS = sorted((REPO / "scripts/recipes/configs").glob("*.json"))
EXPERT = 3 * HIDDEN * INTERMEDIATE
TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("moe", [None, TINY_MOE, tiny_moe(num_experts=[2, 6]), tiny_moe(shared={"num": 1})])
@pytest.mark.parametrize("vision", ["siglip", "clip", "timm"])
def test_counts_of_a_real_model(moe: dict[str, Any] | None, vision: str) -> None:
    real, empty = tiny_model(moe, vision=vision), model_on_meta(tiny_config(moe, vision=vision))
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in empty.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())
    stage = StageSection("test", {"projector": 1e-3, "decoder": 1e-3})
    apply_stage(real, stage)
    apply_stage(empty, stage)
    counts = count(empty, part_of)
    assert counts == count(real, part_of)
    assert {"total": counts.total, "active": counts.active} == count_parameters(real)
    assert counts.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    for part, found in counts.parts.items():
        members = [p for name, p in real.named_parameters() if part_of(name) == part]
        assert found.total == sum(p.numel() for p in members)
        assert found.trainable == sum(p.numel() for p in members if p.requires_grad)


def test_active_parameters_by_hand() -> None:
    dense, sparse = (count(model_on_meta(tiny_config(moe)), part_of) for moe in (None, TINY_MOE))
    # two layers of four experts, two of which a token meets, and a router of 4 x 32 each
    assert sparse.total - dense.total == 2 * (3 * EXPERT + 4 * HIDDEN)
    assert sparse.active - dense.active == 2 * (EXPERT + 4 * HIDDEN)
    assert sparse.parts["experts"].total == 2 * 4 * EXPERT
    assert sparse.parts["experts"].active == 2 * 2 * EXPERT


@pytest.mark.parametrize("text", ["mixtral", "qwen3_moe"])
def test_decoders_with_experts_of_their_own(text: str) -> None:
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    experts = {"num_local_experts": 4} if text == "mixtral" else {"num_experts": 4, "norm_topk_prob": True}
    raw = {k: v for k, v in tiny_text_config("mistral").to_dict().items() if k in TEXT_KEYS}
    config = tiny_config(text_config=AutoConfig.for_model(text, **raw, **sizes, **experts))
    model = model_on_meta(config)
    counts = count(model, part_of)
    assert {"total": counts.total, "active": counts.active} == count_parameters(model)
    assert counts.parts["experts"].active * 2 == counts.parts["experts"].total
    apply_stage(model, StageSection("test", {"experts": 1e-3, "router": 1e-3}))
    one, two = (estimate(model, Setup(micro_batch=batch, sequence_length=64)) for batch in (1, 2))
    assert two.activations == 2 * one.activations > 0
    active = sum(counts.parts[part].active for part in ("decoder", "experts", "router"))
    assert flops(model, 64).decoder == pytest.approx(2 * active, rel=0.02)


def test_tied_embeddings_count_once() -> None:
    text = tiny_config().text_config
    text.tie_word_embeddings = True
    config = tiny_config(text_config=text, tie_word_embeddings=True)
    tied, untied = (count(model_on_meta(c), part_of) for c in (config, tiny_config()))
    assert untied.total - tied.total == text.vocab_size * HIDDEN
    assert "embeddings" in tied.parts


def test_found_the_facts() -> None:
    assert len(FACTS) >= 15


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_known_models_have_their_published_size(path: Path) -> None:
    """The values in scripts/recipes/configs, held against the parameter counts of the models."""
    raw = json.loads(path.read_text())
    assert raw["source"].startswith("https://")
    values = {key: value for key, value in raw["config"].items() if key != "model_type"}
    config = AutoConfig.for_model(raw["config"]["model_type"], **values)
    assert all(getattr(config, key) == value for key, value in values.items())
    kind = AutoModelForCausalLM if "vocab_size" in values else AutoModel
    with torch.device("meta"), no_init_weights():
        model = kind.from_config(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == raw["parameters"]


@pytest.mark.parametrize("moe", [None, tiny_moe(experts={"name": "stacked", "args": {"kernel": "loop"}})])
def test_operations_are_those_that_torch_counts(moe: dict[str, Any] | None) -> None:
    model, tokens = tiny_model(moe), 64
    model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    ids = torch.randint(5, 100, (1, tokens))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    work = flops(model, tokens)
    # torch counts full attention where ours is causal
    found = work.sequence(tokens, tokens, images=0) + tokens * work.attention
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("vision", ["siglip", "clip", "timm"])
def test_operations_of_a_tower(vision: str) -> None:
    model = tiny_model(vision=vision)
    tower, size = model.model.vision_tower, model.config.vision_config.image_size
    if vision != "timm":
        tower.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(1, 3, size, size), output_hidden_states=True)
    found = tower_flops(tower, model.config.vision_feature_layer)
    # CLIP's class token is one position more than the grid of four
    assert found == pytest.approx(counter.get_total_flops(), rel=0.35 if vision == "clip" else 0.02)


def test_a_picture_costs_nothing_behind_its_features() -> None:
    tower = tiny_model().model.vision_tower
    assert tower_flops(tower, -2) < tower_flops(tower, -1)
