"""Towers of transformers: the selected layer and nothing behind it, another size, several fused, several scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
)

from llava_moe.model.assemble import assemble, load_model
from llava_moe.model.vision import TimmTower, timm_tower_config
from llava_moe.model.vision_composite import (
    FusedTower,
    MultiScaleTower,
    fuse_towers,
    fused_config,
    multi_scale_config,
    scale_tower,
)
from llava_moe.model.vision_convert import dinov2_at
from llava_moe.model.vision_images import image_processor
from llava_moe.model.vision_load import load_tower
from llava_moe.model.vision_skip import skip_unused_layers
from tests.model.inputs import logits_of
from tests.model.test_assemble import write_decoder
from tests.model.tower_cases import (
    DINO_MEAN,
    DINO_STD,
    SIGLIP_MEAN,
    check_round_trip,
    count_calls,
    layer_outputs,
    normalised,
    section,
    tower_of,
)
from tests.tiny_model import tiny_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of towers with their image processors, and of a decoder."""
    folder = tmp_path_factory.mktemp("towers")
    size = {"height": 16, "width": 16}
    for kind in ("siglip", "clip", "dinov2", "registers"):
        tower_of(kind).save_pretrained(folder / kind)
        if kind == "siglip":
            processor: Any = SiglipImageProcessorPil(size=size)
        else:
            processor = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=DINO_MEAN, image_std=DINO_STD)
        processor.save_pretrained(folder / kind)
    tower_of("siglip", 32).save_pretrained(folder / "siglip_32")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "siglip_32")
    write_decoder(folder / "llama")
    return folder


class TestSkippedLayers:
    @pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "registers"])
    @pytest.mark.parametrize(("layer", "used"), [(-1, 3), (-2, 2), (1, 1), ([0, -3], 1), (0, 0)])
    def test_the_features_are_the_same_and_nothing_behind_runs(self, kind: str, layer: Any, used: int) -> None:
        tower, pixels = tower_of(kind), torch.randn(2, 3, 16, 16)
        names, whole = list(tower.state_dict()), layer_outputs(tower, pixels)
        assert skip_unused_layers(tower, layer) == 3 - used
        layers = tower.encoder.layer if kind in ("dinov2", "registers") else tower.encoder.layers
        counts, _ = count_calls(layers)
        found = layer_outputs(tower, pixels)
        assert counts == [1] * used + [0] * (3 - used)
        assert len(found) == len(whole) == 4
        for index in [layer] if isinstance(layer, int) else layer:
            assert torch.equal(found[index], whole[index])
        assert list(tower.state_dict()) == names

    def test_other_towers_are_left_alone(self) -> None:
        assert skip_unused_layers(TimmTower(timm_tower_config("test_efficientnet", 64)), -1) == 0

    @pytest.mark.parametrize("kind", ["siglip", "clip"])
    def test_inside_a_model(self, kind: str, tmp_path: Path) -> None:
        """A fresh and a loaded model spare the last layer, also under checkpointing, and keep its weights on disk."""
        model = tiny_model(vision=kind)
        model.save_pretrained(tmp_path, save_original_format=True)
        for found in (model, load_model(tmp_path)):
            found.gradient_checkpointing_enable()
            found.train()
            layers = found.model.vision_tower.encoder.layers
            counts, _ = count_calls(layers)
            features = found.model.get_image_features(pixel_values=torch.randn(2, 3, 16, 16)).pooler_output
            torch.stack(list(features)).sum().backward()
            assert counts[2] == 0
            assert min(counts[:2]) >= 1
            assert layers[1].mlp.fc1.weight.grad is not None
            assert layers[2].mlp.fc1.weight.grad is None
        mine, theirs = model.state_dict(), load_model(tmp_path).state_dict()
        assert mine.keys() == theirs.keys()
        assert any("encoder.layers.2." in name for name in mine)

    def test_a_layer_that_was_spared_cannot_be_asked_for(self) -> None:
        """The stock method takes another layer with each call; the repeated entries must not pass for it."""
        model, pixels = tiny_model(vision="clip"), torch.randn(1, 3, 16, 16)
        found = model.model.get_image_features(pixel_values=pixels, vision_feature_layer=1).pooler_output
        expected = tiny_model(vision="clip", vision_feature_layer=1).model.get_image_features(pixel_values=pixels)
        assert torch.equal(found[0], expected.pooler_output[0])
        with pytest.raises(ValueError, match=r"vision_feature_layer=-1: .* computes 2 of 3 layers"):
            model.model.get_image_features(pixel_values=pixels, vision_feature_layer=-1)
        model.config.vision_feature_layer = -1
        with pytest.raises(ValueError, match=r"vision_feature_layer=-1: .* computes 2 of 3 layers"):
            model.model.get_image_features(pixel_values=pixels)


