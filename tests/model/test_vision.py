"""The timm tower: frozen statistics, normalised features, a grid in reading order, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModel

from llava_moe.model.assemble import load_model
from llava_moe.model.vision import TimmTower, TimmTowerConfig, timm_tower_config

CNN, VIT = "test_efficientnet", "test_vit"


def tower_of(architecture: str = CNN, image_size: int = 64, feature_norm: bool = True) -> TimmTower:
    torch.manual_seed(0)
    return TimmTower(timm_tower_config(architecture, image_size, feature_norm)).eval()


def batch_norms(tower: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in tower.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def test_shape_and_interface() -> None:
    tower = tower_of()
    config = tower.config
    output = tower(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    assert config.patch_size == 32
    assert output.last_hidden_state.shape == (2, 4, config.hidden_size)
    assert len(output.hidden_states) == 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@torch.no_grad()
def test_features_are_those_of_timm_in_reading_order() -> None:
    tower, pixels = tower_of(feature_norm=False), torch.randn(1, 3, 64, 96)
    grid = tower.backbone.forward_features(pixels)
    features = tower(pixels).last_hidden_state
    assert grid.shape[2:] == (2, 3)
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(features[0, row * 3 + column], grid[0, :, row, column], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_feature_norm() -> None:
    pixels = 1e3 * torch.randn(2, 3, 64, 64)  # an untrained tower gives almost nothing
    plain, normed = tower_of(feature_norm=False)(pixels), tower_of()(pixels)
    features = normed.last_hidden_state
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(2, 4), rtol=0, atol=1e-2)
    assert not torch.allclose(plain.last_hidden_state.mean(-1), torch.zeros(2, 4), atol=1e-5)
    half = tower_of().to(torch.bfloat16)(pixels.bfloat16()).last_hidden_state
    assert half.dtype == torch.bfloat16


def test_training_leaves_batch_norm_statistics_alone() -> None:
    tower = tower_of()
    before = [
        (bn.running_mean.clone(), bn.running_var.clone(), bn.num_batches_tracked.clone()) for bn in batch_norms(tower)
    ]
    assert before
    expected = tower(torch.ones(2, 3, 64, 64)).last_hidden_state
    tower.train()
    assert tower.training
    assert not any(bn.training for bn in batch_norms(tower))
    tower(torch.randn(4, 3, 64, 64) * 5)
    for bn, saved in zip(batch_norms(tower), before, strict=True):
        assert all(
            torch.equal(a, b)
            for a, b in zip((bn.running_mean, bn.running_var, bn.num_batches_tracked), saved, strict=True)
        )
    assert torch.equal(tower.eval()(torch.ones(2, 3, 64, 64)).last_hidden_state, expected)


def test_a_whole_model_in_training_leaves_them_alone_too(timm_checkpoint: Path) -> None:
    model = load_model(timm_checkpoint)
    before = [bn.running_mean.clone() for bn in batch_norms(model)]
    model.train()
    model.model.get_image_features(pixel_values=torch.randn(2, 3, 64, 64))
    assert all(torch.equal(bn.running_mean, saved) for bn, saved in zip(batch_norms(model), before, strict=True))


def test_a_picture_does_not_see_its_batch_mates() -> None:
    tower, pixels = tower_of().train(), torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(
        tower(pixels).last_hidden_state[1:2], tower(pixels[1:2]).last_hidden_state, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("architecture", [CNN, VIT])
def test_save_and_load(architecture: str, tmp_path: Path) -> None:
    image_size = 64 if architecture == CNN else timm.get_pretrained_cfg(VIT).input_size[-1]
    tower = tower_of(architecture, image_size)
    tower.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(other, TimmTower)
    pixels = torch.randn(1, 3, image_size, image_size)
    assert torch.equal(other(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    mine = tower.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in other.state_dict().items())


def test_a_vision_transformer_gives_its_patches_without_prefix_tokens() -> None:
    size = timm.get_pretrained_cfg(VIT).input_size[-1]
    tower = tower_of(VIT, size)
    features = tower(torch.randn(1, 3, size, size)).last_hidden_state
    assert features.shape[1] == (size // tower.config.patch_size) ** 2


def test_unknown_architecture_offers_similar_names() -> None:
    with pytest.raises(ValueError, match="timm has no model 'test_efficientnett'; similar names: test_"):
        timm_tower_config("test_efficientnett", 64)


def test_config_travels() -> None:
    config = timm_tower_config(CNN, 64)
    assert TimmTowerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
