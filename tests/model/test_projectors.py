"""Every projector: token count, gradient, its way through a model, what is refused, and recipes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.mobilenetv3 import _make_divisible
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from llava_moe.config import ModelSection, RunConfig, StageSection
from llava_moe.model.assemble import assemble, load_model
from llava_moe.model.projectors import PROJECTORS, Projector
from llava_moe.model.projectors.ldp import _squeezed
from llava_moe.model.sites import mlp_spec
from llava_moe.training.dry_run import describe
from tests.model.inputs import greedy, logits_of
from tests.model.projector_cases import (
    ALL,
    CASES,
    CHANNELS,
    FEATURES,
    HIDDEN,
    SIDE,
    batch_for,
    features_for,
    model_with,
    projector_of,
    vision_config,
)
from tests.model.test_assemble import write_decoder
from tests.tiny import tiny_image, tiny_siglip_processor
from tests.tiny_model import tiny_model


def test_every_projector_has_a_case() -> None:
    assert sorted(PROJECTORS.names()) == ALL
    assert len(ALL) == 11


@pytest.mark.parametrize("name", ALL)
def test_count_and_gradient(name: str) -> None:
    projector, (_, num_tokens) = projector_of(name), CASES[name]
    features = features_for(name).requires_grad_()
    embedded = projector(features)
    assert isinstance(projector, Projector)
    assert projector.num_output_tokens(FEATURES) == num_tokens
    assert embedded.shape == (2, num_tokens, HIDDEN)
    (embedded * torch.randn_like(embedded)).sum().backward()
    assert features.grad is not None
    assert (features.grad != 0).any(dim=-1).all()
    for key, parameter in projector.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert (parameter.grad != 0).any(), key


@pytest.mark.parametrize("name", ALL)
def test_a_picture_does_not_see_its_batch_mates(name: str) -> None:
    projector, features = projector_of(name), features_for(name)
    torch.testing.assert_close(projector(features)[1:], projector(features[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name: str) -> None:
    projector, features = projector_of(name), features_for(name)
    with torch.no_grad():
        expected = projector(features)
        found = projector.to(torch.bfloat16)(features.bfloat16())
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.05


@pytest.mark.parametrize("name", ALL)
def test_scale_output(name: str) -> None:
    projector, features = projector_of(name), features_for(name)
    with torch.no_grad():
        before = projector(features)
        projector.scale_output(torch.tensor(2.5))
        factor = 1.0 if name == "identity" else 2.5
        torch.testing.assert_close(projector(features), factor * before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_through_a_model(name: str, tmp_path: Path) -> None:
    """Forward, loss and backward, generation, and the same logits after saving and loading."""
    model, (args, num_tokens) = model_with(name), CASES[name]
    batch = batch_for(model, num_tokens)
    model(**batch).loss.backward()
    for key, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    assert [len(answer) for answer in greedy(model, num_tokens=3, **prompt)] == [3, 3]
    model.save_pretrained(tmp_path, save_original_format=True)
    loaded = load_model(tmp_path)
    assert (loaded.config.projector, loaded.config.projector_args) == (name, args)
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    # convolutions round by where their weights lie in memory
    torch.testing.assert_close(logits_of(loaded, **batch), logits_of(model, **batch), rtol=1e-4, atol=1e-5)
    short = {**prompt, "input_ids": prompt["input_ids"][:, 2:], "attention_mask": prompt["attention_mask"][:, 2:]}
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**short)


# ---- what is refused ----


@pytest.mark.parametrize("name", ["pixel_shuffle", "average_pool", "ldp", "ldp_v2"])
def test_odd_grids_are_refused(name: str) -> None:
    projector = projector_of(name, {})
    for count, message in ((9, r"grid of 3 x 3 is no multiple"), (17, "square grid of features, .* gives 17")):
        with pytest.raises(ValueError, match=message):
            projector.num_output_tokens(count)
        with pytest.raises(ValueError, match=message):
            projector(torch.randn(1, count, CHANNELS))


def test_c_abstractor_takes_the_grid_of_its_tower_only() -> None:
    projector = projector_of("c_abstractor")
    with pytest.raises(ValueError, match="square grid of features"):
        projector(torch.randn(1, 17, CHANNELS))
    with pytest.raises(ValueError, match=r"has positions for 16 features, .* got 25"):
        projector.num_output_tokens(25)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"factor": 2}, "projector_args has no key 'factor'"),
        ("pixel_shuffle", {"facto": 2}, "no key 'facto'; did you mean 'factor'"),
        ("pixel_shuffle", {"factor": 0}, r"projector_args\.factor=0: must be at least 1"),
        ("pixel_shuffle", {"factor": "2"}, r"projector_args\.factor='2': must be a int"),
        ("ldp_v2", {"factor": True}, r"projector_args\.factor=True: must be a int"),
        ("ldp", {"factor": 4}, "no key 'factor'"),
        ("perceiver", {"depth": 0}, r"projector_args\.depth=0: must be at least 1"),
        ("c_abstractor", {"num_tokens": 10}, r"projector_args\.num_tokens=10: must be a square"),
        ("c_abstractor", {"width": 12}, r"projector_args\.width=12: must be a multiple of group_size=8"),
    ],
)
def test_options_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_with(name, options)


@pytest.mark.parametrize("name", [name for name in ALL if name != "mlp2x_gelu"])
def test_only_a_plain_perceptron_becomes_experts(name: str) -> None:
    """Experts take the place of the whole projector, so nothing else of it may be lost."""
    with pytest.raises(ValueError, match=r"matches no known feed-forward pattern|computes more than"):
        mlp_spec(projector_of(name), "gelu")


def test_identity_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match="projector=identity: the tower gives 24 channels and the decoder takes 32"):
        tiny_model(projector="identity")


# ---- from a recipe ----


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    SiglipVisionModel(vision_config("ldp")).save_pretrained(folder / "siglip")
    write_decoder(folder / "llama")
    return folder


def section(parts: Path, **changes: Any) -> ModelSection:
    values: dict[str, Any] = {"vision_tower": str(parts / "siglip"), "language_model": str(parts / "llama")}
    return ModelSection(**{**values, "vision_feature_select_strategy": "full", **changes})


@pytest.mark.parametrize("name", [name for name in ALL if name != "identity"])
def test_the_processor_counts_what_the_projector_makes(parts: Path, name: str) -> None:
    """Ours and the stock way of counting, from the integers that `assemble` hands over; the model takes both."""
    args, num_tokens = CASES[name]
    found = assemble(section(parts, projector=name, projector_args=args))
    processor = tiny_siglip_processor(image_size=8 * SIDE, patch_size=8)
    processor.num_additional_image_tokens = found.num_additional_image_tokens
    assert processor.num_image_tokens == found.model.config.image_seq_length == num_tokens
    inputs = processor(images=tiny_image(0), text="<image>what is it", return_tensors="pt")
    assert int((inputs["input_ids"] == found.model.config.image_token_id).sum()) == num_tokens
    assert found.model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ALL if name != "identity"])
def test_fresh_embeddings_have_the_scale_of_words(parts: Path, name: str) -> None:
    model = assemble(section(parts, projector=name, projector_args=CASES[name][0])).model
    noise = torch.randn(8, 3, 8 * SIDE, 8 * SIDE)
    with torch.no_grad():
        pictures = torch.stack(list(model.model.get_image_features(pixel_values=noise, return_dict=True).pooler_output))
        ratio = float(pictures.std() / model.get_input_embeddings().weight.std())
    assert 0.7 < ratio < 1.4


def test_a_recipe_with_a_grid_that_does_not_divide(parts: Path) -> None:
    with pytest.raises(ValueError, match="merges 3 x 3 features, and the grid of 4 x 4 is no multiple"):
        assemble(section(parts, projector="pixel_shuffle", projector_args={"factor": 3}))


# ---- through the programs ----


def test_the_squeeze_of_ldp_is_that_of_mobilenet() -> None:
    widths = (8, 36, 40, 44, 72, 76, 96, 576, 1024, 2560)
    assert [_squeezed(width) for width in widths] == [_make_divisible(width // 4, 8) for width in widths]


def test_a_dry_run_says_tower_projector_and_tokens(parts: Path, tmp_path: Path) -> None:
    SiglipImageProcessorPil(size={"height": 8 * SIDE, "width": 8 * SIDE}).save_pretrained(parts / "siglip")
    named = section(parts, projector="pixel_shuffle", projector_args={"factor": 2})
    config = RunConfig(output_dir=str(tmp_path), model=named, train={"use_cpu": True})
    config.stage = StageSection(name="pretrain", learning_rates={"projector": 1e-3})
    text = describe("recipe.yaml", config)
    assert "siglip_vision_model (32 px), projector pixel_shuffle, 4 tokens for a picture" in text
    assert "factor: 2" in text


def test_the_page_has_every_projector_and_option() -> None:
    page = (Path(__file__).parents[2] / "docs/towers.md").read_text(encoding="utf-8")
    rows = {name: row for row in page.splitlines() if row.startswith("| `") for name in re.findall("`(.+?)`", row)}
    for name in PROJECTORS:
        for option in dataclasses.fields(PROJECTORS.get(name).Config):
            assert f"{option.name} ({option.default})" in rows[name], (name, option.name)
    assert len(set(PROJECTORS) & rows.keys()) == 11
