"""Tower + projector + decoder -> a first checkpoint; and the strict loading of checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from llava_moe.config import ModelSection
from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.modeling import CheckpointError, LlavaMoeForConditionalGeneration
from llava_moe.model.vision import TimmTower, timm_tower_config

IMAGE_TOKEN = "<image>"
_TIMM = "timm:"
_PROBE = 1 << 20
_SUPPORTED = ("llava_moe", "llava")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that takes the target's place when the block ends well, and is removed when it does not."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def check_checkpoint(path: str | Path) -> Path:
    """Looks at a checkpoint directory without loading its weights.

    Raises:
        CheckpointError: it is no directory, has no config.json or no weights, or is of another kind of model.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not config_file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise CheckpointError(f"{path}: no config.json there (found {found}); name the directory of one checkpoint")
    try:
        config = json.loads(config_file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{config_file}: not valid JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in _SUPPORTED:
        raise CheckpointError(
            f"{path}: its model_type is {model_type!r}; this program reads {' and '.join(_SUPPORTED)}"
        )
    if not list(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: no *.safetensors there; the checkpoint was not written to its end")
    _check_weight_files(path)
    return path


def _check_weight_files(path: Path) -> None:
    """Reads the headers only: a cut file or an absent shard is found before any weight is loaded."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        absent = sorted(name for name in named if not (path / name).is_file())
        if absent:
            raise CheckpointError(
                f"{path}: {absent[0]} is missing ({len(absent)} of {len(named)} shards); copy it again"
            )
    for file in path.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged or cut short ({error}); copy or write it again") from error


def fingerprint(path: str | Path) -> str:
    """Tells one state of a checkpoint directory from another, without reading all of a large one.

    Hashes name, size, head and tail (1 MiB each) of every weight file, and config.json.
    """
    digest = hashlib.sha256((Path(path) / "config.json").read_bytes())
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_PROBE))
            handle.seek(max(size - _PROBE, 0))
            digest.update(handle.read(_PROBE))
    return digest.hexdigest()


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> LlavaMoeForConditionalGeneration:
    """Loads a checkpoint of ours or a stock llava-hf one, in eval mode; attention is SDPA where its parts have it.

    Raises:
        CheckpointError: the directory is no such checkpoint, or tensors are missing.
    """
    path = check_checkpoint(path)
    kind = json.loads((path / "config.json").read_text())["model_type"]
    config = None
    if kind == "llava":
        stock = AutoConfig.from_pretrained(path).to_dict()
        config = LlavaMoeConfig(**{key: value for key, value in stock.items() if key != "model_type"})
    model = LlavaMoeForConditionalGeneration.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation=attn_implementation
    )
    return model.eval()


@dataclass(frozen=True)
class Assembled:
    """A first model and what the data side must know to make its processor."""

    model: LlavaMoeForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    num_additional_image_tokens: int


def assemble(section: ModelSection, seed: int = 0) -> Assembled:
    """Puts a tower, a fresh projector and a decoder together.

    Raises:
        ValueError: a part is not named or does not exist, or the feature selection does not fit the tower.
    """
    torch.manual_seed(seed)
    if section.language_model is None or section.vision_tower is None:
        raise ValueError("model: name a checkpoint, or a vision_tower and a language_model to assemble one")
    decoder, tokenizer = _load_decoder(section)
    tower = _load_tower(section)
    num_tokens, num_extra = _count_tokens(tower, section)
    config = LlavaMoeConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),  # type: ignore[arg-type]
        image_seq_length=num_tokens,
        vision_feature_layer=section.vision_feature_layer,
        vision_feature_select_strategy=section.vision_feature_select_strategy,  # type: ignore[arg-type]
        projector=section.projector,
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
    )
    model = LlavaMoeForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.base_model.state_dict())
    model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
    model.generation_config = decoder.generation_config
    _check_same_answers(model, decoder, section)
    _calibrate_projector(model)
    return Assembled(model, tokenizer, num_extra)


def _load_decoder(section: ModelSection) -> tuple[Any, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    source = str(section.language_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if section.random_weights:
            decoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        else:
            decoder = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.language_model={source}: {str(error).splitlines()[0]}") from error
    head = decoder.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"model.language_model={source}: the vocabulary projection of {type(decoder).__name__} is no linear map "
            "without bias, and LLaVA's is; choose another decoder"
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        # without the flag the decoder's own extra special tokens would be forgotten
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    rows = decoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        # Rows are added at the mean of the others, and to a multiple of 64 as GPUs like it.
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=True)
    return decoder, tokenizer


@torch.no_grad()
def _check_same_answers(model: Any, decoder: Any, section: ModelSection) -> None:
    """LLaVA's head is a bare linear map: a decoder that scales or caps its logits would silently become another one.

    Raises:
        ValueError: on text alone, the assembled model's logits are not the decoder's.
    """
    ids = torch.arange(min(16, decoder.config.vocab_size)).unsqueeze(0)
    expected = decoder.eval()(input_ids=ids).logits.float()
    found = model(input_ids=ids).logits.float()
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"model.language_model={section.language_model}: {type(decoder).__name__} changes its logits after the "
            f"vocabulary projection (by {(found - expected).abs().max():.2g}), which LLaVA does not; choose another "
            "decoder"
        )


def _load_tower(section: ModelSection) -> Any:
    source = str(section.vision_tower)
    if source.startswith(_TIMM):
        return _load_timm_tower(source.removeprefix(_TIMM), section)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.vision_tower={source}: {str(error).splitlines()[0]}") from error
    config = getattr(config, "vision_config", config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # SigLIP's pooling head is behind every layer that LLaVA reads
    tower = AutoModel.from_config(config)
    if section.random_weights:
        return tower
    loaded, info = type(tower).from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"model.vision_tower={source}: missing {sorted(info['missing_keys'])[:4]}")
    return loaded


def _load_timm_tower(architecture: str, section: ModelSection) -> TimmTower:
    if section.image_size is None:
        raise ValueError("model.image_size must be set for a timm tower")
    tower = TimmTower(timm_tower_config(architecture, section.image_size))
    if section.vision_weights is not None:
        state = {k: v for k, v in load_file(section.vision_weights).items() if not k.startswith("classifier.")}
        tower.backbone.load_state_dict(state)
    elif not section.random_weights:
        raise ValueError(
            f"model.vision_weights must name the safetensors of {architecture}; "
            "set model.random_weights=true to train on a random tower on purpose"
        )
    return tower.eval()


@torch.no_grad()
def _count_tokens(tower: Any, section: ModelSection) -> tuple[int, int]:
    """Tokens of a picture after feature selection, and the tower's tokens beyond its patch grid (CLS: 1)."""
    size, patch = tower.config.image_size, tower.config.patch_size
    features = tower(torch.zeros(1, 3, size, size), output_hidden_states=True).hidden_states
    num_tokens, grid = features[-1].shape[1], (size // patch) ** 2
    strategy, extra = section.vision_feature_select_strategy, num_tokens - grid
    if strategy not in ("default", "full"):
        raise ValueError(f"model.vision_feature_select_strategy={strategy}: must be default or full")
    if strategy == "default" and extra != 1:
        raise ValueError(
            f"model.vision_feature_select_strategy=default drops the first token as CLS, but {section.vision_tower} "
            "has none and would lose a patch; use full"
        )
    if not -len(features) <= section.vision_feature_layer < len(features):
        raise ValueError(
            f"model.vision_feature_layer={section.vision_feature_layer}: {section.vision_tower} has {len(features)} "
            "feature layers"
        )
    return (num_tokens - 1 if strategy == "default" else num_tokens), extra


@torch.no_grad()
def _calibrate_projector(model: Any) -> None:
    """Scales a fresh projector so that picture embeddings start at the scale of word embeddings.

    Small decoders have word embeddings of a tiny or large scale; a projector from its default initialisation misses it
    by an order of magnitude, and the first steps are then spent on the scale alone.
    """
    size = model.config.vision_config.image_size
    noise = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    embedded = torch.stack(list(model.model.get_image_features(pixel_values=noise, return_dict=True).pooler_output))
    scale = model.get_input_embeddings().weight.std() / embedded.std().clamp(min=1e-6)
    output = model.model.multi_modal_projector.output_layer
    output.weight.mul_(scale)
    if output.bias is not None:
        output.bias.mul_(scale)
