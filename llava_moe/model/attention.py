"""Which attention a run uses: FlashAttention where it can be had, else SDPA; settled before any weight is loaded.

FlashAttention matters to the decoder: rows of several samples have an attention of blocks, for which SDPA needs a mask
and a slower kernel. A tower looks at whole pictures without a mask, where SDPA runs the same algorithm; it keeps SDPA.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AutoModel
from transformers.utils import import_utils

from llava_moe.registry import near_misses

AUTO = "auto"
_PLAIN = ("eager", "sdpa")
_FLEX = "flex_attention"
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Flash:
    """One FlashAttention.

    Attributes:
        least: compute capability that it needs, the number before the point.
        best: those that `auto` takes it on.
        install: how to get it.
    """

    version: int
    least: int
    best: tuple[int, ...]
    install: str

    def is_found(self) -> bool:
        """Whether its package is there; as transformers looks for it, which older versions do not for all of them."""
        look = getattr(import_utils, f"is_flash_attn_{self.version}_available", None)
        return look is not None and bool(look())


# In the order in which `auto` asks: the 3 is written for Hopper, the 2 runs from Ampere on, the 4 is not out of beta.
FLASH: dict[str, _Flash] = {
    "flash_attention_3": _Flash(3, 8, (9,), "build the folder hopper of Dao-AILab/flash-attention"),
    "flash_attention_2": _Flash(2, 8, (8, 9, 10, 11, 12), "pip install flash-attn --no-build-isolation"),
    "flash_attention_4": _Flash(4, 9, (), "pip install --pre flash-attn-4"),
}


def resolve_attention(
    asked: str, text_config: Any | None, compute_dtype: torch.dtype, device: str
) -> str | dict[str, str] | None:
    """What to hand to `from_pretrained` for a recipe's `model.attn_implementation`.

    Args:
        asked: auto, eager, sdpa, flex_attention, flash_attention_2 or _3, a kernel of the hub (`owner/name`), or a
            function registered in transformers' AttentionInterface.
        text_config: of the decoder; None where it is not there yet, and what it supports is not looked at.
        compute_dtype: of its matrix products.
        device: kind of the device that will train.

    Returns:
        One name for all parts; the decoder's alone, by its key in the config; or None for transformers' own choice,
        which is SDPA where a part has it.

    Raises:
        ValueError: what is asked for is unknown or cannot be had here; says how to get it.
    """
    if asked == AUTO:
        usable = (name for name in FLASH if _is_best(name, text_config, compute_dtype, device))
        name = next(usable, None)
        return None if name is None else {"text_config": name}
    check_name(asked)
    where = f"model.attn_implementation={asked}"
    if asked in _PLAIN:
        return asked
    if asked in FLASH:
        _check_flash(asked, text_config, compute_dtype, device, where)
    elif "/" in asked:
        if importlib.util.find_spec("kernels") is None:
            raise ValueError(f"{where}: kernels of the hub need the package kernels: pip install kernels")
    elif asked == _FLEX and device == "cpu":
        raise ValueError(f"{where}: on a CPU it has no backward pass; use auto or sdpa")
    return {"text_config": asked}


def check_name(asked: str) -> None:
    """Raises ValueError for a name that no machine knows."""
    if asked not in (AUTO, *_PLAIN, _FLEX, *FLASH, *AttentionInterface().valid_keys()) and "/" not in asked:
        known = [AUTO, *_PLAIN, _FLEX, *FLASH]
        raise ValueError(f"model.attn_implementation={asked} is unknown; {near_misses(asked, known)}")


def attention_of(model: Any) -> str:
    """The attention of a loaded model's decoder."""
    return str(model.config.get_text_config()._attn_implementation)


def _supports_flash(text_config: Any) -> bool:
    decoder: Any = AutoModel._model_mapping[type(text_config)]  # type: ignore[attr-defined]
    return bool(decoder._supports_flash_attn)


def _is_best(name: str, text_config: Any, dtype: torch.dtype, device: str) -> bool:
    flash = FLASH[name]
    if device != "cuda" or dtype not in _HALF or text_config is None or not flash.is_found():
        return False
    return torch.cuda.get_device_capability()[0] in flash.best and _supports_flash(text_config)


def _check_flash(asked: str, text_config: Any | None, dtype: torch.dtype, device: str, where: str) -> None:
    flash = FLASH[asked]
    if device != "cuda":
        raise ValueError(f"{where}: FlashAttention needs a GPU; use auto or sdpa")
    if not flash.is_found():
        raise ValueError(f"{where} is not installed: {flash.install}; or use auto, which does without")
    major, minor = torch.cuda.get_device_capability()
    if major < flash.least:
        raise ValueError(
            f"{where}: this GPU has compute capability {major}.{minor}, and it needs at least {flash.least}.0; use auto"
        )
    if dtype not in _HALF:
        raise ValueError(f"{where}: it computes in bfloat16 or float16; set train.bf16=true, or use sdpa")
    if text_config is not None and not _supports_flash(text_config):
        raise ValueError(f"{where}: transformers' {text_config.model_type} does not support it; use auto")
