"""The frozen linear maps of a decoder in 4 bits (QLoRA, 2305.14314), through bitsandbytes.

NF4 in blocks of 64 weights, the scales of the blocks quantised once more, as the paper has it: 4.13 bits for a weight.
A product multiplies the weights made whole again, in the run's compute dtype. Stacked experts, embeddings and the
vocabulary projection stay as they are: bitsandbytes knows linear layers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llava_moe.config import RecipeError
from llava_moe.model.lora_targets import Target

BLOCK = 64
KINDS = ("nf4",)


def import_bitsandbytes() -> Any:
    """The package.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise RecipeError("lora.quantize needs bitsandbytes: pip install 'llava-moe[qlora]'") from error
    return bitsandbytes


def quantizable(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The linear maps among the targets.

    Raises:
        RecipeError: a width is no multiple of the block size.
    """
    linears = tuple(target for target in targets if target.kind != "experts")
    odd = next((target for target in linears if target.inputs % BLOCK), None)
    if odd is not None:
        raise RecipeError(
            f"lora.quantize: {odd.path} has {odd.inputs} inputs, and nf4 takes them in blocks of {BLOCK}; set "
            "lora.quantize: null"
        )
    return linears


@torch.no_grad()
def quantize_nf4(model: nn.Module, targets: Sequence[Target], compute_dtype: torch.dtype) -> int:
    """Puts 4-bit maps into the place of linear ones, one after the other; returns how many weights that were.

    Args:
        targets: those of stacked experts are left out.
        compute_dtype: of the products.

    Raises:
        RecipeError: bitsandbytes is not installed, or a width is no multiple of the block size.
    """
    linears = quantizable(targets)
    layers = import_bitsandbytes().nn
    for target in linears:
        parent, _, name = target.path.rpartition(".")
        linear = model.get_submodule(target.path)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            made = layers.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        weight = layers.Params4bit(
            linear.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            blocksize=BLOCK,
            module=made,
        )
        made.weight = weight.to(linear.weight.device)  # moving it is what quantises it
        if linear.bias is not None:
            made.bias = linear.bias
        setattr(model.get_submodule(parent), name, made)
    return sum(target.inputs * target.outputs for target in linears)
