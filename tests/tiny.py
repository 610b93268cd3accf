"""Tiny parts for tests, all built in memory and the same on every machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal, get_args

import llava_moe  # noqa: F401  before anything that may import torchvision

from PIL import Image, ImageDraw  # isort: skip
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers  # isort: skip
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil  # isort: skip

from llava_moe.data.processing import LlavaMoeProcessor  # isort: skip

CHATML_JINJA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle")
_WORDS = (
    *COLOURS, *SHAPES, "colour", "shape", "what", "What", "is", "the", "The", "a", "it", "user", "assistant", "USER",
    "ASSISTANT", "image", "describe", "and",
)  # fmt: skip


def prefix_merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges that build each word from the left, in a fixed order: ("a","b"), ("ab","c"), ..."""
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    return list(dict.fromkeys(merges))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2 style) of about 430 tokens with ChatML: `<|endoftext|>` pads, `<|im_end|>` ends.

    Every word of `_WORDS` is one token at the start of a text and one behind a space; all else falls apart into bytes.
    """
    # words behind a space first, long words first: no merge of a short word then splits a longer one
    by_length = sorted(_WORDS, key=len, reverse=True)
    words = ["Ġ" + word for word in by_length] + by_length
    merges = prefix_merges(words)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<image>"],
        chat_template=CHATML_JINJA,
        model_max_length=512,
    )


def tiny_llama_tokenizer() -> PreTrainedTokenizerFast:
    """A sentencepiece-like BPE as Llama 2 has it: a space before every text, byte fallback, `<s>` first, `</s>` last.

    The words of `_WORDS` are one token each, with and without the space (`▁`); other printable characters are tokens.
    """
    by_length = sorted(_WORDS, key=len, reverse=True)
    merges = prefix_merges(["▁" + word for word in by_length] + by_length)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(33, 127)] + [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        add_bos_token=True,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        chat_template=CHATML_JINJA,
        model_max_length=512,
    )


ChatTokenizer = Literal["gpt2", "llama3", "llama", "llama_first", "phi3", "gemma"]
CHAT_TOKENIZERS = get_args(ChatTokenizer)
# What the templates write, so that each of its words is one token. The golden ids depend on it: append only.
_CHAT_TEXT = """
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. You are a helpful language and vision assistant. You are able to understand the
visual content that the user provides, and assist the user with a variety of tasks using natural language. A
conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers. Answer the
questions. system model INST SYS in one word
"""
_CHAT_WORDS = tuple(sorted({*_WORDS, *re.findall("[A-Za-z]+", _CHAT_TEXT)}, key=lambda word: (-len(word), word)))
_CHAT_MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<image>",
)  # fmt: skip
# how Llama 3 and Qwen cut text: a punctuation mark keeps the newlines behind it
_TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def tiny_chat_tokenizer(kind: ChatTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of each kind that conversation templates meet, with the markers of all of them.

    gpt2: byte-level, no beginning of text, as Qwen's. llama3: byte-level, joins a punctuation mark and newlines,
    `<|begin_of_text|>` first. llama: sentencepiece-like, a space before every text and behind every special token, byte
    fallback, `<s>` first (Llama 2, Vicuna, Mistral). llama_first: the same with a space at the very start only (the
    "non-legacy" kind). phi3: llama without `<s>`, whose markers swallow the white space behind them. gemma:
    sentencepiece-like without any extra space, newlines are tokens, `<bos>` first.
    """
    ends = {"gpt2": (None, "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "gemma": ("<bos>", "<eos>")}
    bos, eos = {**ends, "phi3": ("<s>", "<|endoftext|>")}.get(kind, ("<s>", "</s>"))
    unk = None if kind in ("gpt2", "llama3") else "<unk>"
    own = [token for token in (unk, bos, eos) if token not in (None, *_CHAT_MARKERS)]
    backend = _byte_level(kind) if unk is None else _sentencepiece_like(kind)
    markers = [
        AddedToken(token, special=True, normalized=False, rstrip=kind == "phi3" and token.startswith("<|"))
        for token in (*own, *_CHAT_MARKERS)
    ]
    backend.add_special_tokens(markers)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token="<|endoftext|>",
        add_bos_token=kind not in ("gpt2", "phi3"),
        extra_special_tokens=list(_CHAT_MARKERS),
        chat_template=CHATML_JINJA,
        model_max_length=2048,
    )


def _byte_level(kind: str) -> Tokenizer:
    merges = prefix_merges(["Ġ" + word for word in _CHAT_WORDS] + list(_CHAT_WORDS))
    merges += [("Ċ", "Ċ"), (".", "Ċ"), (".", "ĊĊ"), ("?", "Ċ")] if kind == "llama3" else []
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if kind == "llama3":
        split = pre_tokenizers.Split(Regex(_TIKTOKEN_PATTERN), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_like(kind: str) -> Tokenizer:
    merges = prefix_merges(["▁" + word for word in _CHAT_WORDS] + list(_CHAT_WORDS))
    merges += [("\n", "\n")] if kind == "gemma" else []
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [*(["\n"] if kind == "gemma" else []), *(chr(code) for code in range(33, 127))]
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    if kind == "llama_first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = spaces if kind == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def tiny_siglip_processor(
    template: str = "chatml",
    image_mode: str = "square",
    image_size: int = 16,
    patch_size: int = 8,
    tokenizer: PreTrainedTokenizerFast | None = None,
    template_options: dict[str, object] | None = None,
) -> LlavaMoeProcessor:
    """A processor for a SigLIP-like tower: (image_size / patch_size) ** 2 tokens for each image, strategy "full"."""
    image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    return LlavaMoeProcessor(
        image_processor,
        tokenizer or tiny_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        template=template,
        image_mode=image_mode,
        template_options=template_options,
    )


def tiny_image(index: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A coloured shape on white; the index picks colour and shape."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    box = (4, 4, size[0] - 5, size[1] - 5)
    paint = draw.rectangle if SHAPES[index // len(COLOURS) % len(SHAPES)] == "square" else draw.ellipse
    paint(box, fill=COLOURS[index % len(COLOURS)])
    return image


def write_llava_json(folder: Path, n: int, *, num_turns: int = 1, text_only_every: int = 0) -> tuple[Path, Path]:
    """Writes `n` valid records with one PNG each.

    Args:
        folder: gets data.json and images/.
        n: number of records.
        num_turns: question-answer pairs in each record.
        text_only_every: every k-th record (the k-th, 2k-th, ...) has no image; 0: all have one.

    Returns:
        (data.json, image folder)
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(n):
        has_image = not text_only_every or (index + 1) % text_only_every != 0
        colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index // len(COLOURS) % len(SHAPES)]
        conversations = []
        for turn in range(num_turns):
            question = "What colour is the shape?" if turn % 2 == 0 else "What is the shape?"
            marker = "<image>\n" if turn == 0 and has_image else ""
            conversations.append({"from": "human", "value": marker + question})
            conversations.append({"from": "gpt", "value": colour if turn % 2 == 0 else f"a {shape}"})
        record: dict[str, object] = {"id": f"sample-{index}", "conversations": conversations}
        if has_image:
            record["image"] = f"{index}.png"
            tiny_image(index).save(images / f"{index}.png")
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path, images
