"""Towers of other makers and sizes as stock towers of transformers: open_clip, SigLIP2 NaFlex, resized DINOv2.

Being stock classes, they end up in checkpoints that are read by whatever reads LLaVA. What open_clip takes from timm
becomes a `TimmTower`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig, SiglipVisionModel

from llava_moe.registry import near_misses

# What a vision_cfg may say beside its sizes without changing the features (pooling and projection lie behind them).
_HARMLESS = {"attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "output_tokens", "pool_type",
             "global_average_pool", "patch_dropout", "final_ln_after_pool"}  # fmt: skip
_SIZES = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"}
_RENAMED = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_BEHIND = ("proj", "attn_pool.", "attn_pool_contrastive.")  # read by nothing that LLaVA uses
_NORM_BEHIND = "post_layernorm."
RESIZABLE = ("dinov2", "dinov2_with_registers")  # model types whose position tables are meant to be resampled


def open_clip_config(name: str) -> dict[str, Any]:
    """The model config of open_clip: a JSON file of its kind, or a name among those that the package brings along.

    Returns:
        The config, with `preprocess_cfg` beside it (empty where the file has none).

    Raises:
        ValueError: there is no such file, open_clip is not installed, or it has no config of the name.
    """
    file = Path(name)
    if not name.endswith(".json"):
        package = importlib.util.find_spec("open_clip")
        if package is None or package.origin is None:
            raise ValueError(
                f"model.vision_tower=open_clip:{name}: open_clip is not installed (pip install open_clip_torch); or "
                "name the JSON file of the model's config, such as the open_clip_config.json beside its weights"
            )
        folder = Path(package.origin).parent / "model_configs"
        file = folder / f"{name}.json"
        if not file.is_file():
            known = [path.stem for path in folder.glob("*.json")]
            raise ValueError(f"open_clip has no config {name!r}; {near_misses(name, known)}")
    if not file.is_file():
        raise ValueError(f"model.vision_tower=open_clip:{name}: no such file")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model.vision_tower=open_clip:{name}: not valid JSON: {error}") from error
    model = raw.get("model_cfg", raw) if isinstance(raw, dict) else {}
    if not isinstance(model.get("vision_cfg"), dict):
        raise ValueError(f"model.vision_tower=open_clip:{name}: no vision_cfg there; this is no config of open_clip")
    if not isinstance(model["vision_cfg"].get("image_size", 224), int):
        raise ValueError(f"model.vision_tower=open_clip:{name}: its pictures are not square")
    return {**model, "preprocess_cfg": raw.get("preprocess_cfg") or {}}


def open_clip_timm(model: dict[str, Any]) -> tuple[str, int] | None:
    """Architecture and image size where the tower of an open_clip config is timm's, else None."""
    vision = model["vision_cfg"]
    name = vision.get("timm_model_name")
    return None if name is None else (str(name), int(vision.get("image_size", 224)))


def clip_config(model: dict[str, Any], name: str) -> CLIPVisionConfig:
    """The vision transformer of an open_clip config as a config of transformers.

    Raises:
        ValueError: it is a ResNet or has parts that CLIP's class in transformers does not have.
    """
    vision = {key: value for key, value in model["vision_cfg"].items() if value is not None}
    where = f"model.vision_tower=open_clip:{name}"
    if not isinstance(vision.get("layers", 12), int):
        raise ValueError(f"{where}: its tower is a ResNet, and only vision transformers are read")
    other = sorted(key for key in set(vision) - _SIZES - _HARMLESS if vision[key] not in (False, 0))
    if other:
        raise ValueError(f"{where}: its tower has {', '.join(other)}, which CLIP's class in transformers does not know")
    width = int(vision.get("width", 768))
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=int(vision.get("layers", 12)),
        num_attention_heads=width // int(vision.get("head_width", 64)),
        image_size=int(vision.get("image_size", 224)),
        patch_size=int(vision.get("patch_size", 16)),
        hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu",
    )


def clip_state(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """open_clip's tensors under the names of transformers' CLIP tower.

    Args:
        state: of the whole model or of its tower.
        wanted: of the tower to fill; its last norm, which is behind all features, stays as it is where an attentional
            pool gave it another width.

    Raises:
        ValueError: a tensor is missing, has no place, or has another shape.
    """
    tower = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")} or state
    found: dict[str, Tensor] = {}
    for key, tensor in tower.items():
        found.update(_renamed(key, tensor))
    pooled = any(key.startswith("attn_pool.") for key in found)
    for key in [key for key in found if pooled and key.startswith(_NORM_BEHIND)]:
        found[key] = wanted[key]
    unplaced = sorted(key for key in found if key not in wanted and not key.startswith(_BEHIND))
    missing = sorted(key for key in wanted if key not in found and not key.endswith("position_ids"))
    if missing or unplaced:
        raise ValueError(f"{source}: missing {missing[:3] or 'nothing'}, without a place {unplaced[:3] or 'nothing'}")
    kept = {key: tensor for key, tensor in found.items() if key in wanted}
    for key, tensor in kept.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{source}: {key} is {tuple(tensor.shape)} and its config asks for {tuple(wanted[key].shape)}"
            )
    positions = {key: value for key, value in wanted.items() if key.endswith("position_ids")}
    return {**positions, **kept}


