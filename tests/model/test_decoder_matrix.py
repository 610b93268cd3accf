"""Thirteen kinds of decoders inside our LLaVA class, dense and sparse, from their own checkpoints to answers.

Each decoder is written as a transformers checkpoint, assembled with a tower, upcycled, and tried through the files.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

from llava_moe.config import ModelSection, NamedSection, PartSection, UpcycleSection
from llava_moe.model.assemble import assemble, load_model
from llava_moe.model.formats.exporting import plan_export
from llava_moe.model.head import VocabularyProjection, logit_changes
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.upcycling import upcycle
from llava_moe.moe import BALANCE_LOSSES, MoELayer
from llava_moe.training.objective import balance_terms
from llava_moe.training.stage import part_of
from tests.model.inputs import gradients, greedy, logits_of, picture_batch, prompt_batch
from tests.tiny import tiny_tokenizer
from tests.tiny_model import tiny_processor, tiny_vision_config

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "attention_dropout": 0.0,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": True}
# name: model_type, values of its config; caps are low so that tiny logits feel them
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "vicuna": ("llama", {"tie_word_embeddings": False}),  # its vocabulary grows: no <image> in the tokenizer
    "mistral": ("mistral", {"head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"original_max_position_embeddings": 256}),
    "gemma2": ("gemma2", {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "no_rope_layer_interval": 2}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "granite": (
        "granite",
        {"tie_word_embeddings": True, "logits_scaling": 6.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
         "attention_multiplier": 0.2},
    ),
}  # fmt: skip
FORMS = ("dense", "moe")
CASES = [(name, form) for name in DECODERS for form in FORMS]
# decoders whose blocks and head are those of one that is tried in every run
_LIKE_OTHERS = ("mistral", "qwen3", "smollm2", "smollm3", "olmo2", "stablelm")
every_case = pytest.mark.parametrize(
    ("name", "form"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] in _LIKE_OTHERS else ()) for case in CASES],
)
TEXT = {"input_ids": torch.arange(20).unsqueeze(0)}


def decoder_config(name: str, **changes: Any) -> Any:
    model_type, values = DECODERS[name]
    tokenizer = tiny_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.pad_token_id}
    rows = len(tokenizer) - (name == "vicuna")
    return CONFIG_MAPPING[model_type](
        vocab_size=rows, eos_token_id=tokenizer.eos_token_id, **{**SIZES, **ids, **values, **changes}
    )


def write_decoder(folder: Path, name: str) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(decoder_config(name)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if name == "vicuna":
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<image>"]
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["extra_special_tokens"] = ["<|im_start|>"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@dataclass(frozen=True)
class Made:
    """The checkpoints of one decoder, and both models as they were loaded."""

    decoder: Path
    paths: dict[str, Path]
    models: dict[str, Any]
    facts: dict[str, Any]


_folder = tempfile.TemporaryDirectory()  # removed with the process


@functools.cache
def made(name: str) -> Made:
    """Written once for all steps; read-only."""
    folder = Path(tempfile.mkdtemp(dir=_folder.name))
    torch.manual_seed(0)
    SiglipVisionModel(tiny_vision_config()).save_pretrained(folder / "tower")
    decoder = write_decoder(folder / "decoder", name)
    section = ModelSection(
        vision_tower=str(folder / "tower"), language_model=str(decoder), vision_feature_select_strategy="full"
    )
    paths = {form: folder / form for form in FORMS}
    assembled = assemble(section).model
    assembled.save_pretrained(paths["dense"], save_original_format=True)
    tiny_processor().save_pretrained(paths["dense"])
    part = PartSection(layers=[0, 2], num_experts=4, router=NamedSection("top_k", {"k": 2}))
    facts = upcycle(UpcycleSection(parent=str(paths["dense"]), decoder=part), paths["moe"])
    return Made(decoder, paths, {form: load_model(path) for form, path in paths.items()}, facts)


def parted(name: str, form: str) -> Any:
    """A copy in training mode whose experts are no longer equal, so that the routing matters."""
    model = copy.deepcopy(made(name).models[form]).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                for parameter in layer.experts.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def test_the_matrix_is_whole() -> None:
    assert len(CASES) == 26
    assert len({model_type for model_type, _ in DECODERS.values()}) == 11
    steps = [value for key, value in globals().items() if key.startswith("test_") and hasattr(value, "pytestmark")]
    assert len(steps) == 8
    assert all(len(step.pytestmark[0].args[1]) == 26 for step in steps)


@every_case
def test_construct(name: str, form: str) -> None:
    model = made(name).models[form]
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    assert [layer.site for layer in layers] == ([] if form == "dense" else [("decoder", 0), ("decoder", 2)])
    config = decoder_config(name)
    assert model.config.text_config.model_type == config.model_type
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied is bool(config.tie_word_embeddings)
    rows = model.config.text_config.vocab_size
    assert rows == model.lm_head.weight.shape[0] == model.get_input_embeddings().weight.shape[0]
    assert rows == (config.vocab_size if name != "vicuna" else 64 * (config.vocab_size // 64 + 1))
    again = type(model)(model.config)
    assert again.state_dict().keys() == model.state_dict().keys()


@every_case
def test_forward(name: str, form: str) -> None:
    """On text the logits are those of the decoder's own class; a picture changes them."""
    found = made(name)
    model = found.models[form]
    expected = logits_of(AutoModelForCausalLM.from_pretrained(found.decoder).eval(), **TEXT)
    assert float(expected.std()) > 0.05, "logits of a trivial model would prove nothing"
    mine = logits_of(model, **TEXT)[..., : expected.shape[-1]]
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    batch = picture_batch(model)
    changed = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    difference = (logits_of(model, **changed) - logits_of(model, **batch)).abs()
    assert float(difference[:, 5:].max()) > 1e-3
    assert float(difference[:, 0].max()) < 1e-5, "the first token sees no picture"


