"""Packed batches equal unpacked ones: the loss, every gradient, every balance term; dense and MoE."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava_moe.data.collator import Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.indexed import exact_lengths
from llava_moe.data.packing import PackedDataset, PackingCollator, plan_packs, useful_share
from llava_moe.data.sampler import length_grouped_order
from llava_moe.data.schema import DataError
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.model.packing import check_packing, packed_layout
from llava_moe.moe import BALANCE_LOSSES
from llava_moe.training.objective import balance_terms, combine
from tests.tiny import tiny_siglip_processor, write_llava_json
from tests.tiny_families import family_model, family_processor, write_mixed_json
from tests.tiny_model import TINY_MOE, tiny_model, tiny_moe

PROCESSOR = tiny_siglip_processor()
LOSSES = {name: BALANCE_LOSSES.get(name).build({}) for name in ("switch", "sequence", "z")}
COEFFICIENTS = {"switch": 0.5, "sequence": 0.7, "z": 0.1}
NAMED = {"dense": None, "moe": TINY_MOE}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Seven samples of different lengths: with one image, with two, and without."""
    folder = tmp_path_factory.mktemp("data")
    source = write_llava_json(folder, 5, text_only_every=3)
    longer = write_llava_json(folder / "more", 2, num_turns=3)
    data = ConversationDataset([source, longer], PROCESSOR, max_length=512)
    found = [data[i] for i in range(len(data))]
    two = {**found[0], "sample_id": "two"}
    for key in ("input_ids", "labels", "pixel_values"):
        two[key] = torch.cat([found[0][key], found[3][key]])
    return [*found[:2], two, *found[2:]]


def packs_of(items: list[dict[str, Any]], *sizes: int) -> list[list[dict[str, Any]]]:
    bounds = np.cumsum([0, *sizes])
    assert bounds[-1] == len(items)
    return [items[a:b] for a, b in pairwise(bounds)]


def collate(packs: list[list[dict[str, Any]]], flat: bool = False, varlen: bool = False) -> dict[str, Any]:
    return PackingCollator(Collator.of(PROCESSOR), PROCESSOR.pad_token_id, flat, varlen)(packs)


