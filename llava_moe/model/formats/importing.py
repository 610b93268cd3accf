"""A checkpoint of another program in, one of ours out: what to write, decided before anything is written."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llava_moe.model.assemble import IMAGE_TOKEN
from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.formats.cumo import read_cumo
from llava_moe.model.formats.decoder import decoder_config
from llava_moe.model.formats.detect import detect
from llava_moe.model.formats.llava import mixtral_experts, read_lora, read_projector, read_whole
from llava_moe.model.formats.moe_llava import read_moe_llava
from llava_moe.model.formats.parts import Options, Parts
from llava_moe.model.formats.target import Placed, place, write
from llava_moe.model.formats.tensors import Lazy, State, read_json
from llava_moe.model.formats.tower import Tower, read_tower
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.streaming import TensorInfo

_ROW_MULTIPLE = 64
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_IMAGE_MODES = {None: "square", "square": "square", "pad": "pad"}
_HF_NAMES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_tower|multi_modal_projector)\."), r"model.\1."),
)


@dataclass(frozen=True)
class Imported:
    """What will be written, and what the data side needs to make the processor.

    Attributes:
        layout: a key of `LAYOUTS`.
        tokenizer: knows `<image>`; None where the source has a processor of its own.
        tower_folder: with the image processor's config; None likewise.
        generation: a generation_config.json to copy, if there is one.
        new_rows: rows that were added to the vocabulary.
    """

    layout: str
    config: LlavaMoeConfig
    placed: Placed
    image_mode: str | None
    tokenizer: Any = None
    tower_folder: Path | None = None
    num_additional_image_tokens: int = 0
    generation: Path | None = None
    new_rows: int = 0

    def write(self, folder: Path) -> None:
        """Writes weights, config.json and generation_config.json into an existing directory."""
        write(self.placed, folder)
        self.config.save_pretrained(folder)
        if self.generation is not None:
            shutil.copyfile(self.generation, folder / "generation_config.json")
        else:
            text = self.config.text_config
            GenerationConfig(
                bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
            ).save_pretrained(folder)


def plan_import(path: Path, options: Options) -> Imported:
    """Reads names and shapes, and finds a place for every tensor.

    Raises:
        CheckpointError: the layout is unknown or refused, or files, tensors or options are missing.
    """
    for name, folder in (("--base", options.base), ("--vision-tower", options.tower)):
        if folder is not None and not folder.is_dir():
            raise CheckpointError(f"{name} {folder}: no such directory")
    layout, state = detect(path)
    if layout == "llava_hf":
        return _from_hf(path, state, options)
    readers: dict[str, Callable[[], Parts]] = {
        "llava": lambda: read_whole(path, state, options),
        "llava_projector": lambda: read_projector(path, options),
        "llava_lora": lambda: read_lora(path, options),
        "moe_llava": lambda: read_moe_llava(path, state, options),
        "cumo": lambda: read_cumo(path, state, options),
    }
    parts = readers[layout]()
    mixtral_experts(parts)
    image_mode = _image_mode(parts, options)
    tower = read_tower(parts, options)
    text = decoder_config(parts.decoder, parts.raw, parts.where)
    tokenizer = _tokenizer(parts.text)
    new_rows = _grow(parts, text, len(tokenizer))
    config = _config(parts, text, tower, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))
    placed = place(config, _by_our_names(parts, tower), parts.where)
    if parts.newline is not None:
        placed.left_out.append(parts.newline.origin)
    generation = next((f for p in (path, parts.text) if (f := p / "generation_config.json").is_file()), None)
    return Imported(layout, config, placed, image_mode, tokenizer, tower.folder, tower.num_extra, generation, new_rows)


def _image_mode(parts: Parts, options: Options) -> str:
    """Refuses what needs more than one tile of a picture, unless the user says otherwise."""
    if options.image_mode is not None:
        return options.image_mode
    asked, merge = parts.raw.get("image_aspect_ratio"), parts.raw.get("mm_patch_merge_type", "flat")
    if asked not in _IMAGE_MODES or (parts.newline is not None and "unpad" in str(merge)):
        raise CheckpointError(
            f"{parts.where}: image_aspect_ratio={asked!r} with mm_patch_merge_type={merge!r} needs a model of tiles, "
            "and the models here take one picture whole; --image-mode pad (or square) imports it as such a one"
        )
    if parts.raw.get("mm_use_im_start_end"):
        raise CheckpointError(
            f"{parts.where}: mm_use_im_start_end puts tokens around every picture (LLaVA before 1.5), which no "
            "template here does"
        )
    return _IMAGE_MODES[asked]


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: no tokenizer that can be loaded: {reason}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # as LLaVA does
    return tokenizer


def _grow(parts: Parts, text: Any, num_tokens: int) -> int:
    """Adds rows for `<image>`, at the mean of the others: such a token is never the most likely one.

    The mean row's logit is the mean of all logits.
    """
    rows = text.vocab_size
    if num_tokens <= rows:
        return 0
    text.vocab_size = math.ceil(num_tokens / _ROW_MULTIPLE) * _ROW_MULTIPLE
    for name in _EMBEDDINGS:
        if name in parts.decoder:
            parts.decoder[name] = _grown(parts.decoder[name], rows, text.vocab_size)
    return int(text.vocab_size - rows)


def _grown(lazy: Lazy, rows: int, wanted: int) -> Lazy:
    if lazy.info.shape[0] != rows:
        raise CheckpointError(f"{lazy.origin}: has {lazy.info.shape[0]} rows, and the embedding {rows}")

    def load() -> Tensor:
        weight = lazy.load()
        mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
        return torch.cat([weight, mean.expand(wanted - rows, -1)])

    return Lazy(TensorInfo(lazy.info.dtype, (wanted, *lazy.info.shape[1:])), lazy.origin, load)


def _config(parts: Parts, text: Any, tower: Tower, image_token: int) -> LlavaMoeConfig:
    return LlavaMoeConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=tower.num_tokens,
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy=tower.strategy,  # type: ignore[arg-type]
        multimodal_projector_bias=any(name.endswith("bias") for name in parts.projector),
        projector="linear" if "weight" in parts.projector else "mlp2x_gelu",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        moe=parts.moe or None,
    )


_PROJECTOR_NAMES = {"weight": "linear_1.weight", "bias": "linear_1.bias"} | {
    f"{index}.{kind}": f"linear_{1 + index // 2}.{kind}" for index in (0, 2) for kind in ("weight", "bias")
}


def _by_our_names(parts: Parts, tower: Tower) -> State:
    """All tensors, named as the parameters of our model."""
    state: State = {}
    for name, lazy in parts.decoder.items():
        state[f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name] = lazy
    if not parts.projector:
        raise CheckpointError(f"{parts.where}: no tensors of a projector (mm_projector.*)")
    for name, lazy in parts.projector.items():
        if name not in _PROJECTOR_NAMES and "projector" not in parts.moe:
            raise CheckpointError(
                f"{lazy.origin}: belongs to no projector that can be imported (mm_projector_type "
                f"{parts.raw.get('mm_projector_type')!r}); known: linear, mlp2x_gelu, smoe_mlp"
            )
        state[f"model.multi_modal_projector.{_PROJECTOR_NAMES.get(name, name)}"] = lazy
    return state | {f"model.vision_tower.{name}": lazy for name, lazy in tower.state.items()}


def _from_hf(path: Path, state: State, options: Options) -> Imported:
    """The stock class: the same tensors under our config."""
    raw = read_json(path / "config.json")
    kind = raw.get("model_type")
    if kind != "llava":
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; of transformers' classes only llava (one picture, whole) can be imported"
            + (", and this is a checkpoint of ours already" if kind == LlavaMoeConfig.model_type else "")
        )
    if options.base is not None or options.tower is not None:
        raise CheckpointError(f"{path}: is complete; leave out --base and --vision-tower")
    try:
        stock = AutoConfig.from_pretrained(path).to_dict()
        config = LlavaMoeConfig(**{key: value for key, value in stock.items() if key != "model_type"})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'}: {str(error).splitlines()[0]}") from error
    if "moe" in str(config.text_config.model_type) or config.text_config.model_type == "mixtral":
        raise CheckpointError(
            f"{path}: its decoder ({config.text_config.model_type}) is a mixture of experts of transformers' own, "
            "which cannot be imported yet"
        )
    named: State = {}
    for name, lazy in state.items():
        for pattern, replacement in _HF_NAMES:
            name = pattern.sub(replacement, name)
        named[name] = lazy
    generation = path / "generation_config.json"
    return Imported(
        "llava_hf",
        config,
        place(config, named, str(path)),
        options.image_mode,
        generation=generation if generation.is_file() else None,
    )