@every_case
def test_upcycled_is_its_parent(name: str, form: str) -> None:
    found = made(name)
    dense, model = found.models["dense"], found.models[form]
    batch = picture_batch(dense, batch=3, length=20)
    expected = logits_of(dense, **batch)
    assert float((logits_of(model, **batch) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    prompts = prompt_batch(dense, batch=3)
    assert greedy(model, **prompts) == greedy(dense, **prompts)
    assert found.facts["exact"] is True
    assert found.facts["greedy_agreement"] == 1.0


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@every_case
def test_loss(name: str, form: str) -> None:
    """Both ways to compute it are the cross-entropy of the logits that the model returns."""
    model = made(name).models[form]
    batch = picture_batch(model)
    with torch.no_grad():
        whole, alone = model(**batch), model(**batch, loss_only=True)
    torch.testing.assert_close(whole.loss, cross_entropy(whole.logits, batch["labels"]))
    torch.testing.assert_close(alone.loss, whole.loss)
    assert alone.logits is None
    assert (whole.routings is None) == (form == "dense")


@every_case
def test_checkpointed_backward(name: str, form: str) -> None:
    """Gradients are those without checkpointing, and reach experts and routers from both losses."""
    found = []
    for checkpointing in (False, True):
        model = parted(name, form)
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = picture_batch(model)
        output = model(**batch, use_cache=False)
        total = output.loss
        if form == "moe":
            terms = balance_terms(
                output.routings, model.model.scope, {"switch": BALANCE_LOSSES.get("switch").build({})}
            )
            ours = [n for n, _ in model.named_parameters() if part_of(n) in ("router", "experts")]
            assert len(ours) == 6
            for loss, parts in ((output.loss, {"router", "experts"}), (terms["switch"], {"router"})):
                reached = torch.autograd.grad(
                    loss, [model.get_parameter(n) for n in ours], retain_graph=True, allow_unused=True
                )
                for n, gradient in zip(ours, reached, strict=True):
                    if part_of(n) in parts:
                        assert gradient is not None, n
                        assert float(gradient.abs().sum()) > 0, n
            total = total + 0.01 * terms["switch"]
        total.backward()
        found.append(gradients(model))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert {"embeddings", "decoder", "projector"} <= {part_of(n) for n in plain}
    for n, gradient in plain.items():
        torch.testing.assert_close(recomputed[n], gradient, rtol=1e-4, atol=1e-6)


@every_case
def test_generate(name: str, form: str) -> None:
    """Greedy answers with the cache are those of whole forwards."""
    model = parted(name, form).eval()
    prompts = prompt_batch(model)
    ids = prompts["input_ids"]
    for _ in range(4):
        whole = {**prompts, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, logits_of(model, **whole)[:, -1:].argmax(-1)], dim=1)
    length = prompts["input_ids"].shape[1]
    assert greedy(model, num_tokens=4, **prompts) == ids[:, length:].tolist()


@every_case
def test_save(name: str, form: str, tmp_path: Path) -> None:
    """What is written has the names of the checkpoint that the model came from, also after training's own format."""
    model = made(name).models[form]
    model.save_pretrained(tmp_path / "training")
    again = load_model(tmp_path / "training")
    again.save_pretrained(tmp_path / "final", save_original_format=True)
    names = [sorted(_tensors(folder)) for folder in (tmp_path / "final", made(name).paths[form])]
    assert names[0] == names[1]
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "final", made(name).paths[form])
    ]
    for key in ("logit_scale", "logit_softcap", "moe", "tie_word_embeddings", "model_type"):
        assert configs[0][key] == configs[1][key], key


