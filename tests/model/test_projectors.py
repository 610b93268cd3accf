"""Every projector: formula (against a slow or foreign one), token count, gradient, and its way through a model.

Towers are a grid of 4 x 4 features of 24 channels (32 for the identity), decoders 32 wide.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm2d, LayerNormAct2d
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig, _make_divisible
from transformers import SiglipImageProcessorPil, SiglipVisionModel
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from llava_moe.config import ModelSection, RunConfig, StageSection
from llava_moe.model.assemble import assemble, load_model
from llava_moe.model.projectors import PROJECTORS, Projector
from llava_moe.model.projectors.ldp import _squeezed
from llava_moe.model.sites import mlp_spec
from llava_moe.training.dry_run import describe
from tests.model.inputs import greedy, logits_of
from tests.model.test_assemble import write_decoder
from tests.tiny import tiny_image, tiny_siglip_processor
from tests.tiny_model import tiny_model, tiny_vision_config

SIDE, CHANNELS, HIDDEN = 4, 24, 32
FEATURES = SIDE * SIDE
# options, and the tokens that 16 features become
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({}, 16),
    "identity": ({}, 16),
    "mlp2x_gelu": ({}, 16),
    "mlp3x_gelu": ({}, 16),
    "mlp4x_gelu": ({}, 16),
    "pixel_shuffle": ({"factor": 2}, 4),
    "average_pool": ({"factor": 4}, 1),
    "perceiver": ({"num_latents": 5, "depth": 2, "num_heads": 2, "head_width": 4}, 5),
    "c_abstractor": ({"num_tokens": 9, "depth": 2, "width": 16, "group_size": 4}, 9),
    "ldp": ({}, 4),
    "ldp_v2": ({}, 4),
}
ALL = sorted(CASES)


def vision_config(name: str) -> Any:
    config: Any = tiny_vision_config("siglip")
    config.image_size = 8 * SIDE
    config.hidden_size = HIDDEN if name == "identity" else CHANNELS
    return config


def model_with(name: str, options: dict[str, Any] | None = None) -> Any:
    args, _ = CASES[name]
    return tiny_model(
        projector=name, projector_args=args if options is None else options, vision_config=vision_config(name)
    )


def projector_of(name: str, options: dict[str, Any] | None = None) -> Any:
    return model_with(name, options).model.multi_modal_projector


def features_for(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, FEATURES, HIDDEN if name == "identity" else CHANNELS)


def batch_for(model: Any, num_tokens: int, batch: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, 400, (batch, num_tokens + 6))
    ids[:, 1 : 1 + num_tokens] = model.config.image_token_id
    labels = ids.clone()
    labels[:, : 1 + num_tokens] = -100
    size = model.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


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


# ---- formulas ----


def numbers(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def load_in_order(module: nn.Module, tensors: list[Tensor]) -> nn.Module:
    """Copies tensors into a foreign module whose parameters come in the same order."""
    own = module.state_dict()
    assert [t.shape for t in own.values()] == [t.shape for t in tensors]
    module.load_state_dict(dict(zip(own, tensors, strict=True)))
    return module


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.stack([(layer.weight * row).sum(1) + layer.bias for row in x])


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean, variance = x.mean(), ((x - x.mean()) ** 2).mean()
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


@torch.no_grad()
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_mlp_formula(depth: int) -> None:
    projector, x = projector_of(f"mlp{depth}x_gelu"), features_for("mlp", 1)
    hidden = affine(x[0], projector.linear_1)
    for number in range(2, depth + 1):
        hidden = affine(gelu(hidden), getattr(projector, f"linear_{number}"))
    torch.testing.assert_close(projector(x)[0], hidden, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, nn.Linear) for m in projector.modules()) == depth


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_average_pool_formula(factor: int) -> None:
    projector, x = projector_of("average_pool", {"factor": factor}), features_for("average_pool", 1)
    means = []
    for row in range(0, SIDE, factor):
        for column in range(0, SIDE, factor):
            cells = [x[0, (row + i) * SIDE + column + j] for i in range(factor) for j in range(factor)]
            means.append(torch.stack(cells).mean(0))
    expected = affine(gelu(affine(torch.stack(means), projector.mlp[0])), projector.mlp[2])
    torch.testing.assert_close(projector(x)[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_is_that_of_internvl(factor: int) -> None:
    projector, x = projector_of("pixel_shuffle", {"factor": factor}), features_for("pixel_shuffle")
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=CHANNELS),
        text_config=SimpleNamespace(hidden_size=HIDDEN),
        downsample_ratio=1 / factor,
        projector_hidden_act="gelu",
    )
    stock: Any = InternVLMultiModalProjector(config)  # type: ignore[no-untyped-call,arg-type]
    stock.load_state_dict(projector.state_dict())
    grid = x.reshape(2, SIDE, SIDE, CHANNELS)
    merged = InternVLModel.pixel_shuffle(None, grid, 1 / factor)  # type: ignore[arg-type]
    expected = stock(merged.reshape(2, -1, CHANNELS * factor**2))
    torch.testing.assert_close(projector(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_perceiver_formula() -> None:
    """Query by query and head by head."""
    projector, x = projector_of("perceiver"), features_for("perceiver", 1)
    latents = projector.latents
    for layer in projector.layers:
        normed = torch.stack([norm(z, layer.norm_latents) for z in latents])
        seen = torch.cat([torch.stack([norm(f, layer.norm_features) for f in x[0]]), normed])
        query, key, value = (m @ w.weight.T for m, w in
                             ((normed, layer.q_proj), (seen, layer.k_proj), (seen, layer.v_proj)))  # fmt: skip
        read = torch.empty_like(query)
        for head in (slice(0, 4), slice(4, 8)):
            for i in range(len(latents)):
                weights = torch.stack([query[i, head] @ k[head] / 2.0 for k in key]).softmax(0)
                read[i, head] = sum(w * v[head] for w, v in zip(weights, value, strict=True))
        latents = latents + read @ layer.o_proj.weight.T
        ff = torch.stack([norm(z, layer.norm_ff) for z in latents])
        latents = latents + gelu(ff @ layer.fc1.weight.T) @ layer.fc2.weight.T
    expected = affine(torch.stack([norm(z, projector.norm) for z in latents]), projector.linear)
    torch.testing.assert_close(projector(x)[0], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_perceiver_takes_any_number_of_features() -> None:
    projector = projector_of("perceiver")
    for count in (1, 7, FEATURES + 1):
        assert projector.num_output_tokens(count) == 5
        assert projector(torch.randn(2, count, CHANNELS)).shape == (2, 5, HIDDEN)


@torch.no_grad()
def test_c_abstractor_has_the_regnet_stages_of_timm() -> None:
    projector, x = projector_of("c_abstractor"), features_for("c_abstractor", 1)
    parts: dict[str, Any] = {"act_layer": nn.SiLU, "norm_layer": LayerNorm2d, "group_size": 4}
    before = load_in_order(RegStage(2, CHANNELS, 16, 1, 1, **parts), numbers(projector.before))
    behind = load_in_order(RegStage(2, 16, 16, 1, 1, **parts), numbers(projector.behind))
    grid = before((x + projector.position).transpose(1, 2).reshape(1, CHANNELS, SIDE, SIDE))
    # four cells to three: windows of two that overlap
    pooled = torch.stack(
        [grid[0, :, i : i + 2, j : j + 2].mean((1, 2)) for i in range(3) for j in range(3)], dim=1
    ).reshape(1, 16, 3, 3)
    cells = behind(pooled)[0].flatten(1).T
    hidden = affine(cells, projector.linear_1)
    expected = affine(hidden * hidden.sigmoid(), projector.linear_2)
    torch.testing.assert_close(projector(x)[0], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_ldp_has_the_blocks_of_mobilenet() -> None:
    projector, x = projector_of("ldp"), features_for("ldp", 1)
    norm = partial(LayerNormAct2d, act_layer=None)  # the norm that MobileVLM gives them
    grid = affine(gelu(affine(x[0], projector.linear_1)), projector.linear_2).T.reshape(1, HIDDEN, SIDE, SIDE)
    for block, stride in ((projector.block_1, 1), (projector.block_2, 2)):
        config = InvertedResidualConfig(HIDDEN, 3, HIDDEN, HIDDEN, True, "HS", stride, 1, 1)
        grid = load_in_order(InvertedResidual(config, norm), numbers(block))(grid)
    torch.testing.assert_close(projector(x)[0], grid[0].flatten(1).T, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_ldp_v2_formula() -> None:
    projector, x = projector_of("ldp_v2"), features_for("ldp_v2", 1)
    grid = affine(gelu(affine(x[0], projector.linear_1)), projector.linear_2).reshape(SIDE, SIDE, HIDDEN)
    pooled = torch.zeros(4, 4, HIDDEN)  # 2 x 2 with a border of zeros
    for i in range(2):
        for j in range(2):
            pooled[i + 1, j + 1] = grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1))
    weight, bias = projector.position.weight[:, 0], projector.position.bias
    expected = [
        pooled[i + 1, j + 1] + bias + sum(weight[:, a, b] * pooled[i + a, j + b] for a in range(3) for b in range(3))
        for i in range(2)
        for j in range(2)
    ]
    torch.testing.assert_close(projector(x)[0], torch.stack(expected), rtol=1e-4, atol=1e-4)


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
