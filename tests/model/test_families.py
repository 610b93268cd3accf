"""Dense checkpoint -> upcycled checkpoint -> answers, through the files, for decoders of many families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_moe.config import NamedSection, PartSection, UpcycleSection
from llava_moe.model.assemble import load_model
from llava_moe.model.upcycling import upcycle
from tests.model.inputs import greedy, logits_of, picture_batch, prompt_batch
from tests.model.test_sites import FAMILIES
from tests.tiny_model import TINY_MOE, tiny_model, write_tiny_checkpoint


def both(tmp_path: Path, text: str, **section: Any) -> tuple[Any, Any, Path]:
    parent = write_tiny_checkpoint(tmp_path / "dense", text=text)
    out = tmp_path / "upcycled"
    values: dict[str, Any] = {"num_experts": 4, "router": NamedSection("top_k", {"k": 2}), **section}
    upcycle(UpcycleSection(parent=str(parent), decoder=PartSection(**values)), out)
    return load_model(parent), load_model(out), out


@pytest.mark.parametrize("text", FAMILIES)
def test_upcycled_model_is_its_dense_parent(tmp_path: Path, text: str) -> None:
    dense, sparse, _ = both(tmp_path, text)
    assert dense.config.moe is None
    assert sparse.config.moe["decoder"]["layers"] == [0, 2]
    batch = picture_batch(dense, batch=3, length=20)
    expected = logits_of(dense, **batch)
    assert float(expected.std()) > 0.1, "logits of a trivial model would prove nothing"
    assert float((logits_of(sparse, **batch) - expected).abs().max()) <= 1e-5
    prompts = prompt_batch(dense, batch=3)
    assert greedy(sparse, **prompts) == greedy(dense, **prompts)


# one family for each pattern of children, and one without SDPA
@pytest.mark.parametrize("text", ["llama", "phi3", "phi", "gpt_neox", "nemotron", "starcoder2", "gemma2"])
@pytest.mark.parametrize("original_format", [False, True])
def test_save_and_load_is_bit_equal(tmp_path: Path, text: str, original_format: bool) -> None:
    model = tiny_model(TINY_MOE, text=text)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    other = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(other) is type(model)
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    prompts = prompt_batch(model)
    assert torch.equal(logits_of(model, **prompts), logits_of(other, **prompts))
    assert greedy(other, **prompts) == greedy(model, **prompts)


@pytest.mark.parametrize(
    "section",
    [
        {"layers": "all"},
        {"experts": NamedSection("stacked", {"kernel": "loop"})},
        {"num_experts": 1, "router": NamedSection("top_k", {"k": 1})},
    ],
    ids=["all-layers", "loop", "one-expert"],
)
def test_other_ways_to_upcycle_are_exact_too(tmp_path: Path, section: dict[str, Any]) -> None:
    dense, sparse, _ = both(tmp_path, "llama", **section)
    batch = picture_batch(dense)
    assert float((logits_of(sparse, **batch) - logits_of(dense, **batch)).abs().max()) <= 1e-5


@pytest.mark.parametrize("vision", ["clip", "timm"])
def test_other_towers(tmp_path: Path, vision: str) -> None:
    parent = write_tiny_checkpoint(tmp_path / "dense", vision=vision)
    upcycle(UpcycleSection(parent=str(parent), decoder=PartSection()), tmp_path / "upcycled")
    dense, sparse = load_model(parent), load_model(tmp_path / "upcycled")
    batch = picture_batch(dense)
    changed = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert float((logits_of(sparse, **batch) - logits_of(dense, **batch)).abs().max()) <= 1e-5
    assert float((logits_of(dense, **changed) - logits_of(dense, **batch)).abs().max()) > 1e-3, "the picture matters"


def test_tied_word_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny_model(TINY_MOE, text="qwen2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for original_format in (False, True):
        model.save_pretrained(tmp_path / str(original_format), save_original_format=original_format)
        other = load_model(tmp_path / str(original_format))
        assert other.lm_head.weight is other.get_input_embeddings().weight
        assert torch.equal(other.lm_head.weight, model.lm_head.weight)