class TestDinov2:
    def test_from_a_directory(self, parts: Path, tmp_path: Path) -> None:
        found = assemble(section(parts, str(parts / "dinov2"), vision_feature_select_strategy="default"))
        assert (found.num_additional_image_tokens, found.model.config.image_seq_length) == (1, 4)
        found.model.save_pretrained(tmp_path, save_original_format=True)
        ids = torch.tensor([[1, *[found.model.config.image_token_id] * 4, 5, 6]])
        inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
        assert torch.equal(logits_of(load_model(tmp_path), **inputs), logits_of(found.model, **inputs))

    @pytest.mark.parametrize("registers", [False, True])
    @pytest.mark.parametrize("side", [1, 3, 4])
    @torch.no_grad()
    def test_at_another_size_it_is_what_its_own_code_makes_of_such_pictures(self, registers: bool, side: int) -> None:
        tower, pixels = tower_of("registers" if registers else "dinov2"), torch.randn(2, 3, 8 * side, 8 * side)
        moved = dinov2_at(tower, 8 * side)
        assert (moved.config.image_size, tower.config.image_size) == (8 * side, 16)
        for mine, other in zip(layer_outputs(moved, pixels), layer_outputs(tower, pixels), strict=True):
            assert torch.equal(mine, other)

    def test_another_size_from_a_recipe(self, parts: Path) -> None:
        named = section(parts, str(parts / "dinov2"), image_size=24)
        tower = load_tower(named)
        assert (tower.config.image_size, tower.embeddings.position_embeddings.shape[1]) == (24, 10)
        assert image_processor(named, tower.config).size["height"] == 24
        with pytest.raises(ValueError, match=r"model\.image_size=30: must be a multiple of the tower's patch of 8"):
            load_tower(section(parts, str(parts / "dinov2"), image_size=30))

    def test_registers_are_no_class_token(self, parts: Path) -> None:
        """Neither selection of LLaVA's gives the patches alone; one scale of S2 does."""
        named = section(parts, str(parts / "registers"), vision_feature_select_strategy="default")
        with pytest.raises(ValueError, match=r"has 3 tokens before its patches; use full, or s2:1:"):
            assemble(named)
        alone = assemble(section(parts, f"s2:1:{parts / 'registers'}", vision_feature_layer=-1)).model
        pixels = torch.randn(1, 3, 16, 16)
        (found,) = layer_outputs(alone.model.vision_tower, pixels)
        assert torch.equal(found, layer_outputs(load_tower(named), pixels)[-2][:, 3:])

    def test_other_towers_keep_their_size(self, parts: Path) -> None:
        with pytest.raises(ValueError, match=r"model\.image_size=32: .* takes pictures of 16 px"):
            load_tower(section(parts, str(parts / "siglip"), image_size=32))
        assert load_tower(section(parts, str(parts / "siglip"), image_size=16)).config.image_size == 16


