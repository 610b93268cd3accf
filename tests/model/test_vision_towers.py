"""Towers of several kinds: the selected layer and nothing behind it, and what other makers' and joined towers give."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from llava_moe.config import ModelSection
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
from llava_moe.model.vision_convert import clip_config, dinov2_at, open_clip_config, open_clip_timm, siglip_from_naflex
from llava_moe.model.vision_images import image_processor
from llava_moe.model.vision_load import load_tower
from llava_moe.model.vision_skip import skip_unused_layers
from tests.model.inputs import logits_of
from tests.model.test_assemble import write_decoder
from tests.tiny_model import tiny_model, tiny_vision_config

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
                         "patch_size": 8}  # fmt: skip
SIGLIP_MEAN, DINO_MEAN, DINO_STD = [0.5, 0.5, 0.5], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def tower_of(kind: str, image_size: int = 16, patch_size: int = 8) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": image_size, "patch_size": patch_size}
    if kind == "dinov2":
        tower: Any = Dinov2Model(Dinov2Config(**sizes))
    elif kind == "registers":
        tower = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=2))
    else:
        config: Any = tiny_vision_config(kind)
        config.image_size, config.patch_size = image_size, patch_size
        tower = (SiglipVisionModel if kind == "siglip" else CLIPVisionModel)(config)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tower.eval()


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


def section(parts: Path, tower: str, **changes: Any) -> ModelSection:
    values: dict[str, Any] = {"language_model": str(parts / "llama"), "vision_feature_select_strategy": "full"}
    return ModelSection(vision_tower=tower, **{**values, **changes})


def layer_outputs(tower: Any, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(tower(pixels, output_hidden_states=True).hidden_states)


def normalised(raw: Tensor) -> Tensor:
    """Pixels as DINOv2 takes them."""
    return (raw - torch.tensor(DINO_MEAN)[:, None, None]) / torch.tensor(DINO_STD)[:, None, None]


def count_calls(layers: Any) -> tuple[list[int], list[Any]]:
    """How often the attention or MLP inside each layer runs; the handles undo the counting."""
    counts = [0] * len(layers)

    def hook(index: int) -> Any:
        def add(*_: Any) -> None:
            counts[index] += 1

        return add

    return counts, [layer.mlp.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]


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


def check_round_trip(model: Any, folder: Path, size: int) -> None:
    """Saved and loaded, the model gives the same logits; the picture matters."""
    model.save_pretrained(folder, save_original_format=True)
    loaded, num_tokens = load_model(folder), model.config.image_seq_length
    ids = torch.tensor([[1, *[model.config.image_token_id] * num_tokens, 5, 6]])
    pixels = torch.randn(1, 3, size, size)
    expected = logits_of(model, input_ids=ids, pixel_values=pixels)
    assert torch.equal(logits_of(loaded, input_ids=ids, pixel_values=pixels), expected)
    assert not torch.equal(logits_of(loaded, input_ids=ids, pixel_values=-pixels), expected)
    assert type(loaded.model.vision_tower) is type(model.model.vision_tower)


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


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor, quick: bool) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else nn.functional.gelu(hidden)
        return x + self.mlp["c_proj"](hidden)


class OpenClip(nn.Module):
    """A vision transformer with open_clip's names, written from its architecture."""

    def __init__(self, width: int = 16, heads: int = 2, layers: int = 3, patch: int = 8, cells: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock(width, heads) for _ in range(layers))
        self.proj = nn.Parameter(torch.randn(width, 8))

    def forward(self, pixels: Tensor, quick: bool) -> list[Tensor]:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        states = [self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)]
        for block in self.transformer.resblocks:  # type: ignore[union-attr]
            states.append(block(states[-1], quick))
        return states


OPEN_CLIP = {"vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 3, "head_width": 8,
                            "mlp_ratio": 2.0}, "text_cfg": {}, "embed_dim": 8}  # fmt: skip


