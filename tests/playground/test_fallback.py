"""The substitutes of the language model and of the drawings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from playground import forms
from playground.fallback import FallbackError, random_language_model, train_tokenizer

TEXTS = ["what color is the shape?", "is there a red circle in the image?", "the digit 7"] * 20


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<image>\nIs there a naïve 😀 42?<|im_end|>"
    for candidate in (tokenizer, loaded):
        ids = candidate(text).input_ids
        assert ids[0] == candidate.convert_tokens_to_ids("<image>") == 3
        assert (ids[-1], candidate.eos_token_id, candidate.pad_token_id) == (2, 2, 0)
        assert candidate.decode(ids) == text
    assert train_tokenizer(TEXTS, 320).get_vocab() == tokenizer.get_vocab()


def test_chat_template_ends_with_the_assistant(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 320)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_vocabulary_must_hold_all_bytes() -> None:
    with pytest.raises(FallbackError, match="260"):
        train_tokenizer(TEXTS, 200)


def test_random_model_is_stock_and_seeded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    before = torch.random.get_rng_state()
    first = random_language_model(tokenizer, tmp_path / "a", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    random_language_model(tokenizer, tmp_path / "b", seed=1)
    other = random_language_model(tokenizer, tmp_path / "c", seed=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(first.state_dict()[name], value) for name, value in loaded.state_dict().items())
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert loaded.config.vocab_size % 64 == 0
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    with pytest.raises(FallbackError, match="smoke"):
        random_language_model(tokenizer, tmp_path / "d", size="huge")


def test_every_form_draws_something_of_its_own() -> None:
    catalogue = forms.form_catalogue(32)
    pictures = {thing.key: forms.draw_form(thing.key, 32, (0, 0, 0)).tobytes() for thing in catalogue.things}
    assert len(set(pictures.values())) == len(catalogue.things) == 19
    assert len(catalogue.kinds) == 4
    assert {thing.kind for thing in catalogue.select(held_out=True)} == set(catalogue.kinds)


@pytest.mark.parametrize("shape", forms.SHAPES)
def test_shapes_have_their_colour(shape: str) -> None:
    picture = np.asarray(forms.draw_shape(shape, "red", 32, np.random.default_rng(0)))
    reds = (np.abs(picture.astype(int) - forms.COLOURS["red"]).sum(-1) < 30).sum()
    assert 20 < reds < 500


def test_flags_and_digits_differ() -> None:
    assert len({forms.draw_flag(flag, 32).tobytes() for flag in forms.FLAGS}) == len(forms.FLAGS)
    digits = {forms.draw_digit(digit, 32, np.random.default_rng(0)).tobytes() for digit in range(10)}
    assert len(digits) == 10