def _tensors(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@every_case
def test_load_is_bit_equal(name: str, form: str, tmp_path: Path) -> None:
    model = parted(name, form).eval()
    model.save_pretrained(tmp_path, save_original_format=True)
    other = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    batch = picture_batch(model)
    assert torch.equal(logits_of(other, **batch), logits_of(model, **batch))


class TestLogits:
    """What decoders do to their logits after the projection."""

    CHANGED = ("gemma2", "granite")

    def test_which_decoders_change_them(self) -> None:
        found = {name: logit_changes(decoder_config(name)) for name in DECODERS}
        assert {name for name, changes in found.items() if changes} == set(self.CHANGED)
        assert found["gemma2"] == {"logit_softcap": 3.0}
        assert found["granite"] == {"logit_scale": pytest.approx(1 / 6)}
        assert logit_changes(CONFIG_MAPPING["cohere"](logit_scale=0.5)) == {"logit_scale": 0.5}

    @pytest.mark.parametrize("name", CHANGED)
    def test_a_stock_llava_does_nothing_and_stays_so(self, name: str, tmp_path: Path) -> None:
        """transformers' LLaVA ignores both; its checkpoints were trained so, and we load them as they are."""
        model = made(name).models["dense"]
        values = {key: value for key, value in model.config.to_dict().items() if key not in _OWN}
        stock = LlavaForConditionalGeneration(LlavaConfig(**values)).eval()
        stock.load_state_dict(model.state_dict())
        stock.save_pretrained(tmp_path)
        batch = picture_batch(model)
        bare = logits_of(stock, **batch)
        assert float((bare - logits_of(model, **batch)).abs().max()) > 0.1
        ours = load_model(tmp_path)
        assert (ours.config.logit_scale, ours.config.logit_softcap) == (None, None)
        assert torch.equal(logits_of(ours, **batch), bare)
        head = model.lm_head
        expected = bare * (head.scale or 1.0)
        if head.softcap is not None:
            expected = head.softcap * torch.tanh(expected / head.softcap)
        torch.testing.assert_close(logits_of(model, **batch), expected)

    @pytest.mark.parametrize("name", CHANGED)
    def test_an_export_would_lose_them(self, name: str) -> None:
        with pytest.raises(CheckpointError, match=r"logit_(scale|softcap)=.*, and transformers' LLaVA does not"):
            plan_export(made(name).paths["dense"])

    def test_they_outlive_a_resized_vocabulary(self) -> None:
        model = copy.deepcopy(made("gemma2").models["dense"])
        before = logits_of(model, **TEXT)
        model.resize_token_embeddings(before.shape[-1] + 8, mean_resizing=False)
        assert isinstance(model.lm_head, VocabularyProjection)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert torch.equal(logits_of(model, **TEXT)[..., : before.shape[-1]], before)
        assert float(before.abs().max()) < 3.0

    def test_the_head_is_a_linear_map_where_nothing_is_set(self) -> None:
        head, linear = VocabularyProjection(4, 6), nn.Linear(4, 6, bias=False)
        linear.load_state_dict(head.state_dict())
        x = torch.randn(3, 4)
        assert torch.equal(head(x), linear(x))
        with pytest.raises(ValueError, match="logit_softcap=0 must be a number above 0"):
            VocabularyProjection(4, 6, softcap=0)
        with pytest.raises(ValueError, match="without bias"):
            head.with_weight(nn.Linear(4, 6))

    @pytest.mark.parametrize("name", ["gemma2", "gemma3"])
    def test_pictures_start_at_the_scale_of_scaled_embeddings(self, name: str) -> None:
        """Gemma multiplies its embeddings inside of the module: the projector must start there."""
        model = made(name).models["dense"]
        noise = torch.randn(8, 3, 16, 16)
        pictures = torch.stack(list(model.model.get_image_features(pixel_values=noise, return_dict=True).pooler_output))
        words = model.get_input_embeddings()(torch.arange(400))
        assert float(words.std() / model.get_input_embeddings().weight.std()) == pytest.approx(32**0.5, rel=0.1)
        assert 0.7 < float((pictures.std() / words.std()).detach()) < 1.4


_OWN = (
    "model_type",
    "projector",
    "projector_args",
    "moe",
    "logit_scale",
    "logit_softcap",
    "logit_bias",
    "architectures",
)
