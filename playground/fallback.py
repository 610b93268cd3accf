"""What stands in for the bundled language model when it cannot be had: a small tokenizer and random weights.

The drawings that replace missing picture assets are in `forms.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
SPECIAL_TOKENS = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN]
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "default": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


class FallbackError(ValueError):
    """A size that does not exist, or a vocabulary too small for all bytes."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the marks of ChatML and `<image>`, trained on `texts`; ids 0 pad, 1 start, 2 end, 3 image.

    Digits are single tokens, as in SmolLM2. The same texts give the same tokenizer.

    Raises:
        FallbackError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB:
        raise FallbackError(f"vocab_size {vocab_size} is too small: the bytes and special tokens need {MIN_VOCAB}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def random_language_model(
    tokenizer: PreTrainedTokenizerFast, out_dir: Path, size: str = "smoke", seed: int = 0
) -> LlamaForCausalLM:
    """Writes a random Llama (float32, tied embeddings) for `tokenizer`, and the tokenizer, to `out_dir`.

    The embedding has the next multiple of 64 rows. The global random state is left as it was.

    Raises:
        FallbackError: no such size.
    """
    if size not in SIZES:
        raise FallbackError(f"unknown size {size!r} of the random language model; known: {', '.join(SIZES)}")
    ids: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    rows = -(-len(tokenizer) // 64) * 64
    config = LlamaConfig(vocab_size=rows, tie_word_embeddings=True, max_position_embeddings=2048, **SIZES[size], **ids)
    config.dtype = torch.float32
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.source_package = "random weights"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    out_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return model.eval()
