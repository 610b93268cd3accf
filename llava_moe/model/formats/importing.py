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
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from llava_moe.model.assemble import IMAGE_TOKEN
from llava_moe.model.families import family_of
from llava_moe.model.formats.cumo import read_cumo
from llava_moe.model.formats.decoder import decoder_config
from llava_moe.model.formats.detect import LAYOUTS, detect
from llava_moe.model.formats.llava import mixtral_experts, read_lora, read_projector, read_whole
from llava_moe.model.formats.llava_hf import read_hf
from llava_moe.model.formats.moe_llava import read_moe_llava
from llava_moe.model.formats.parts import Options, Parts
from llava_moe.model.formats.target import Placed, place, write
from llava_moe.model.formats.tensors import Lazy, State
from llava_moe.model.formats.tiles import Seeing, read_seeing
from llava_moe.model.formats.tower import Tower, read_tower
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.projectors import PROJECTORS
from llava_moe.model.streaming import MAX_SHARD_BYTES, TensorInfo

_ROW_MULTIPLE = 64
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_NEEDS_BASE = ("llava_projector", "llava_lora")
_LINEAR = re.compile(r"(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class Imported:
    """What will be written, and what the data side needs to make the processor.

    Attributes:
        layout: a key of `LAYOUTS`.
        tokenizer: knows `<image>`; None where the source has a processor of its own.
        tower_folder: with the image processor's config; None likewise.
        generation: a generation_config.json to copy, if there is one.
        new_rows: rows that were added to the vocabulary.
        parents: what it is made of, as the user or config.json named it.
        tiling: of the processor; None where a picture is taken whole.
    """

    layout: str
    config: Any
    placed: Placed
    image_mode: str | None
    tokenizer: Any = None
    tower_folder: Path | None = None
    num_additional_image_tokens: int = 0
    generation: Path | None = None
    new_rows: int = 0
    parents: tuple[str, ...] = ()
    tiling: dict[str, Any] | None = None

    def write(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Writes weights, config.json and generation_config.json into an existing directory."""
        write(self.placed, folder, max_shard_bytes)
        infos = [lazy.info for name, lazy in self.placed.sources.items() if "embed_tokens" in name]
        family = family_of(self.config)
        self.config.architectures = [] if family is None else [family.model.__name__]
        self.config.dtype = str(infos[0].dtype).removeprefix("torch.")
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
    if layout not in _NEEDS_BASE and options.base is not None:
        raise CheckpointError(
            f"--base {options.base}: {path} is complete without it ({LAYOUTS[layout]}); leave --base out"
        )
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
    tower = read_tower(parts, options)
    seeing = read_seeing(parts, options, tower.config.image_size)
    text = decoder_config(parts.decoder, parts.raw, parts.where)
    tokenizer = _tokenizer(parts.text, text)
    new_rows = _grow(parts, text, len(tokenizer))
    config = _config(parts, text, tower, seeing, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))
    state = _by_our_names(parts, tower)
    if parts.newline is not None and seeing.has_newline:
        state["model.image_newline"] = parts.newline
    placed = place(config, state, parts.where)
    if parts.newline is not None and not seeing.has_newline:
        placed.left_out.append(parts.newline.origin)
    generation = next((f for p in (path, parts.text) if (f := p / "generation_config.json").is_file()), None)
    named = (path, options.base, options.tower or parts.raw.get("mm_vision_tower"))
    return Imported(
        layout,
        config,
        placed,
        seeing.image_mode,
        tokenizer,
        tower.folder,
        tower.num_extra,
        generation,
        new_rows,
        tuple(str(parent) for parent in named if parent is not None),
        seeing.tiling,
    )


def _tokenizer(folder: Path, text: Any) -> Any:
    known = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    absent = [name for name, there in known.items() if not there]
    if absent and (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: its tokenizer.model is read with sentencepiece and protobuf; pip install {' '.join(absent)}"
        )
    try:
        # with the decoder's config: that in the directory has a model_type that transformers does not know
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=text, local_files_only=True)
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


def _config(parts: Parts, text: Any, tower: Tower, seeing: Seeing, image_token: int) -> Any:
    values = dict(seeing.values)
    if hasattr(seeing.config_class, "video_token_index"):
        values["video_token_index"] = image_token  # of videos as the stock class takes them; here they are <image> too
    return seeing.config_class(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=tower.num_tokens,
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy=tower.strategy,
        multimodal_projector_bias=any(name.endswith("bias") for name in parts.projector),
        projector=_projector_kind(parts),
        tie_word_embeddings=bool(text.tie_word_embeddings),
        moe=parts.moe or None,
        **values,
    )


def _projector_kind(parts: Parts) -> str:
    """Our name of the projector that the tensors are of: LLaVA's linear map, or N of them with activations between.

    Raises:
        CheckpointError: there are none, they are of no projector that is known, or config.json names another.
    """
    if "projector" in parts.moe:
        return "mlp2x_gelu"
    if not parts.projector:
        raise CheckpointError(f"{parts.where}: no tensors of a projector (mm_projector.*)")
    asked = parts.raw.get("mm_projector_type")
    foreign = [name for name in parts.projector if name not in ("weight", "bias") and not _LINEAR.fullmatch(name)]
    indices = sorted({int(match[1]) for name in parts.projector if (match := _LINEAR.fullmatch(name)) is not None})
    depth = max(len(indices), 1)
    found = "linear" if depth == 1 else f"mlp{depth}x_gelu"
    if foreign or indices != [2 * number for number in range(len(indices))] or found not in PROJECTORS:
        wrong = parts.projector[foreign[0] if foreign else list(parts.projector)[-1]]
        raise CheckpointError(
            f"{wrong.origin}: belongs to no projector that can be imported (mm_projector_type {asked!r}); known: "
            "linear, mlp2x_gelu to mlp4x_gelu, smoe_mlp"
        )
    if asked is not None and asked not in (found, f"mlp{depth}x_gelu"):
        raise CheckpointError(
            f"{parts.projector[list(parts.projector)[-1]].origin}: is of a projector {found}, but config.json says "
            f"mm_projector_type={asked!r}"
        )
    return found


def _by_our_names(parts: Parts, tower: Tower) -> State:
    """All tensors, named as the parameters of our model."""
    state: State = {}
    for name, lazy in parts.decoder.items():
        state[f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name] = lazy
    for name, lazy in parts.projector.items():
        match = _LINEAR.fullmatch(name)
        if match is not None:
            name = f"linear_{1 + int(match[1]) // 2}.{match[2]}"
        elif name in ("weight", "bias"):
            name = f"linear_1.{name}"
        state[f"model.multi_modal_projector.{name}"] = lazy
    return state | {f"model.vision_tower.{name}": lazy for name, lazy in tower.state.items()}


def _from_hf(path: Path, state: State, options: Options) -> Imported:
    """The stock class: the same tensors under our config."""
    config, named, left_out = read_hf(path, state)
    if options.tower is not None:
        raise CheckpointError(f"--vision-tower {options.tower}: {path} holds its own; leave --vision-tower out")
    placed = place(config, named, str(path))
    placed.left_out += left_out
    generation = path / "generation_config.json"
    return Imported(
        "llava_hf",
        config,
        placed,
        options.image_mode,
        generation=generation if generation.is_file() else None,
        parents=(str(path),),
    )
