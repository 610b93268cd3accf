"""Tower + projector + decoder directories -> a first model; and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from llava_moe.config import ModelSection
from llava_moe.model.assemble import Assembled, assemble, load_model
from llava_moe.model.vision import TimmTower, timm_tower_config
from llava_moe.model_card import _architecture
from tests.model.inputs import NUM_WORDS, logits_of, picture_batch
from tests.tiny import tiny_tokenizer
from tests.tiny_model import tiny_text_config, tiny_vision_config


def write_decoder(path: Path, text: str = "llama", vocab_size: int | None = None, **changes: Any) -> Path:
    torch.manual_seed(1)
    config = tiny_text_config(text, vocab_size)
    for key, value in changes.items():
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `siglip`, `clip` (towers) and `llama` (decoder with tokenizer)."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    SiglipVisionModel(tiny_vision_config("siglip")).save_pretrained(folder / "siglip")
    CLIPVisionModel(tiny_vision_config("clip")).save_pretrained(folder / "clip")
    write_decoder(folder / "llama")
    return folder


def section(parts: Path, **changes: Any) -> ModelSection:
    values = {
        "vision_tower": str(parts / "siglip"),
        "language_model": str(parts / "llama"),
        "vision_feature_select_strategy": "full",
    }
    return ModelSection(**{**values, **changes})


def text_logits(model: Any) -> torch.Tensor:
    return logits_of(model, input_ids=torch.arange(20).unsqueeze(0))


def check_parts(found: Assembled, parts: Path, tower_class: Any, tower: str) -> None:
    """Every weight of tower and decoder is in its place."""
    decoder = AutoModelForCausalLM.from_pretrained(parts / "llama")
    assert torch.equal(text_logits(found.model), text_logits(decoder))
    expected = tower_class.from_pretrained(parts / tower).state_dict()
    mine = found.model.model.vision_tower.state_dict()
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in mine)


def test_siglip_and_llama(parts: Path, tmp_path: Path) -> None:
    found = assemble(section(parts))
    check_parts(found, parts, SiglipVisionModel, "siglip")
    config = found.model.config
    assert found.num_additional_image_tokens == 0
    assert (config.image_seq_length, config.vision_feature_layer, config.projector) == (4, -2, "mlp2x_gelu")
    assert config.image_token_id == found.tokenizer.convert_tokens_to_ids("<image>")
    batch = picture_batch(found.model)
    found.model.save_pretrained(tmp_path, save_original_format=True)
    assert torch.equal(logits_of(load_model(tmp_path), **batch), logits_of(found.model, **batch))


def test_clip_drops_its_class_token(parts: Path) -> None:
    changes = {"vision_tower": str(parts / "clip"), "vision_feature_select_strategy": "default"}
    found = assemble(section(parts, **changes))
    check_parts(found, parts, CLIPVisionModel, "clip")
    assert found.num_additional_image_tokens == 1
    assert found.model.config.image_seq_length == 4
    kept = assemble(section(parts, **{**changes, "vision_feature_select_strategy": "full"}))
    assert kept.model.config.image_seq_length == 5


def test_the_tower_of_a_whole_siglip(parts: Path, tmp_path: Path) -> None:
    """The text half and the pooling head of the files stay behind."""
    vision = {**tiny_vision_config("siglip").to_dict(), "vision_use_head": True}
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    whole.save_pretrained(tmp_path)
    found = assemble(section(parts, vision_tower=str(tmp_path)))
    source = whole.vision_model.state_dict()
    mine = found.model.model.vision_tower.state_dict()
    assert mine
    assert not any("head." in name for name in mine)
    assert all(torch.equal(value, source[name]) for name, value in mine.items())


def test_picture_embeddings_start_at_the_scale_of_words(parts: Path) -> None:
    model = assemble(section(parts)).model
    noise = torch.randn(8, 3, 16, 16)
    pictures = torch.stack(list(model.model.get_image_features(pixel_values=noise, return_dict=True).pooler_output))
    ratio = float((pictures.std() / model.get_input_embeddings().weight.std()).detach())
    assert 0.7 < ratio < 1.4


def test_the_seed_decides_the_projector_and_nothing_else(parts: Path) -> None:
    models = [assemble(section(parts), seed=seed).model for seed in (0, 0, 1)]
    projectors = [model.model.multi_modal_projector.linear_1.weight for model in models]
    assert torch.equal(projectors[0], projectors[1])
    assert not torch.equal(projectors[0], projectors[2])
    assert torch.equal(text_logits(models[0]), text_logits(models[2]))


def test_image_token_is_added_and_other_special_tokens_are_kept(parts: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    decoder = write_decoder(tmp_path / "decoder", vocab_size=len(tokenizer) - 1)
    raw = json.loads((decoder / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<image>"]
    (decoder / "tokenizer.json").write_text(json.dumps(raw))
    settings = json.loads((decoder / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = ["<|im_start|>"]
    (decoder / "tokenizer_config.json").write_text(json.dumps(settings))
    before = text_logits(AutoModelForCausalLM.from_pretrained(decoder))

    found = assemble(section(parts, language_model=str(decoder)))
    assert {"<image>", "<|im_start|>"} <= set(found.tokenizer.all_special_tokens)
    rows = found.model.get_input_embeddings().weight.shape[0]
    assert rows == found.model.lm_head.weight.shape[0] == found.model.config.text_config.vocab_size
    assert rows % 64 == 0
    growth = {"tokens": ["<image>"], "before": len(tokenizer) - 1, "after": rows}
    assert found.model.config.vocabulary_growth == growth
    assert assemble(section(parts)).model.config.vocabulary_growth is None  # its tokenizer has the token
    found.model.save_pretrained(tmp_path / "saved")
    assert f"{len(tokenizer) - 1} rows grown to {rows}, with <image>" in str(
        _architecture(tmp_path / "saved", json.loads((tmp_path / "saved" / "config.json").read_text()))
    )
    assert found.model.config.image_token_id == len(tokenizer) - 1
    assert torch.equal(text_logits(found.model)[..., : before.shape[-1]], before)
    assert (
        found.tokenizer.decode(found.tokenizer("<|im_start|>red<image>")["input_ids"], skip_special_tokens=True)
        == "red"
    )


@pytest.mark.parametrize("text", ["qwen2", "phi", "phi3", "gpt_neox", "starcoder2", "olmo2"])
def test_decoders_of_other_families_keep_their_logits(parts: Path, tmp_path: Path, text: str) -> None:
    decoder = write_decoder(tmp_path, text)
    model = assemble(section(parts, language_model=str(decoder))).model
    assert torch.equal(text_logits(model), text_logits(AutoModelForCausalLM.from_pretrained(decoder).eval()))


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}, {"logit_softcap": 3.0}),
        ("cohere", {"logit_scale": 0.0625}, {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
    ],
)
def test_what_decoders_do_to_their_logits_is_kept(
    parts: Path, tmp_path: Path, text: str, changes: dict[str, Any], expected: dict[str, float]
) -> None:
    """A soft cap or a scale behind the matrix becomes a key of our config; transformers' LLaVA would lose it."""
    decoder = write_decoder(tmp_path, text, **changes)
    model = assemble(section(parts, language_model=str(decoder))).model
    assert {key: getattr(model.config, key) for key in expected} == expected
    logits = text_logits(AutoModelForCausalLM.from_pretrained(decoder).eval())
    torch.testing.assert_close(text_logits(model), logits, rtol=1e-6, atol=1e-6)