class TestFused:
    def test_channels_are_joined_cell_by_cell(self) -> None:
        siglip, dino = tower_of("siglip"), tower_of("dinov2", image_size=32, patch_size=16)
        means, stds = [SIGLIP_MEAN, DINO_MEAN], [[0.5] * 3, DINO_STD]
        tower = fuse_towers([siglip, dino], fused_config([siglip.config, dino.config], [-2, -1], means, stds)).eval()
        raw = torch.rand(2, 3, 16, 16)
        first, second = (raw - 0.5) / 0.5, raw.clone()
        for channel in range(3):
            second[:, channel] = (raw[:, channel] - DINO_MEAN[channel]) / DINO_STD[channel]
        second = nn.functional.interpolate(second, size=(32, 32), mode="bicubic")
        expected = torch.cat([layer_outputs(siglip, first)[-2], layer_outputs(dino, second)[-1][:, 1:]], dim=-1)
        (found,) = layer_outputs(tower, first)
        assert found.shape == (2, 4, 48)
        assert (tower.config.hidden_size, tower.config.image_size, tower.config.patch_size) == (48, 16, 8)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_different_grids_are_refused(self) -> None:
        configs = [tower_of("siglip").config, tower_of("dinov2", 32).config]
        with pytest.raises(ValueError, match=r"one grid; found siglip_vision_model 16 px / 8 = 2, dinov2 32 .* = 4"):
            fused_config(configs, [-2, -2], [SIGLIP_MEAN] * 2, [SIGLIP_MEAN] * 2)

    def test_from_a_recipe(self, parts: Path, tmp_path: Path) -> None:
        source = f"fused:{parts / 'siglip'}@-2+{parts / 'dinov2'}@2"
        named = section(parts, source, vision_feature_layer=-1)
        found = assemble(named)
        config = found.model.config
        assert isinstance(found.model.model.vision_tower, FusedTower)
        assert config.vision_config.feature_layers == [-2, 2]
        assert config.vision_config.image_means == [SIGLIP_MEAN, DINO_MEAN]
        assert (found.num_additional_image_tokens, config.image_seq_length) == (0, 4)
        processor = image_processor(named, config.vision_config)
        assert processor(Image.new("RGB", (40, 20)), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
        assert list(processor.image_mean) == SIGLIP_MEAN
        check_round_trip(found.model, tmp_path, 16)

    def test_dinov2_takes_the_grid_of_the_other(self, parts: Path) -> None:
        """As SigLIP at 384 px (27 x 27) and DINOv2, trained at 518 px (37 x 37), wherever it stands in the name."""
        small, raw = parts / "siglip_32", torch.rand(2, 3, 32, 32)
        for first, second in ((small, parts / "dinov2"), (parts / "dinov2", small)):
            tower = load_tower(section(parts, f"fused:{first}+{second}"))
            inner = {type(t).__name__: t for t in tower.towers}
            assert inner["Dinov2Model"].config.image_size == inner["SiglipVisionModel"].config.image_size == 32
            (found,) = layer_outputs(tower, (raw - 0.5) / 0.5 if first == small else normalised(raw))
            dino = layer_outputs(load_tower(section(parts, str(parts / "dinov2"))), normalised(raw))[-2][:, 1:]
            siglip = layer_outputs(load_tower(section(parts, str(small))), (raw - 0.5) / 0.5)[-2]
            expected = torch.cat([siglip, dino] if first == small else [dino, siglip], dim=-1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("source", "changes", "message"),
        [
            ("fused:{siglip}@-5+{clip}", {}, r"@-5 of siglip_vision_model: .* layers 0 to 3, or -4 to -1"),
            ("fused:{siglip}+timm:test_vit", {}, "takes towers of transformers, and no timm: inside"),
            ("fused:{siglip}+{clip}", {"image_size": 24}, r"image_size=24: .* takes pictures of 16 px"),
            ("{siglip}", {"vision_weights": "w.safetensors"}, "only timm: and open_clip: towers read it"),
            ("{llama}", {}, r"LlamaConfig has no whole number patch_size"),
            ("fused:{siglip}+./nowhere", {}, r"model\.vision_tower=\./nowhere: "),
        ],
    )
    def test_names_that_are_refused(self, parts: Path, source: str, changes: dict[str, Any], message: str) -> None:
        names = {name: parts / name for name in ("siglip", "clip", "llama")}
        with pytest.raises(ValueError, match=message):
            load_tower(section(parts, source.format(**names), **changes))

    def test_one_tower_is_refused(self, parts: Path) -> None:
        with pytest.raises(ValueError, match="name at least two towers"):
            load_tower(section(parts, f"fused:{parts / 'siglip'}"))

    def test_another_feature_layer_is_refused(self, parts: Path) -> None:
        source = f"fused:{parts / 'siglip'}+{parts / 'dinov2'}"
        with pytest.raises(ValueError, match=r"vision_feature_layer=-2: .* has 1 feature layers"):
            assemble(section(parts, source))


class TestMultiScale:
    @pytest.mark.parametrize("kind", ["siglip", "clip"])
    @pytest.mark.parametrize("size", [16, 20])
    def test_tiles_by_hand(self, kind: str, size: int) -> None:
        """Of 20 px a patch of 8 leaves 4 over at the edge of a picture, and so of a tile."""
        inner, pixels = tower_of(kind, size), torch.randn(2, 3, 2 * size, 2 * size)
        tower = scale_tower(inner, multi_scale_config(inner.config, -2, [1, 2])).eval()
        small = nn.functional.interpolate(pixels, size=(size, size), mode="bicubic")
        first = layer_outputs(inner, small)[-2][:, -4:]
        grid = torch.zeros(2, 4, 4, 24)
        for i in range(2):
            for j in range(2):
                tile = pixels[:, :, size * i : size * i + size, size * j : size * j + size]
                cells = layer_outputs(inner, tile)[-2][:, -4:].reshape(2, 2, 2, 24)
                grid[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = cells
        means = [grid[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for i in range(2) for j in range(2)]
        (found,) = layer_outputs(tower, pixels)
        torch.testing.assert_close(found, torch.cat([first, torch.stack(means, 1)], -1), rtol=1e-4, atol=1e-4)
        assert (tower.config.image_size, tower.config.patch_size, tower.config.hidden_size) == (2 * size, 16, 48)

    def test_from_a_recipe(self, parts: Path, tmp_path: Path) -> None:
        named = section(parts, f"s2:1,2:{parts / 'clip'}@-2", vision_feature_layer=-1)
        found = assemble(named)
        assert isinstance(found.model.model.vision_tower, MultiScaleTower)
        assert (found.num_additional_image_tokens, found.model.config.image_seq_length) == (0, 4)
        processor = image_processor(named, found.model.config.vision_config)
        assert processor(Image.new("RGB", (40, 20)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
        check_round_trip(found.model, tmp_path, 32)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("s2:2,1:{}", r"scales \[2, 1\] must be ascending"),
            ("s2:1,1:{}", r"scales \[1, 1\] must be ascending"),
            ("s2:0,1:{}", r"scales \[0, 1\] must be ascending"),
            ("s2:one:{}", "write the scales and a tower"),
            ("s2:1,2", "write the scales and a tower"),
        ],
    )
    def test_bad_scales(self, parts: Path, source: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_tower(section(parts, source.format(parts / "clip")))


def test_experts_in_fused_towers_are_refused() -> None:
    configs = [tower_of("siglip").config, tower_of("dinov2").config]
    fused = fused_config(configs, [-2, -2], [SIGLIP_MEAN] * 2, [SIGLIP_MEAN] * 2)
    part = {"layers": [0], "num_experts": 2, "router": {"name": "top_k", "args": {"k": 1}}}
    with pytest.raises(ValueError, match=r"moe\.vision: fused towers take no experts"):
        tiny_model({"vision": part}, vision_config=fused, vision_feature_layer=-1)
