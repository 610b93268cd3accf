"""Stages: every parameter in one part, the right ones frozen, the right rates."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from llava_moe.config import StageSection
from llava_moe.model.assemble import load_model
from llava_moe.training import runner
from llava_moe.training.stage import _PARTS, LORA, apply_stage, count_trainable, part_of, resolve_bf16
from tests.tiny import write_llava_json
from tests.tiny_model import TINY_MOE, tiny_model, tiny_moe, tiny_processor
from tests.training.runs import MOE_PARTS, make_config

PARTS = set(_PARTS) - {LORA}  # adapters are put in by a recipe; no checkpoint has any
ALL = dict.fromkeys((part for part in _PARTS if part in PARTS), 1e-3)


@pytest.mark.parametrize("text", ["llama", "qwen3", "phi3", "gpt_neox"])
@pytest.mark.parametrize("vision", ["siglip", "clip", "timm"])
def test_every_parameter_is_in_exactly_one_part(text: str, vision: str) -> None:
    model = tiny_model(TINY_MOE if text != "gpt_neox" else None, text, vision)
    parts = Counter(part_of(name) for name, _ in model.named_parameters())
    expected = PARTS if text != "gpt_neox" else PARTS - {"router", "experts"}
    assert set(parts) == expected
    stage = StageSection(name="all", learning_rates=dict.fromkeys(expected, 1e-3))
    groups = apply_stage(model, stage)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"parameter model\.resampler\.weight belongs to no known part"):
        part_of("model.resampler.weight")


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"projektor": 1e-3}, "has no part 'projektor'; did you mean 'projector'"),
        ({}, "learning_rates is empty"),
        ({"projector": 1e-3, "experts": 1e-3, "router": 1e-3}, "trains experts, router, which this checkpoint"),
    ],
)
def test_wrong_stages_are_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_stage(tiny_model(), StageSection(name="bad", learning_rates=rates))


def test_a_router_with_nothing_to_learn_is_told_apart_from_a_missing_one() -> None:
    model = tiny_model(tiny_moe(router={"name": "random", "args": {"k": 2}}))
    with pytest.raises(ValueError, match="but RandomRouter has nothing that learns; leave router out of stage"):
        apply_stage(model, StageSection(name="moe", learning_rates={"experts": 1e-3, "router": 1e-3}))
    assert apply_stage(model, StageSection(name="moe", learning_rates={"experts": 1e-3}))


def test_groups_have_rates_and_decay() -> None:
    model = tiny_model(TINY_MOE)
    stage = StageSection(name="s", learning_rates={"projector": 1e-3, "decoder": 2e-4}, weight_decay=0.1)
    groups = apply_stage(model, stage)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == stage.learning_rates[part_of(names[id(parameter)])]
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(1e-3, 0.1), (1e-3, 0.0), (2e-4, 0.1), (2e-4, 0.0)}
    assert count_trainable(model) == sum(p.numel() for g in groups for p in g["params"])


@pytest.mark.parametrize(
    ("vision", "layer"), [("timm", -1), *((v, i) for v in ("siglip", "clip") for i in (-1, -2, 2, 3))]
)
def test_the_tower_trains_what_the_feature_layer_uses_and_no_more(vision: str, layer: int) -> None:
    """Judged by the gradients: a trainable parameter without one would stall DDP, a frozen one with one is a loss."""
    model = tiny_model(vision=vision, vision_feature_layer=layer)
    apply_stage(model, StageSection(name="tower", learning_rates={"vision_tower": 1e-3}))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    processor = tiny_processor(vision)
    ids = torch.tensor([[model.config.image_token_id] * processor.num_image_tokens + [5, 6, 7]])
    pixels = torch.randn(1, *processor.image_shape)
    mask = torch.ones_like(ids)
    model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=ids).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and part_of(n) == "vision_tower"}
    assert trained == reached


def test_frozen_parts_stay_and_trained_parts_move(moe_checkpoint: Path, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in load_model(moe_checkpoint).named_parameters()}
    data = write_llava_json(tmp_path / "data", 4)
    for part in ("projector", "router", "experts", "decoder", "embeddings"):
        config = make_config(tmp_path / part, moe_checkpoint, data, stage={"learning_rates": {part: 1e-2}})
        after = dict(load_model(runner.train(config)).named_parameters())
        moved = {name for name, old in before.items() if not torch.equal(old, after[name])}
        assert moved, part
        assert moved == {name for name in before if part_of(name) == part}, part


def test_the_tower_can_be_trained(moe_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        moe_checkpoint,
        write_llava_json(tmp_path / "data", 4, text_only_every=2),
        stage={"learning_rates": {**MOE_PARTS, "vision_tower": 1e-3}},
    )
    before, after = load_model(moe_checkpoint), load_model(runner.train(config))
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    moved = {name for (name, old), new in pairs if not torch.equal(old, new)}
    tower = {name for name in moved if part_of(name) == "vision_tower"}
    assert tower
    assert not [name for name in tower if "encoder.layers.2" in name or "post_layernorm" in name]


def test_bf16_auto_asks_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_bf16(True) is True
    assert resolve_bf16(False) is False
    with pytest.raises(ValueError, match=re.escape("train.bf16='fasle': must be true, false or auto")):
        resolve_bf16("fasle")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=supported: answer)
        assert resolve_bf16("auto") is supported
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_bf16("auto") is True
