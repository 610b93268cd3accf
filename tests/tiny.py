"""Tiny parts for tests, all built in memory and the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path

import llava_moe  # noqa: F401  before anything that may import torchvision

from PIL import Image, ImageDraw  # isort: skip
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers  # isort: skip
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


def tiny_siglip_processor(
    template: str = "chatml",
    image_mode: str = "square",
    image_size: int = 16,
    patch_size: int = 8,
    tokenizer: PreTrainedTokenizerFast | None = None,
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