def write_open_clip(folder: Path, **changes: Any) -> Path:
    file = folder / "open_clip_config.json"
    model = {**OPEN_CLIP, **{key: value for key, value in changes.items() if key == "quick_gelu"}}
    model["vision_cfg"] = {**OPEN_CLIP["vision_cfg"], **{k: v for k, v in changes.items() if k != "quick_gelu"}}  # type: ignore[dict-item]
    file.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": DINO_MEAN, "std": DINO_STD}}))
    return file


class TestOpenClip:
    @pytest.mark.parametrize("quick", [False, True])
    @torch.no_grad()
    def test_the_layers_are_those_of_open_clip(self, parts: Path, tmp_path: Path, quick: bool) -> None:
        theirs, pixels = OpenClip().eval(), torch.randn(2, 3, 16, 16)
        text = {"token_embedding.weight": torch.zeros(3, 3), "logit_scale": torch.zeros(())}
        save_file({f"visual.{k}": v for k, v in theirs.state_dict().items()} | text, tmp_path / "w.safetensors")
        source = f"open_clip:{write_open_clip(tmp_path, quick_gelu=quick)}"
        tower = load_tower(section(parts, source, vision_weights=str(tmp_path / "w.safetensors")))
        assert isinstance(tower, CLIPVisionModel)
        found, expected = layer_outputs(tower, pixels), theirs(pixels, quick)
        assert len(found) == len(expected) == 4
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    def test_from_a_recipe(self, parts: Path, tmp_path: Path) -> None:
        named = section(parts, f"open_clip:{write_open_clip(tmp_path)}", random_weights=True,
                        vision_feature_select_strategy="default")  # fmt: skip
        found = assemble(named)
        assert (found.num_additional_image_tokens, found.model.config.image_seq_length) == (1, 4)
        processor = image_processor(named, found.model.config.vision_config)
        assert (list(processor.image_mean), processor.size["height"]) == (DINO_MEAN, 16)

    def test_weights_that_do_not_fit(self, parts: Path, tmp_path: Path) -> None:
        source, file = f"open_clip:{write_open_clip(tmp_path)}", tmp_path / "w.safetensors"
        named = section(parts, source, vision_weights=str(file))
        state = {f"visual.{k}": v for k, v in OpenClip().state_dict().items()}
        save_file({k: v for k, v in state.items() if k != "visual.ln_pre.bias"}, file)
        with pytest.raises(ValueError, match=r"missing \['pre_layrnorm\.bias'\], without a place nothing"):
            load_tower(named)
        save_file({**state, "visual.strange": torch.zeros(1)}, file)
        with pytest.raises(ValueError, match=r"missing nothing, without a place \['strange'\]"):
            load_tower(named)
        save_file({f"visual.{k}": v for k, v in OpenClip(cells=9).state_dict().items()}, file)
        with pytest.raises(ValueError, match=r"position_embedding\.weight is \(10, 16\) and its config asks for"):
            load_tower(named)
        with pytest.raises(ValueError, match=r"model\.vision_weights must name the safetensors"):
            load_tower(section(parts, source))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layers": [3, 4, 6, 3]}, "its tower is a ResNet"),
            ({"ls_init_value": 0.1}, "its tower has ls_init_value"),
        ],
    )
    def test_towers_that_clip_is_not(self, parts: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        source = f"open_clip:{write_open_clip(tmp_path, **changes)}"
        with pytest.raises(ValueError, match=message):
            load_tower(section(parts, source, random_weights=True))

    def test_a_tower_of_timm(self, parts: Path, tmp_path: Path) -> None:
        """What open_clip takes from timm is a timm tower; its weights are below visual.trunk, and its head is left."""
        torch.manual_seed(0)
        backbone = timm.create_model("test_vit", num_classes=7)
        trunk = {f"visual.trunk.{k}": v for k, v in backbone.state_dict().items()}
        save_file({**trunk, "logit_scale": torch.zeros(())}, tmp_path / "w.safetensors")
        vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token"}
        for name, layer in (("", None), ("@1", 1)):
            source = f"open_clip:{write_open_clip(tmp_path, **vision)}{name}"
            named = section(parts, source, vision_weights=str(tmp_path / "w.safetensors"))
            tower, pixels = load_tower(named), torch.randn(1, 3, 160, 160)
            assert isinstance(tower, TimmTower)
            assert (tower.config.architecture, tower.config.layer, tower.config.patch_size) == ("test_vit", layer, 16)
            own = tower.backbone.state_dict()
            assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in own.items())
            assert list(image_processor(named, tower.config).image_mean) == DINO_MEAN
            assert layer_outputs(tower, pixels)[0].shape == (1, 100, 64)

    def test_a_tower_of_timm_must_say_its_means(self, parts: Path, tmp_path: Path) -> None:
        file = write_open_clip(tmp_path, timm_model_name="test_vit", image_size=160)
        file.write_text(json.dumps(json.loads(file.read_text())["model_cfg"]))
        named = section(parts, f"open_clip:{file}", random_weights=True)
        with pytest.raises(ValueError, match="does not say how pictures are normalised"):
            image_processor(named, load_tower(named).config)

    def test_an_attentional_pool_stays_behind(self, parts: Path, tmp_path: Path) -> None:
        """CoCa's last norm has the width of its pool."""
        theirs = OpenClip()
        state = {f"visual.{key}": value for key, value in theirs.state_dict().items()}
        state |= {"visual.attn_pool.query": torch.zeros(4, 8), "visual.ln_post.weight": torch.zeros(8)}
        save_file({**state, "visual.ln_post.bias": torch.zeros(8)}, tmp_path / "w.safetensors")
        source = f"open_clip:{write_open_clip(tmp_path, attentional_pool=True)}"
        tower = load_tower(section(parts, source, vision_weights=str(tmp_path / "w.safetensors")))
        pixels = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(layer_outputs(tower, pixels)[-1], theirs(pixels, False)[-1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{", "not valid JSON"), ("[1]", "no vision_cfg there"), ('{"text_cfg": {}}', "no vision_cfg there"),
         ('{"vision_cfg": {"image_size": [16, 32]}}', "its pictures are not square")],
    )  # fmt: skip
    def test_files_that_are_no_config(self, parts: Path, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tower(section(parts, f"open_clip:{tmp_path / 'config.json'}", random_weights=True))

    def test_a_layer_of_a_clip_tower_is_named_elsewhere(self, parts: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"name its layer by model\.vision_feature_layer"):
            load_tower(section(parts, f"open_clip:{write_open_clip(tmp_path)}@-2", random_weights=True))

    def test_every_config_of_the_package(self, parts: Path) -> None:
        """Where open_clip is installed: each of its configs becomes a tower, or is refused for a reason."""
        package = importlib.util.find_spec("open_clip")
        if package is None or package.origin is None:
            pytest.skip("open_clip is not installed")
        folder = Path(package.origin).parent / "model_configs"
        found = {"clip": 0, "timm": 0, "refused": 0}
        for file in folder.glob("*.json"):
            model = open_clip_config(file.stem)
            try:
                kind = "timm" if open_clip_timm(model) else "clip"
                if kind == "clip":
                    clip_config(model, file.stem)
            except ValueError as error:
                known = re.search("is a ResNet|which CLIP's class in transformers does not know", str(error))
                kind = "refused" if known else str(error)
            found[kind] = found.get(kind, 0) + 1
        assert found.keys() == {"clip", "timm", "refused"}
        assert found["clip"] >= 40
        assert found["timm"] >= 70
        assert found["refused"] >= 10

    @torch.no_grad()
    def test_the_real_thing(self, tmp_path: Path, parts: Path) -> None:
        """Where open_clip is installed: its own transformer, on the same weights."""
        transformer = pytest.importorskip("open_clip.transformer")
        theirs = transformer.VisionTransformer(16, 8, 16, 3, 2, 2.0, output_dim=8).eval()
        save_file({f"visual.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "w.safetensors")
        source = f"open_clip:{write_open_clip(tmp_path)}"
        tower, pixels = (
            load_tower(section(parts, source, vision_weights=str(tmp_path / "w.safetensors"))),
            torch.randn(2, 3, 16, 16),
        )
        states: list[Tensor] = []
        for block in theirs.transformer.resblocks:
            block.register_forward_hook(lambda module, args, output: states.append(output))
        theirs(pixels)
        for mine, other in zip(layer_outputs(tower, pixels)[1:], states, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    def test_no_such_file(self, parts: Path) -> None:
        with pytest.raises(ValueError, match=r"open_clip:nowhere\.json: no such file"):
            load_tower(section(parts, "open_clip:nowhere.json"))


class TestNaflex:
    def naflex(self) -> Any:
        config = Siglip2VisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     patch_size=4, num_patches=9)  # fmt: skip
        torch.manual_seed(0)
        tower = Siglip2VisionModel(config).eval()
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.2)
        return tower

    @pytest.mark.parametrize("side", [2, 3, 5])
    @torch.no_grad()
    def test_the_same_features_at_one_size(self, side: int) -> None:
        flexible, pixels = self.naflex(), torch.randn(2, 3, 4 * side, 4 * side)
        patches = [
            pixels[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].permute(0, 2, 3, 1).flatten(1)
            for i in range(side)
            for j in range(side)
        ]
        mask, shapes = torch.ones(2, side * side, dtype=torch.long), torch.full((2, 2), side)
        expected = flexible(torch.stack(patches, 1), mask, shapes, output_hidden_states=True).hidden_states
        fixed = siglip_from_naflex(flexible, 4 * side)
        found = layer_outputs(fixed, pixels)
        assert len(found) == len(expected) == 3
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    def test_from_a_directory(self, parts: Path, tmp_path: Path) -> None:
        self.naflex().save_pretrained(tmp_path)
        tower = load_tower(section(parts, str(tmp_path), image_size=8))
        assert isinstance(tower, SiglipVisionModel)
        assert (tower.config.image_size, tower.config.patch_size) == (8, 4)
        with pytest.raises(ValueError, match=r"model\.image_size must be set: .* pictures of any size"):
            load_tower(section(parts, str(tmp_path)))
        with pytest.raises(ValueError, match=r"model\.image_size=9: must be a multiple of the tower's patch of 4"):
            load_tower(section(parts, str(tmp_path), image_size=9))


class TestTimmLayers:
    @pytest.mark.parametrize(
        ("architecture", "size", "layer", "side"),
        [
            ("test_vit", 160, -2, 10),
            ("test_convnext", 64, 1, 8),
            ("test_mambaout", 64, 2, 4),
            ("test_resnet", 64, 0, 32),
        ],
    )
    @torch.no_grad()
    def test_a_chosen_layer(self, architecture: str, size: int, layer: int, side: int) -> None:
        torch.manual_seed(0)
        config = timm_tower_config(architecture, size, feature_norm=False, layer=layer)
        tower, pixels = TimmTower(config).eval(), torch.randn(2, 3, size, size)
        every = tower.backbone.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")
        (found,) = layer_outputs(tower, pixels)
        assert found.shape == (2, side * side, config.hidden_size)
        for row, column in ((0, 0), (1, side - 1), (side - 1, 0)):
            expected = every[layer][:, :, row, column]
            torch.testing.assert_close(found[:, row * side + column], expected, rtol=1e-3, atol=1e-5)

    @torch.no_grad()
    def test_blocks_behind_it_do_not_run(self) -> None:
        tower = TimmTower(timm_tower_config("test_vit", 160, layer=1)).eval()
        counts, _ = count_calls(tower.backbone.blocks)
        layer_outputs(tower, torch.randn(1, 3, 160, 160))
        assert counts[:2] == [1, 1]
        assert len(counts) > 2
        assert not any(counts[2:])

    @torch.no_grad()
    def test_a_model_with_channels_last(self) -> None:
        torch.manual_seed(0)
        config = timm_tower_config("test_mambaout", 64, feature_norm=False)
        tower, pixels = TimmTower(config).eval(), torch.randn(1, 3, 64, 64)
        grid = tower.backbone.forward_features(pixels)
        assert tower.backbone.output_fmt == "NHWC"
        assert grid.shape == (1, 2, 2, config.hidden_size)
        (found,) = layer_outputs(tower, pixels)
        for row in range(2):
            for column in range(2):
                torch.testing.assert_close(found[0, 2 * row + column], grid[0, row, column], rtol=1e-3, atol=1e-5)

    def test_layers_that_do_not_exist(self) -> None:
        with pytest.raises(ValueError, match=r"timm:test_convnext@9: it has the layers 0 to 3, or -4 to -1"):
            timm_tower_config("test_convnext", 64, layer=9)

    def test_from_a_recipe(self, parts: Path, tmp_path: Path) -> None:
        named = section(parts, "timm:test_convnext@-2", image_size=64, random_weights=True, vision_feature_layer=-1)
        found = assemble(named)
        assert (found.model.config.vision_config.layer, found.model.config.image_seq_length) == (-2, 16)
        assert image_processor(named, found.model.config.vision_config).size["height"] == 64
        found.model.model.vision_tower.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).config.layer == -2

    def test_a_size_that_it_does_not_take(self) -> None:
        with pytest.raises(ValueError, match=r"timm:test_vit takes no pictures of 100 px: .*100"):
            timm_tower_config("test_vit", 100)

    def test_weights_that_do_not_fit(self, parts: Path, tmp_path: Path) -> None:
        file = tmp_path / "w.safetensors"
        named = section(parts, "timm:test_convnext", image_size=64, vision_weights=str(file))
        with pytest.raises(ValueError, match=r"model\.vision_weights=.*w\.safetensors: "):
            load_tower(named)
        state = {key: value.contiguous() for key, value in timm.create_model("test_convnext").state_dict().items()}
        save_file(state, file)
        assert isinstance(load_tower(named), TimmTower)
        save_file({key: value for key, value in state.items() if key != "stem.0.bias"}, file)
        with pytest.raises(ValueError, match=r"missing \['stem\.0\.bias'\], without a place nothing"):
            load_tower(named)
        save_file({**state, "stem.0.bias": torch.zeros(3)}, file)
        with pytest.raises(ValueError, match=r"stem\.0\.bias is \(3,\) and the tower has \("):
            load_tower(named)
        file.write_bytes(b"no tensors here, but more than eight bytes")
        with pytest.raises(ValueError, match=r"model\.vision_weights=.*w\.safetensors: "):
            load_tower(named)


def test_experts_in_fused_towers_are_refused() -> None:
    configs = [tower_of("siglip").config, tower_of("dinov2").config]
    fused = fused_config(configs, [-2, -2], [SIGLIP_MEAN] * 2, [SIGLIP_MEAN] * 2)
    part = {"layers": [0], "num_experts": 2, "router": {"name": "top_k", "args": {"k": 1}}}
    with pytest.raises(ValueError, match=r"moe\.vision: fused towers take no experts"):
        tiny_model({"vision": part}, vision_config=fused, vision_feature_layer=-1)


def test_old_files_of_timm_do_not_count_batches(parts: Path, tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in timm.create_model("test_efficientnet").state_dict().items()}
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    save_file(old, tmp_path / "w.safetensors")
    named = section(parts, "timm:test_efficientnet", image_size=64, vision_weights=str(tmp_path / "w.safetensors"))
    found = load_tower(named).backbone.state_dict()
    assert all(torch.equal(found[key], value) for key, value in old.items() if key in found)
