"""Dense checkpoint in, MoE checkpoint out. Training never does this surgery, so the start point can be scored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from llava_moe.config import UpcycleSection
from llava_moe.model.assemble import fingerprint, load_model, whole_directory
from llava_moe.model.configuration import MoeSection, NamedArgs
from llava_moe.model.modeling import CheckpointError, LlavaMoeForConditionalGeneration
from llava_moe.model.sites import activation_name, decoder_layers, mlp_spec
from llava_moe.moe import UPCYCLERS, MoELayer
from llava_moe.moe.upcycling import Contract, DenseMlp

PROVENANCE = "upcycle.json"
TOLERANCE = 1e-5  # of the logits in float32, as a share of the largest one where that is above 1


def select_layers(choice: Any, num_layers: int) -> list[int]:
    """Turns all, alternate, first_half, second_half or a list of indices into indices.

    Raises:
        ValueError: the choice is none of these or names a layer that does not exist.
    """
    named = {
        "all": range(num_layers),
        "alternate": range(0, num_layers, 2),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    if isinstance(choice, str):
        if choice not in named:
            raise ValueError(f"upcycle.layers={choice!r}: must be one of {', '.join(named)} or a list of indices")
        return list(named[choice])
    if not isinstance(choice, list | tuple):
        raise ValueError(f"upcycle.layers={choice!r}: must be one of {', '.join(named)} or a list of indices")
    layers = [int(i) for i in choice]
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong or not layers:
        raise ValueError(f"upcycle.layers={layers}: the decoder has layers 0..{num_layers - 1}")
    return layers


def upcycle(section: UpcycleSection, out: Path) -> dict[str, Any]:
    """Writes the MoE checkpoint and returns its provenance, which is also saved beside it.

    Both models are held in float32 at once.

    Raises:
        CheckpointError: the parent is no dense checkpoint, or the result breaks an exactness that it declared.
        ValueError: the section asks for something that does not exist.
    """
    if Path(section.parent).resolve() == out.resolve():
        raise CheckpointError(f"{out}: the result would replace its own parent; choose another output_dir")
    dense = load_model(section.parent)
    if dense.config.moe is not None:
        raise CheckpointError(f"{section.parent}: already a mixture of experts; upcycling starts from a dense one")
    upcycler = UPCYCLERS.get(section.upcycler.name).build(section.upcycler.args)
    layers = select_layers(section.layers, len(decoder_layers(dense.model.language_model)))
    moe = MoeSection(
        layers=tuple(layers),
        num_experts=section.num_experts,
        router=NamedArgs(section.router.name, dict(section.router.args)),
        experts=NamedArgs("stacked", {"kernel": section.kernel}),
    )
    sparse = _build(dense, moe)
    generator = torch.Generator().manual_seed(section.seed)
    activation = activation_name(dense.config.text_config)
    for index in layers:
        block = decoder_layers(dense.model.language_model)[index].get_submodule("mlp")
        spec = mlp_spec(block, activation)
        layer = decoder_layers(sparse.model.language_model)[index].get_submodule("mlp")
        assert isinstance(layer, MoELayer)
        tensors = upcycler(DenseMlp.read(block, spec), spec, section.num_experts, generator)
        layer.experts.load_state_dict(tensors)
        layer.router.reset_parameters(generator)  # one generator for all layers, so no two start alike
    error, largest = logit_error(dense, sparse)
    exact = upcycler.contract is Contract.EXACT_ANY_ROUTER and _normalised(sparse, layers)
    if exact and error > TOLERANCE * max(1.0, largest):
        raise CheckpointError(
            f"upcycling {section.parent} is not exact: logits of up to {largest:.1f} differ by {error:.2e}, more than "
            f"the {TOLERANCE} of them that float32 rounding explains"
        )
    provenance = {
        "parent": str(section.parent),
        "parent_fingerprint": fingerprint(section.parent),
        "section": dataclasses.asdict(section),
        "layers": layers,
        "contract": upcycler.contract.value,
        "exact": exact,
        "max_abs_logit_error": error,
        "max_abs_logit": largest,
        "parameters": {"dense": count_parameters(dense), "moe": count_parameters(sparse)},
    }
    with whole_directory(out) as partial:
        sparse.save_original_format = True
        sparse.save_pretrained(partial)
        AutoProcessor.from_pretrained(section.parent).save_pretrained(partial)
        (partial / PROVENANCE).write_text(json.dumps(provenance, indent=2))
    return provenance


def _build(dense: LlavaMoeForConditionalGeneration, moe: MoeSection) -> LlavaMoeForConditionalGeneration:
    """The sparse model with every weight of the dense one that it still has."""
    config = dense.config.__class__.from_dict({**dense.config.to_dict(), "moe": moe.to_dict()})
    sparse = LlavaMoeForConditionalGeneration(config).eval()
    result = sparse.load_state_dict(dense.state_dict(), strict=False)
    replaced = tuple(f"model.language_model.layers.{i}.mlp." for i in moe.layers)
    stray = [k for k in [*result.missing_keys, *result.unexpected_keys] if not k.startswith(replaced)]
    if stray:
        raise CheckpointError(f"upcycling would lose {stray[:4]}")
    sparse.generation_config = dense.generation_config
    return sparse


def _normalised(model: LlavaMoeForConditionalGeneration, layers: list[int]) -> bool:
    blocks = decoder_layers(model.model.language_model)
    return all(blocks[i].get_submodule("mlp.router").normalised for i in layers)


@torch.no_grad()
def logit_error(one: LlavaMoeForConditionalGeneration, other: LlavaMoeForConditionalGeneration) -> tuple[float, float]:
    """Largest difference of the two models' logits, and largest logit, on a random picture followed by random text."""
    generator = torch.Generator().manual_seed(0)
    config = one.config
    size = config.vision_config.image_size
    picture = torch.full((config.image_seq_length,), config.image_token_id)
    text = torch.randint(0, config.image_token_id, (32,), generator=generator)
    ids = torch.cat([picture, text]).unsqueeze(0)
    pixels = torch.randn(1, 3, size, size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    expected = one(**inputs).logits
    return float((expected - other(**inputs).logits).abs().max()), float(expected.abs().max())


def count_parameters(model: LlavaMoeForConditionalGeneration) -> dict[str, int]:
    """Total, and active for one token: of E experts only the router's k."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            expert = sum(p.numel() for p in layer.experts.parameters()) // layer.experts.num_experts
            k = getattr(layer.router.config, "k", layer.experts.num_experts)
            idle += expert * (layer.experts.num_experts - k)
    return {"total": total, "active": total - idle}
