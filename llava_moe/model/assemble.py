"""Tower + projector + decoder -> a first checkpoint; and the strict loading of checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from llava_moe.config import ModelSection
from llava_moe.model.families import FAMILIES, MODEL_TYPES, build_model, family_of, our_config
from llava_moe.model.head import logit_changes
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.vision_load import count_tokens, load_tower

IMAGE_TOKEN = "<image>"
ADAPTER_CONFIG = "adapter_config.json"  # peft's
_PROBE = 1 << 20


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
    move_into_place(partial, target)


def move_into_place(whole: Path, target: Path) -> None:
    """Gives a whole directory its name; an earlier result of that name is there until the new one is."""
    earlier = target.with_name(target.name + ".earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if target.exists():
        target.rename(earlier)
    whole.rename(target)
    shutil.rmtree(earlier, ignore_errors=True)


def check_checkpoint(path: str | Path, admits: Callable[[str | None], bool] | None = None) -> Path:
    """Looks at a checkpoint directory without loading its weights.

    Args:
        path: the directory.
        admits: says of other values of model_type whether they are readable too.

    Raises:
        CheckpointError: it is no directory, has no config.json or no weights, holds adapters alone, or is of another
            kind of model.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path}: holds LoRA adapters and no whole model; put them into their base with `llava-moe merge {path}` "
            "(LLaVA's own LoRA checkpoints with `llava-moe import`), and name the result"
        )
    if not config_file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise CheckpointError(f"{path}: no config.json there (found {found}); name the directory of one checkpoint")
    try:
        config = json.loads(config_file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{config_file}: not valid JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in MODEL_TYPES and not (admits is not None and admits(model_type)):
        raise CheckpointError(f"{path}: its model_type is {model_type!r}; this program reads {', '.join(MODEL_TYPES)}")
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
        mark_file(digest, file)
    return digest.hexdigest()


def mark_file(digest: Any, file: Path) -> None:
    """Adds name, size, head and tail (1 MiB each) of a file to a `hashlib` digest."""
    size = file.stat().st_size
    digest.update(f"{file.name} {size}".encode())
    with file.open("rb") as handle:
        digest.update(handle.read(_PROBE))
        handle.seek(max(size - _PROBE, 0))
        digest.update(handle.read(_PROBE))


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str | dict[str, str] | None = None
) -> Any:
    """Loads a checkpoint of ours or a stock llava-hf one, in eval mode; attention is SDPA where its parts have it.

    Raises:
        CheckpointError: the directory is no such checkpoint, or tensors are missing.
    """
    path = check_checkpoint(path)
    config = our_config(AutoConfig.from_pretrained(path))
    family = family_of(config)
    assert family is not None  # check_checkpoint has looked
    model = family.model.from_pretrained(path, config=config, dtype=dtype, attn_implementation=attn_implementation)
    return model.eval()


@dataclass(frozen=True)
class Assembled:
    """A first model and what the data side must know to make its processor.

    Attributes:
        num_additional_image_tokens: tokens of a picture beyond its patches, the class token included also where it is
            dropped; negative behind a projector that merges features.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    num_additional_image_tokens: int


def assemble(section: ModelSection, seed: int = 0, merging: Mapping[str, Any] | None = None) -> Assembled:
    """Puts a tower, a fresh projector and a decoder together.

    Args:
        section: the parts, and the family (llava if it names none).
        seed: of the projector and the newline vector.
        merging: for a family with tiles, config values that say how they become a sequence.

    Raises:
        ValueError: a part is not named or does not exist, or the feature selection does not fit the tower.
    """
    torch.manual_seed(seed)
    if section.language_model is None or section.vision_tower is None:
        raise ValueError("model: name a checkpoint, or a vision_tower and a language_model to assemble one")
    decoder, tokenizer, growth = _load_decoder(section)
    tower = load_tower(section)
    num_features, num_patches = count_tokens(tower, section)
    family = FAMILIES.get(section.family or "llava")
    image_token = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # type: ignore[arg-type]
    config = family.config(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token,
        vision_feature_layer=section.vision_feature_layer,
        vision_feature_select_strategy=section.vision_feature_select_strategy,
        projector=section.projector,
        projector_args=section.projector_args,
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
        logit_bias=decoder.get_output_embeddings().bias is not None,
        vocabulary_growth=growth,
        **logit_changes(decoder.config),
        **(merging or {}),
    )
    if hasattr(config, "video_token_index"):
        config.video_token_index = image_token  # of videos as the stock class takes them; ours stand behind <image> too
    model = build_model(config).eval()
    num_tokens = model.model.multi_modal_projector.num_output_tokens(num_features)
    config.image_seq_length = num_tokens
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.base_model.state_dict())
    model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
    model.generation_config = decoder.generation_config
    _check_same_answers(model, decoder, section)
    _calibrate_projector(model)
    # the processor counts patches, adds this number and takes one off for a class token
    dropped = 1 if section.vision_feature_select_strategy == "default" else 0
    return Assembled(model, tokenizer, num_tokens + dropped - num_patches)


def _load_decoder(section: ModelSection) -> tuple[Any, PreTrainedTokenizerBase, dict[str, Any] | None]:
    """The decoder with an image token, its tokenizer, and what was added to its vocabulary."""
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
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model.language_model={source}: the vocabulary projection of {type(decoder).__name__} is no linear map, "
            "and LLaVA's is; choose another decoder"
        )
    is_new = IMAGE_TOKEN not in tokenizer.get_vocab()
    if is_new:
        # without the flag the decoder's own extra special tokens would be forgotten
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    rows = decoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        # Rows are added at the mean of the others, and to a multiple of 64 as GPUs like it.
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=True)
    after = decoder.get_input_embeddings().weight.shape[0]
    growth = {"tokens": [IMAGE_TOKEN] if is_new else [], "before": rows, "after": after}
    return decoder, tokenizer, growth if is_new or after > rows else None


@torch.no_grad()
def _check_same_answers(model: Any, decoder: Any, section: ModelSection) -> None:
    """A decoder that does to its logits what our head does not know would silently become another one.

    Raises:
        ValueError: on text alone, the assembled model's logits are not the decoder's.
    """
    ids = torch.arange(min(16, decoder.config.vocab_size)).unsqueeze(0)
    expected = decoder.eval()(input_ids=ids).logits.float()
    found = model(input_ids=ids).logits.float()
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"model.language_model={section.language_model}: {type(decoder).__name__} changes its logits after the "
            f"vocabulary projection (by {(found - expected).abs().max():.2g}) in another way than those that "
            "llava_moe/model/head.py knows; choose another decoder"
        )


@torch.no_grad()
def _calibrate_projector(model: Any) -> None:
    """Scales a fresh projector so that picture embeddings start at the scale of word embeddings.

    Small decoders have word embeddings of a tiny or large scale; a projector from its default initialisation misses it
    by an order of magnitude, and the first steps are then spent on the scale alone.
    """
    size = model.config.vision_config.image_size
    noise = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    embedded = torch.stack(list(model.model.picture_features(noise, return_dict=True).pooler_output))
    words = model.get_input_embeddings()
    some = torch.arange(min(1024, len(words.weight)))
    inside = words(some).std() / words.weight[some].std()  # 1, but Gemma scales its embeddings inside of the module
    scale = words.weight.std() * inside / embedded.std().clamp(min=1e-6)
    model.model.multi_modal_projector.scale_output(scale)