def test_what_is_not_known_of_a_decoder_is_refused(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the logits that our head does not know would make another model of the decoder."""
    stock = LlamaForCausalLM.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        output.logits = output.logits + 1
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM changes its logits after the vocabulary projection \(by 1"):
        assemble(section(parts))


def test_tied_embeddings_are_tied(parts: Path, tmp_path: Path) -> None:
    decoder = write_decoder(tmp_path, tie_word_embeddings=True)
    model = assemble(section(parts, language_model=str(decoder))).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(text_logits(model), text_logits(AutoModelForCausalLM.from_pretrained(decoder)))


def timm_section(parts: Path, **changes: Any) -> ModelSection:
    return section(
        parts, vision_tower="timm:test_efficientnet", **{"image_size": 64, "vision_feature_layer": -1, **changes}
    )


def test_timm_tower_from_its_weights(parts: Path, tmp_path: Path) -> None:
    tower = TimmTower(timm_tower_config("test_efficientnet", 64))
    weights = {name: value.contiguous() for name, value in tower.backbone.state_dict().items()}
    file = tmp_path / "weights.safetensors"
    save_file({**weights, "classifier.weight": torch.zeros(10, 256), "classifier.bias": torch.zeros(10)}, file)
    found = assemble(timm_section(parts, vision_weights=str(file)))
    mine = found.model.model.vision_tower.backbone.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in weights.items())
    assert (found.model.config.image_seq_length, found.num_additional_image_tokens) == (4, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": None, "random_weights": True}, r"model\.image_size must be set for a timm tower"),
        ({}, r"model\.vision_weights must name the safetensors of test_efficientnet"),
        ({"random_weights": True, "vision_feature_layer": -2}, r"vision_feature_layer=-2: .* has 1 feature layers"),
        ({"random_weights": True, "vision_tower": "timm:tset_efficientnet"}, "timm has no model 'tset_efficientnet'"),
    ],
)
def test_timm_errors(parts: Path, changes: dict[str, Any], message: str) -> None:
    changed = timm_section(parts)
    for key, value in changes.items():
        setattr(changed, key, value)
    with pytest.raises(ValueError, match=message):
        assemble(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language_model": None}, "name a checkpoint, or a vision_tower and a language_model"),
        ({"vision_tower": None}, "name a checkpoint, or a vision_tower and a language_model"),
        ({"language_model": "./nowhere"}, r"model\.language_model=\./nowhere: "),
        ({"vision_tower": "./nowhere"}, r"model\.vision_tower=\./nowhere: "),
        (
            {"vision_feature_select_strategy": "default"},
            "default drops the first token as CLS, .* would lose a patch; use full",
        ),
        ({"vision_feature_select_strategy": "defualt"}, "=defualt: must be default or full"),
        ({"vision_feature_layer": -9}, "=-9: .* has 4 feature layers"),
        ({"vision_feature_layer": 4}, "=4: .* has 4 feature layers"),
        ({"projector": "mlp2x"}, "unknown projector 'mlp2x'; did you mean 'mlp2x_gelu'"),
    ],
)
def test_errors(parts: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(section(parts, **changes))


def test_random_weights_only_on_request(parts: Path) -> None:
    random = assemble(section(parts, random_weights=True)).model
    assert not torch.equal(text_logits(random), text_logits(assemble(section(parts)).model))
    assert logits_of(random, input_ids=torch.randint(0, NUM_WORDS, (1, 5))).isfinite().all()