def _renamed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of open_clip under transformers' names; the joint matrix of query, key and value becomes three."""
    outside = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    if not key.startswith("transformer.resblocks."):
        return {outside.get(key, key): tensor}
    _, _, index, rest = key.split(".", 3)
    layer = f"encoder.layers.{index}"
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{name}_proj.{kind}": part.contiguous() for name, part in parts}
    name, kind = rest.rsplit(".", 1)
    return {f"{layer}.{_RENAMED.get(name, name)}.{kind}": tensor}


def naflex_config(flexible: Any, image_size: int) -> SiglipVisionConfig:
    """The config of a SigLIP tower with the sizes of a NaFlex one.

    Raises:
        ValueError: the image size is no multiple of the patch.
    """
    _check_multiple(image_size, flexible)
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
            "hidden_act", "layer_norm_eps", "attention_dropout", "patch_size")  # fmt: skip
    sizes = {key: getattr(flexible, key) for key in same}
    return SiglipVisionConfig(**sizes, image_size=image_size, vision_use_head=False)


@torch.no_grad()
def siglip_from_naflex(flexible: Any, image_size: int) -> SiglipVisionModel:
    """SigLIP2's NaFlex tower (2502.14786, section 2.4) at one square size, as a SigLIP tower with the same outputs.

    The flexible tower takes a list of flattened patches, whose linear map is the convolution of the other, and resizes
    its position table (bilinear, antialiased) to the grid of each picture, which is done here once and for all.

    Args:
        flexible: a `Siglip2VisionModel`.
        image_size: side of the pictures, a multiple of the patch.

    Raises:
        ValueError: the size is no multiple of the patch.
    """
    fixed = SiglipVisionModel(naflex_config(flexible.config, image_size))
    patch = int(flexible.config.patch_size)
    state = {key: tensor for key, tensor in flexible.state_dict().items() if not key.startswith("head.")}
    table = state.pop("embeddings.position_embedding.weight").float()
    side = round(table.shape[0] ** 0.5)
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    wanted = (image_size // patch, image_size // patch)
    grid = F.interpolate(grid, size=wanted, mode="bilinear", align_corners=False, antialias=True)
    weight = state.pop("embeddings.patch_embedding.weight")  # columns by row, column, channel of the patch
    state["embeddings.position_embedding.weight"] = grid.flatten(2)[0].T.contiguous()
    state["embeddings.patch_embedding.weight"] = (
        weight.reshape(-1, patch, patch, int(flexible.config.num_channels)).permute(0, 3, 1, 2).contiguous()
    )
    positions = {key: value for key, value in fixed.state_dict().items() if key.endswith("position_ids")}
    fixed.load_state_dict({**positions, **state})
    return fixed.eval()


def resized_config(config: Any, image_size: int) -> Any:
    """The config of a DINOv2 tower at another image size.

    Raises:
        ValueError: the size is no multiple of the patch.
    """
    if image_size != int(config.image_size):
        _check_multiple(image_size, config)
    resized = copy.deepcopy(config)
    resized.image_size = image_size
    return resized


@torch.no_grad()
def dinov2_at(tower: Any, image_size: int) -> Any:
    """A DINOv2 tower (2304.07193) at another image size, with the outputs that it has for such pictures.

    Its own code resamples the position table for every picture of another size; here it does so once and for all.

    Args:
        tower: a `Dinov2Model` or `Dinov2WithRegistersModel`.
        image_size: side of the pictures, a multiple of the patch.

    Raises:
        ValueError: the size is no multiple of the patch.
    """
    if image_size == int(tower.config.image_size):
        return tower
    config = resized_config(tower.config, image_size)
    num_tokens = 1 + (image_size // int(config.patch_size)) ** 2
    state = tower.state_dict()
    like = torch.empty(1, num_tokens, int(config.hidden_size))
    table = tower.embeddings.interpolate_pos_encoding(like, image_size, image_size)
    moved = type(tower)(config)
    moved.load_state_dict({**state, "embeddings.position_embeddings": table.contiguous()})
    return moved.eval()


def _check_multiple(image_size: int, config: Any) -> None:
    if image_size < 1 or image_size % int(config.patch_size):
        raise ValueError(
            f"model.image_size={image_size}: must be a multiple of the tower's patch of {config.patch_size}"
        )