def step(model: LlavaMoeForConditionalGeneration, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of the objective, and the gradient of its total for every parameter."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, loss_only=True, use_cache=False)
    terms = {}
    if output.routings is not None:
        terms = balance_terms(output.routings, model.model.scope, LOSSES)
    objective = combine(output.loss, terms, COEFFICIENTS, accumulation_steps=1, world_size=1)
    objective.total.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return objective.parts, grads


def assert_same(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    parts, grads = one
    other_parts, other_grads = other
    assert parts.keys() == other_parts.keys()
    for name in parts:
        torch.testing.assert_close(parts[name], other_parts[name], rtol=tolerance, atol=tolerance, msg=name)
    assert sum(bool(g.abs().max() > 1e-3) for g in grads.values()) > 20  # there is something to compare
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", NAMED)
def test_loss_and_gradients_equal_those_of_the_unpacked_batch(
    kind: str, attention: str, flat: bool, items: list[dict[str, Any]]
) -> None:
    model = tiny_model(NAMED[kind])
    model.set_attn_implementation({"text_config": attention})
    model.train()
    unpacked = step(model, Collator.of(PROCESSOR)(items))
    assert_same(step(model, collate(packs_of(items, 3, 5), flat)), unpacked)


@pytest.mark.parametrize("text", ["qwen3", "gemma2", "mistral", "gpt_neox", "phi3"])
def test_other_decoders(text: str, items: list[dict[str, Any]]) -> None:
    """Gemma 2 has a sliding window of 16 tokens, shorter than most samples."""
    model = tiny_model(TINY_MOE, text).train()
    unpacked = step(model, Collator.of(PROCESSOR)(items))
    assert_same(step(model, collate(packs_of(items, 4, 4))), unpacked)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_stay_with_their_sample(family: str, tmp_path: Path) -> None:
    """One, two and no images of different sizes in a sample."""
    processor = family_processor(family)
    data = ConversationDataset([write_mixed_json(tmp_path)], processor, max_length=512)
    samples = [data[i] for i in range(6)]
    model = family_model(family, TINY_MOE, processor).train()
    collator = Collator.of(processor)
    unpacked = step(model, collator(samples))
    for flat in (False, True):
        packing = PackingCollator(collator, processor.pad_token_id, flat)
        assert_same(step(model, packing(packs_of(samples, 4, 2))), unpacked)


def test_checkpointing_recomputes_the_same(items: list[dict[str, Any]]) -> None:
    model = tiny_model(TINY_MOE).train()
    unpacked = step(model, Collator.of(PROCESSOR)(items))
    model.gradient_checkpointing_enable()
    assert_same(step(model, collate(packs_of(items, 3, 5))), unpacked)


@pytest.mark.parametrize(
    ("router", "args"),
    [("top_k", {"k": 1}), ("deepseek_v3", {"k": 2}), ("hash", {}), ("expert_choice", {}), ("modality", {})],
)
def test_routers_that_look_at_more_than_a_token(router: str, args: dict[str, Any], items: list[dict[str, Any]]) -> None:
    options = {"allow_noncausal": True} if router == "expert_choice" else {}
    model = tiny_model(tiny_moe(router={"name": router, "args": args}, **options)).train()
    unpacked = step(model, Collator.of(PROCESSOR)(items))
    assert_same(step(model, collate(packs_of(items, 3, 5))), unpacked)


def test_a_capacity_drops_the_same_tokens(items: list[dict[str, Any]]) -> None:
    model = tiny_model(tiny_moe(capacity={"factor": 0.6})).train()
    unpacked = step(model, Collator.of(PROCESSOR)(items))
    assert_same(step(model, collate(packs_of(items, 3, 5))), unpacked)


def test_the_sequence_loss_would_differ_without_sequence_ids(items: list[dict[str, Any]]) -> None:
    model = tiny_model(TINY_MOE).train()
    batch = collate([items])
    right = step(model, batch)[0]
    wrong = step(model, {k: v for k, v in batch.items() if k != "sequence_ids"})[0]
    torch.testing.assert_close(right["cross_entropy"], wrong["cross_entropy"])
    assert (right["sequence"] - wrong["sequence"]).abs() > 1e-3


def test_a_sample_never_sees_its_neighbours(items: list[dict[str, Any]]) -> None:
    """Another first sample, of the same length, changes no logit and no gradient of the second."""
    model = tiny_model(TINY_MOE)
    other = {**items[1], "input_ids": items[1]["input_ids"].flip(0)}
    other["pixel_values"] = items[4]["pixel_values"]
    length = len(items[1]["input_ids"])
    for second in (items[0], items[2], items[3]):
        logits = [model(**collate([[first, second]])).logits[0, length:] for first in (items[1], other)]
        assert torch.equal(logits[0], logits[1])
        alone = model(input_ids=second["input_ids"][None], pixel_values=second.get("pixel_values")).logits[0]
        torch.testing.assert_close(logits[0], alone, rtol=1e-5, atol=1e-5)
    embeds = model.get_input_embeddings()(collate([[items[3], items[3]]])["input_ids"]).detach().requires_grad_()
    batch = collate([[items[3], items[3]]])
    half = len(items[3]["input_ids"])
    decoder = tiny_model().model.language_model  # dense: it is called without its routing context
    hidden = decoder(inputs_embeds=embeds, position_ids=batch["position_ids"], use_cache=False)
    hidden.last_hidden_state[0, half:].sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[0, :half].eq(0).all()
    assert embeds.grad[0, half:].abs().sum() > 0


def test_the_batch(items: list[dict[str, Any]]) -> None:
    packs = packs_of(items, 2, 6)
    batch = collate(packs)
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    for row, pack in enumerate(packs):
        start = 0
        for number, item in enumerate(pack):
            end = start + len(item["input_ids"])
            assert batch["input_ids"][row, start:end].equal(item["input_ids"])
            assert batch["labels"][row, start] == -100
            assert batch["labels"][row, start + 1 : end].equal(item["labels"][1:])
            assert batch["position_ids"][row, start:end].tolist() == list(range(end - start))
            assert batch["sequence_ids"][row, start:end].eq(number).all()
            start = end
        padding = batch["input_ids"].shape[1] - start
        assert batch["sequence_ids"][row, start:].tolist() == [-1] * padding
        assert batch["position_ids"][row, start:].tolist() == list(range(padding))
        assert (batch["labels"][row, start:] == -100).all()
    tokens = sum(len(item["input_ids"]) for item in items)
    assert useful_share(batch) == pytest.approx(tokens / batch["input_ids"].numel())
    images = [item["pixel_values"] for item in items if "pixel_values" in item]
    assert batch["pixel_values"].equal(torch.cat(images))
    unpacked = Collator.of(PROCESSOR)(items)
    assert useful_share(unpacked) == pytest.approx(tokens / unpacked["input_ids"].numel())
    shifted = (batch["labels"][:, 1:] != -100).sum()  # what the Trainer divides by
    assert shifted == (unpacked["labels"][:, 1:] != -100).sum()


def test_a_text_only_pack_still_feeds_the_tower(items: list[dict[str, Any]]) -> None:
    text = [item for item in items if "pixel_values" not in item]
    batch = collate([text * 2])
    assert batch["pixel_values"].shape[0] == 1
    assert step(tiny_model(TINY_MOE).train(), batch)[0]["cross_entropy"].isfinite()


def test_boundaries_for_the_kernel_for_unequal_lengths(items: list[dict[str, Any]]) -> None:
    lengths = [len(item["input_ids"]) for item in items]
    flat = collate(packs_of(items, 3, 5), flat=True, varlen=True)
    assert flat["input_ids"].shape[0] == 1
    assert flat["cu_seq_lens_q"].tolist() == flat["cu_seq_lens_k"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert flat["max_length_q"] == flat["max_length_k"] == max(lengths)
    assert flat["cu_seq_lens_q"].dtype == torch.int32
    rows = collate(packs_of(items, 3, 5), varlen=True)
    assert rows["cu_seq_lens_q"][-1] == rows["input_ids"].numel()  # padding is a sequence too
    flash = PackingCollator.for_attention(None, 0, "flash_attention_2")
    assert (flash.flat, flash.varlen) == (True, True)
    assert not PackingCollator.for_attention(None, 0, "sdpa").flat


def test_the_varlen_boundaries_reach_the_attention_function(
    items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention is absent on a CPU; a stand-in of its interface computes each sequence by itself."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    sdpa = nn.functional.scaled_dot_product_attention

    def varlen(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if mask is not None:  # an unpacked batch with padding on the right
            return sdpa(q, k, v, is_causal=True, scale=scaling).transpose(1, 2), None
        bounds = kwargs["cu_seq_lens_q"].tolist()
        seen.append(max(b - a for a, b in pairwise(bounds)) == kwargs["max_length_q"])
        parts = [
            sdpa(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=scaling) for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("stand_in_varlen", varlen)
    ALL_MASK_ATTENTION_FUNCTIONS.register("stand_in_varlen", flash_attention_mask)
    model = tiny_model(TINY_MOE).train()
    unpacked = step(model, Collator.of(PROCESSOR)(items))
    model.set_attn_implementation({"text_config": "stand_in_varlen"})
    assert_same(step(model, collate(packs_of(items, 3, 5), flat=True, varlen=True)), unpacked)
    assert seen == [True] * 4  # layers
    assert check_packing(model, flat=True, varlen=True) < 1e-5


def test_packing_is_measured_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for section in (None, TINY_MOE):
        model = tiny_model(section).train()
        assert check_packing(model) < 1e-5
        assert check_packing(model, flat=True) < 1e-5
        assert model.training
    soft = tiny_model(tiny_moe(router={"name": "soft_moe", "args": {}}, allow_noncausal=True))
    with pytest.raises(ValueError, match="does not keep packed samples apart under sdpa attention"):
        check_packing(soft)
    model = tiny_model()
    model.set_attn_implementation({"text_config": "sdpa"})
    stock = model.model.language_model.forward

    def without_positions(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **{**kwargs, "position_ids": None})

    monkeypatch.setattr(model.model.language_model, "forward", without_positions)
    with pytest.raises(ValueError, match="turn packing off"):
        check_packing(model)


def test_a_call_that_would_mix_samples_is_refused(items: list[dict[str, Any]]) -> None:
    model = tiny_model()
    batch = collate([items])
    with pytest.raises(ValueError, match="must have no attention_mask"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    with pytest.raises(ValueError, match="cannot use a cache"):
        model(**batch, use_cache=True)
    with pytest.raises(ValueError, match="needs position_ids of the shape"):
        model(**{key: value for key, value in batch.items() if key != "position_ids"})


def test_the_layout_that_the_experts_see() -> None:
    ids = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1]])
    mask, number = packed_layout(ids)
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert number.tolist() == [[0, 0, 1, 2], [3, 4, 4, 4]]


@pytest.mark.parametrize("seed", range(3))
def test_packs_hold_every_sample_once_and_waste_little(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(5.5, 0.8, 2000).astype(int).clip(8, 2048)
    plan = plan_packs(lengths, 2048, seed)
    assert sorted(i for pack in plan.packs for i in pack) == list(range(2000))
    assert [int(lengths[list(pack)].sum()) for pack in plan.packs] == list(plan.lengths)
    assert max(plan.lengths) <= 2048
    assert plan.share >= 0.95
    assert plan == plan_packs(lengths, 2048, seed)
    assert plan != plan_packs(lengths, 2048, seed + 1)
    in_order = [lengths[i : i + 8] for i in range(0, 2000, 8)]
    assert sum(map(sum, in_order)) / sum(8 * max(rows) for rows in in_order) < 0.5  # what padding would give


def test_plans_at_the_edge() -> None:
    assert plan_packs([], 10).packs == ()
    assert plan_packs([10, 10], 10).lengths == (10, 10)
    assert plan_packs([1] * 10, 10).lengths == (10,)
    assert plan_packs([7, 3, 6, 4], 10).share == 1.0
    with pytest.raises(DataError, match="sample 1 has 11 tokens, which fit no row of 10"):
        plan_packs([3, 11], 10)
    with pytest.raises(DataError, match="sample 0 has 0 tokens"):
        plan_packs([0], 10)


def test_a_data_set_of_packs(tmp_path: Path) -> None:
    source = write_llava_json(tmp_path, 12, text_only_every=4, num_turns=2)
    data = ConversationDataset([source], PROCESSOR, max_length=128)
    packed = PackedDataset(data, exact_lengths(data), 128, seed=1)
    names = [item["sample_id"] for number in range(len(packed)) for item in packed[number]]
    assert sorted(names) == sorted(f"sample-{i}" for i in range(12))
    assert [sum(len(i["input_ids"]) for i in packed[n]) for n in range(len(packed))] == packed.lengths
    report = packed.report()
    assert report["packs"] == len(packed) < 12
    assert report["pack_fill"] == round(sum(packed.lengths) / (128 * len(packed)), 4)
    assert report["used"] == 12
    again = PackedDataset(data, exact_lengths(data), 128, seed=1)
    assert again.plan == packed.plan
    short = exact_lengths(data) - 1
    with pytest.raises(DataError, match="were measured with another processor"):
        PackedDataset(data, short, 128)[0]
    with pytest.raises(DataError, match="3 lengths for 12 samples"):
        PackedDataset(data, [1, 2, 3], 128)


@pytest.mark.parametrize("batch", [2, 4])
def test_nearly_every_token_of_a_step_is_useful(batch: int) -> None:
    """Samples as in mix665k, 576 tokens of an image in most: the hardest case, as three hardly fit into 2048."""
    generator = np.random.default_rng(0)
    text = generator.lognormal(5.0, 0.9, 4000).astype(int).clip(8, 1400)
    lengths = text + np.where(generator.random(4000) < 0.94, 576, 0)
    packs = plan_packs(lengths, 2048).lengths
    order = length_grouped_order(packs, batch, torch.Generator().manual_seed(0))
    steps = [[packs[i] for i in order[start : start + batch]] for start in range(0, len(order), batch)]
    assert sum(packs) / sum(batch * max(step) for step in steps) >= 0.95
    alone = [lengths[start : start + 16] for start in range(0, 4000, 16)]
    assert lengths.sum() / sum(16 * step.max() for step in alone) < 0.6  # random batches of single samples
