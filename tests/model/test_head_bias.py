"""A decoder whose vocabulary projection has a bias (Phi-2) stays what it is: assembled, saved, upcycled and trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llava_moe.config import ModelSection, PartSection, UpcycleSection
from llava_moe.model.assemble import assemble, load_model
from llava_moe.model.head import VocabularyProjection
from llava_moe.model.upcycling import upcycle
from tests.tiny import tiny_siglip_processor, tiny_tokenizer
from tests.tiny_model import tiny_config, tiny_text_config, tiny_vision_config

IDS = torch.arange(5, 21).unsqueeze(0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    """A tiny Phi-2 with a bias that is not zero, and a tower."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(tiny_text_config("phi"))
    nn.init.normal_(decoder.lm_head.bias)
    decoder.save_pretrained(folder / "lm")
    tiny_tokenizer().save_pretrained(folder / "lm")
    from transformers import SiglipVisionModel

    SiglipVisionModel(tiny_vision_config()).save_pretrained(folder / "tower")
    return ModelSection(
        vision_tower=str(folder / "tower"),
        vision_feature_select_strategy="full",
        language_model=str(folder / "lm"),
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_the_assembled_model_has_the_logits_of_its_decoder(parts: ModelSection, tmp_path: Path) -> None:
    model = assemble(parts).model
    stock = AutoModelForCausalLM.from_pretrained(str(parts.language_model)).eval()
    assert model.config.logit_bias
    assert torch.equal(logits(model), logits(stock))
    model.save_pretrained(tmp_path / "made", save_original_format=True)
    again = load_model(tmp_path / "made")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.lm_head.bias, stock.lm_head.bias)


def test_an_upcycled_one_equals_it_and_learns_its_bias(parts: ModelSection, tmp_path: Path) -> None:
    model = assemble(parts).model
    model.save_pretrained(tmp_path / "dense", save_original_format=True)
    tiny_siglip_processor().save_pretrained(tmp_path / "dense")
    section = UpcycleSection(parent=str(tmp_path / "dense"), decoder=PartSection(layers="alternate"))
    made = upcycle(section, tmp_path / "moe")
    assert made["exact"]
    sparse = load_model(tmp_path / "moe")
    assert float((logits(sparse) - logits(model)).abs().max()) < 1e-5
    loss = sparse.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, loss_only=True).loss
    loss.backward()
    assert float(sparse.lm_head.bias.grad.abs().sum()) > 0


def test_a_larger_vocabulary_keeps_the_bias(parts: ModelSection) -> None:
    model = assemble(parts).model
    before, rows = logits(model), model.lm_head.weight.shape[0]
    model.resize_token_embeddings(rows + 64)
    assert isinstance(model.lm_head, VocabularyProjection)
    assert model.lm_head.bias.shape[0] == rows + 64
    assert torch.equal(logits(model)[..., :rows], before)


def test_others_have_none() -> None:
    assert not tiny_config().logit_bias
    head = VocabularyProjection(4, 6, bias=True)
    with pytest.raises(ValueError, match="with a bias"):
        head.with_weight(nn.Linear(4, 6, bias=False))
