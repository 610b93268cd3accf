"""Which attention a run gets, on machines with and without what FlashAttention needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from llava_moe.model import attention
from llava_moe.model.assemble import load_model
from llava_moe.model.attention import FLASH, attention_of, check_name, resolve_attention
from tests.model.inputs import logits_of, picture_batch
from tests.tiny_model import tiny_text_config

LLAMA = tiny_text_config("llama")
HALF = torch.bfloat16


class Machine:
    """A GPU of a compute capability, with these versions of FlashAttention."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def be(self, capability: int, *versions: int) -> None:
        self.patch.setattr(torch.cuda, "get_device_capability", lambda *args: (capability, 0))
        for version in (2, 3, 4):
            name = f"is_flash_attn_{version}_available"
            self.patch.setattr(attention.import_utils, name, lambda v=version: v in versions, raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("capability", "versions", "name"),
    [
        (9, (2, 3), "flash_attention_3"),
        (9, (2,), "flash_attention_2"),
        (8, (2, 3), "flash_attention_2"),  # the 3 is for Hopper
        (10, (2,), "flash_attention_2"),
        (9, (4,), None),  # a beta is for those who name it
        (9, (), None),
        (7, (2, 3), None),
    ],
)
def test_auto_takes_the_best_there_is(
    capability: int, versions: tuple[int, ...], name: str | None, machine: Machine
) -> None:
    machine.be(capability, *versions)
    expected = None if name is None else {"text_config": name}
    assert resolve_attention("auto", LLAMA, HALF, "cuda") == expected
    assert resolve_attention("auto", LLAMA, torch.float32, "cuda") is None
    assert resolve_attention("auto", LLAMA, HALF, "cpu") is None


def test_auto_asks_the_decoder(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    machine.be(9, 2)
    monkeypatch.setattr(LlamaPreTrainedModel, "_supports_flash_attn", False)
    assert resolve_attention("auto", LLAMA, HALF, "cuda") is None
    assert resolve_attention("flash_attention_2", None, HALF, "cuda") == {"text_config": "flash_attention_2"}
    with pytest.raises(ValueError, match=r"transformers' llama does not support it"):
        resolve_attention("flash_attention_2", LLAMA, HALF, "cuda")


@pytest.mark.parametrize(
    ("asked", "dtype", "device", "words"),
    [
        ("flash_attention_2", HALF, "cpu", "FlashAttention needs a GPU; use auto or sdpa"),
        ("flash_attention_3", HALF, "cuda", "is not installed: build the folder hopper"),
        ("flash_attention_2", torch.float32, "cuda", r"set train\.bf16=true"),
        ("flash_attention_4", HALF, "cuda", "compute capability 8.0, and it needs at least 9.0"),
        ("flex_attention", HALF, "cpu", "no backward pass"),
        ("flash_attention", HALF, "cuda", "is unknown; did you mean 'flash_attention_4'"),
        ("owner/kernel", HALF, "cuda", "pip install kernels"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_mend(
    asked: str, dtype: torch.dtype, device: str, words: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.be(8, 2, 4)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"^model.attn_implementation={asked}.*{words}"):
        resolve_attention(asked, LLAMA, dtype, device)


def test_without_the_package_the_line_to_install_it_is_said(machine: Machine) -> None:
    machine.be(8)
    with pytest.raises(ValueError, match=r"pip install flash-attn --no-build-isolation; or use auto"):
        resolve_attention("flash_attention_2", LLAMA, HALF, "cuda")


def test_plain_names_are_for_all_parts() -> None:
    for name in ("eager", "sdpa"):
        assert resolve_attention(name, LLAMA, torch.float32, "cpu") == name
    for name in ("auto", "eager", "sdpa", "flex_attention", *FLASH):
        check_name(name)


def test_on_a_cpu_auto_is_sdpa_bit_for_bit(dense_checkpoint: Path) -> None:
    auto = resolve_attention("auto", LLAMA, torch.float32, "cpu")
    found, expected = (load_model(dense_checkpoint, attn_implementation=name) for name in (auto, "sdpa"))
    assert attention_of(found) == attention_of(expected) == "sdpa"
    batch = picture_batch(found)
    assert torch.equal(logits_of(found, **batch), logits_of(expected, **batch))


def test_a_decoder_s_attention_leaves_the_tower_alone(dense_checkpoint: Path) -> None:
    calls = []
    sdpa: Any = AttentionInterface()["sdpa"]

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(type(args[0]).__name__)
        return sdpa(*args, **kwargs)

    AttentionInterface.register("counted_sdpa", counted)
    try:
        asked = resolve_attention("counted_sdpa", LLAMA, torch.float32, "cpu")
        model = load_model(dense_checkpoint, attn_implementation=asked)
        logits_of(model, **picture_batch(model))
        assert attention_of(model) == "counted_sdpa"
        assert set(calls) == {"LlamaAttention"}
    finally:
        del AttentionInterface._global_mapping["counted_sdpa"]
