"""Towers of other makers: open_clip, NaFlex SigLIP2 and timm give the features of their own code."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionModel,
)

from llava_moe.model.assemble import assemble
from llava_moe.model.vision import TimmTower, timm_tower_config
from llava_moe.model.vision_convert import clip_config, open_clip_config, open_clip_timm, siglip_from_naflex
from llava_moe.model.vision_images import image_processor
from llava_moe.model.vision_load import load_tower
from tests.model.test_assemble import write_decoder
from tests.model.tower_cases import (
    DINO_MEAN,
    OpenClip,
    count_calls,
    layer_outputs,
    section,
    write_open_clip,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a decoder; the towers are written by the tests."""
    folder = tmp_path_factory.mktemp("towers")
    write_decoder(folder / "llama")
    return folder


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


def test_old_files_of_timm_do_not_count_batches(parts: Path, tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in timm.create_model("test_efficientnet").state_dict().items()}
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    save_file(old, tmp_path / "w.safetensors")
    named = section(parts, "timm:test_efficientnet", image_size=64, vision_weights=str(tmp_path / "w.safetensors"))
    found = load_tower(named).backbone.state_dict()
    assert all(torch.equal(found[key], value) for key, value in old.items() if key in found)
