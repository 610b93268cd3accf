"""Every layout in, compared with an evaluation of the same weights that is not ours, out again, and in once more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from llava_moe.convert import export_checkpoint, import_checkpoint
from llava_moe.model.assemble import load_model
from llava_moe.model.formats import LAYOUTS, Options
from llava_moe.model.modeling import CheckpointError
from tests.model.formats.layouts import (
    ROWS,
    clip_features,
    deep_projector,
    inputs,
    linear_projector,
    lora,
    reference_logits,
    seeded,
    stage_one,
    whole,
)
from tests.model.formats.moe_layouts import cumo, moe_llava
from tests.model.formats.tiles_layouts import SIZE, by_hand, newline, original, stock, tiles
from tests.tiny_model import tiny_model, tiny_moe, tiny_processor, tiny_text_config, tiny_vision_config

AT = 3
ALL = [0, 1, 2, 3]


@dataclass
class Case:
    """A source, what it computes, and where it can go.

    Attributes:
        logits: of (text without placeholders, pixels or tiles), by stock modules and by hand.
        out: (class, decoder) of the export, or words of its refusal.
        tiled: a picture comes as tiles.
    """

    path: Path
    layout: str
    logits: Callable[[Tensor, Tensor], Tensor]
    out: tuple[str, str] | str
    base: Path | None = None
    template: str | None = "v1"
    tiled: bool = False


def by_parts(model: Any, features: Any, project: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, pixels: reference_logits(model, features, project, ids, pixels, AT)


def llava(folder: Path, **changes: Any) -> Case:
    out = changes.pop("out", ("llava", "llama"))
    path, model, tower, project = whole(folder, **changes)
    return Case(path, "llava", by_parts(model, clip_features(tower), project), out)


def projector_alone(folder: Path) -> Case:
    path, base, model, tower, project = stage_one(folder)
    logits = by_parts(model, clip_features(tower), project)
    return Case(path, "llava_projector", logits, ("llava", "llama"), base, "plain")


def adapters(folder: Path) -> Case:
    path, base, model, tower, project = lora(folder)
    return Case(path, "llava_lora", by_parts(model, clip_features(tower), project), ("llava", "llama"), base)


def tiled(folder: Path, kind: str, out: tuple[str, str] | str, rules: dict[str, Any], **changes: Any) -> Case:
    path, model, tower, project = original(folder, kind, **changes)
    first = 0 if kind == "siglip" else 1

    def features(pixels: Tensor) -> Tensor:
        return tower(pixels, output_hidden_states=True).hidden_states[-2][:, first:]

    def logits(ids: Tensor, _: Tensor) -> Tensor:
        return by_hand(model, features, project, ids, AT, **rules)

    return Case(path, "llava", logits, out, tiled=True)


def stock_class(folder: Path, model: Any, path: Path, out: tuple[str, str], tiled: bool = False) -> Case:
    token = model.config.image_token_index

    @torch.no_grad()
    def logits(ids: Tensor, pixels: Tensor) -> Tensor:
        shown = (
            {"pixel_values": pixels[None], "image_sizes": torch.tensor([SIZE])} if tiled else {"pixel_values": pixels}
        )
        extra = {"return_dict": True, **shown}
        count = len(model.model.get_image_features(**extra).pooler_output[0])
        full = torch.cat([ids[:, :AT], torch.full((1, count), token), ids[:, AT:]], dim=1)
        return model(input_ids=full, **shown).logits

    return Case(path, "llava_hf", logits, out, template=None, tiled=tiled)


def published(folder: Path, kind: str) -> Case:
    path, model = stock(folder, kind)
    out = (kind, "qwen2" if kind == "llava_onevision" else "llama")
    return stock_class(folder, model, path, out, tiled=True)


def exported(folder: Path, text: str, target: str, **moe: Any) -> Case:
    """A stock class with experts, as an export of ours makes it; transformers itself then computes the reference."""
    model = tiny_model(tiny_moe(**moe) if moe else None, text, "clip")
    model.save_pretrained(folder / "ours", save_original_format=True)
    tiny_processor("clip").save_pretrained(folder / "ours")
    export_checkpoint(folder / "ours", folder / "source")
    loaded = AutoModelForImageTextToText.from_pretrained(folder / "source", dtype=torch.float32).eval()
    assert type(loaded).__module__.startswith("transformers.")
    assert loaded.config.text_config.model_type == target
    return stock_class(folder, loaded, folder / "source", ("llava", target))


def native(folder: Path, family: str) -> Case:
    """A stock class around a sparse decoder that stays transformers' own."""
    text = tiny_text_config(family, ROWS + 1)
    for key, value in {"num_experts": 4, "num_experts_per_tok": 2}.items():
        setattr(text, key, value)
    config = LlavaConfig(
        vision_config=tiny_vision_config("clip"),
        text_config=text,
        image_token_index=tiny_processor("clip").image_token_id,
        image_seq_length=4,
    )
    model = seeded(lambda: LlavaForConditionalGeneration(config), 12)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder / "source")
    tiny_processor("clip").save_pretrained(folder / "source")
    return stock_class(folder, model, folder / "source", ("llava", family))


def moe_llava_case(folder: Path, family: str, out: tuple[str, str] | str) -> Case:
    path, model, tower, project = moe_llava(folder, family, 2)
    return Case(path, "moe_llava", by_parts(model, clip_features(tower), project), out)


def cumo_case(folder: Path, scales: list[int]) -> Case:
    path, model, features, project = cumo(folder, scales)
    return Case(path, "cumo", by_parts(model, features, project), "experts in its vision and projector")


UNPAD = {"merge": "spatial_unpad", "rounding": "llava", "newline": newline().double().numpy()}
ROUTER = {"name": "top_k", "args": {"k": 1, "convention": "softmax_topk"}}
CASES: dict[str, Callable[[Path], Case]] = {
    "llava": llava,
    "llava, tower saved": lambda folder: llava(folder, saved_tower=True),
    "llava, mistral": lambda folder: llava(folder, family="mistral", out=("llava", "mistral")),
    "llava, tied": lambda folder: llava(
        folder, family="qwen2", tied=True, tie_word_embeddings=True, out=("llava", "qwen2")
    ),
    "llava, linear": lambda folder: llava(
        folder, project=linear_projector(), mm_projector_type="linear", out="its projector is 'linear'"
    ),
    "llava, mlp3x": lambda folder: llava(
        folder, project=deep_projector(), mm_projector_type="mlp3x_gelu", out="its projector is 'mlp3x_gelu'"
    ),
    "projector": projector_alone,
    "lora": adapters,
    "llava 1.6": lambda folder: tiled(folder, "clip", ("llava_next", "llama"), UNPAD, image_aspect_ratio="anyres"),
    "llava 1.6, spatial": lambda folder: tiled(
        folder, "clip", "merged by spatial", {"merge": "spatial"}, image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial",
    ),
    "llava-next, no base": lambda folder: tiled(
        folder, "siglip", "without the whole picture", {**UNPAD, "base": False}, image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad_nobase",
    ),
    "onevision": lambda folder: tiled(
        folder, "siglip", ("llava_onevision", "qwen2"), {**UNPAD, "max_tiles": 1}, image_aspect_ratio="anyres_max_1",
        mm_spatial_pool_mode="bilinear",
    ),
    "hf llava": lambda folder: exported(folder, "llama", "llama"),
    "hf llava_next": lambda folder: published(folder, "llava_next"),
    "hf llava_onevision": lambda folder: published(folder, "llava_onevision"),
    "hf mixtral": lambda folder: exported(folder, "mistral", "mixtral", layers=ALL),
    "hf qwen2_moe": lambda folder: exported(folder, "qwen2", "qwen2_moe", layers=[0, 3]),
    "hf qwen2_moe, shared": lambda folder: exported(
        folder, "qwen2", "qwen2_moe", shared={"num": 2, "mix": "gated"}, router=ROUTER
    ),
    "hf qwen3_moe": lambda folder: exported(folder, "qwen3", "qwen3_moe", layers=[1, 3], expert_width=16),
    "hf olmoe": lambda folder: native(folder, "olmoe"),
    "moe-llava": lambda folder: moe_llava_case(folder, "llama", "layers [1, 3] are dense"),
    "moe-llava, qwen2": lambda folder: moe_llava_case(folder, "qwen2", ("llava", "qwen2_moe")),
    "cumo": lambda folder: cumo_case(folder, [1]),
    "cumo, two scales": lambda folder: cumo_case(folder, [1, 2]),
}  # fmt: skip
STEPS: dict[str, set[str]] = {}


def our_inputs(model: Any, case: Case) -> tuple[Tensor, dict[str, Any]]:
    """Text without placeholders, and the inputs of our model."""
    token = model.config.image_token_id
    ids, _, pixels = inputs(token)
    shown: dict[str, Any] = {"pixel_values": pixels}
    if case.tiled:
        cut, _ = tiles()
        shown = {"pixel_values": cut, "image_sizes": [SIZE], "num_tiles": [len(cut)]}
    count = len(model.model.get_image_features(**shown, return_dict=True).pooler_output[0])
    full = torch.cat([ids[:, :AT], torch.full((1, count), token), ids[:, AT:]], dim=1)
    return ids, {"input_ids": full, "attention_mask": torch.ones_like(full), **shown}


def stock_inputs(given: dict[str, Any], case: Case) -> dict[str, Any]:
    if not case.tiled:
        return given
    text = {key: given[key] for key in ("input_ids", "attention_mask")}
    return {**text, "pixel_values": given["pixel_values"][None], "image_sizes": torch.tensor([SIZE])}


@pytest.mark.parametrize("name", CASES)
def test_in_out_and_in_again(tmp_path: Path, name: str) -> None:
    case = CASES[name](tmp_path / "made")
    done = STEPS.setdefault(name, set())
    facts = import_checkpoint(case.path, tmp_path / "ours", Options(base=case.base), case.template)
    assert facts["layout"] == case.layout
    ours = load_model(tmp_path / "ours")
    done.add("import")

    ids, given = our_inputs(ours, case)
    expected = case.logits(ids, given["pixel_values"])
    with torch.no_grad():
        found = ours(**given).logits
    rows = min(ROWS, expected.shape[-1])
    torch.testing.assert_close(found[..., :rows], expected[..., :rows], rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    done.add("compare")

    if isinstance(case.out, str):
        with pytest.raises(CheckpointError) as refused:
            export_checkpoint(tmp_path / "ours", tmp_path / "stock")
        assert case.out in str(refused.value)
        assert not (tmp_path / "stock").exists()
        done.add("refusal")
        return
    check_export(tmp_path, case, ours, given, found)
    done.add("export")

    again = import_checkpoint(tmp_path / "stock", tmp_path / "back", Options())
    assert again["layout"] == "llava_hf"
    before, after = ours.state_dict(), load_model(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    done.add("re-import")


def check_export(folder: Path, case: Case, ours: Any, given: dict[str, Any], expected: Tensor) -> None:
    facts = export_checkpoint(folder / "ours", folder / "stock")
    assert (facts["class"], facts["target"]) == case.out
    assert json.loads((folder / "stock" / "export.json").read_text())["target"] == case.out[1]
    stock_model = AutoModelForImageTextToText.from_pretrained(folder / "stock", dtype=torch.float32).eval()
    assert type(stock_model).__module__.startswith("transformers.")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    with torch.no_grad():
        found = stock_model(**stock_inputs(given, case)).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        answers = [ours.generate(**given, **options), stock_model.generate(**stock_inputs(given, case), **options)]
    assert torch.equal(*answers)
    with safe_open(folder / "stock" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "multi_modal_projector.linear_2.weight" in names
    if case.out[1] == "mixtral":
        assert "language_model.model.layers.3.block_sparse_moe.experts.3.w2.weight" in names
    elif case.out[1].endswith("_moe"):
        assert any(".mlp.experts.2.up_proj.weight" in key for key in names)
    assert not any("experts.gate_up_proj" in key for key in names)


def test_how_many_there_were() -> None:
    """Counts what ran: an empty matrix would prove nothing."""
    assert len(CASES) == 24
    if len(STEPS) < len(CASES):
        pytest.skip("only some of the cases were asked for")
    counted = {step: sum(step in done for done in STEPS.values()) for step in sorted(set().union(*STEPS.values()))}
    assert counted == {"compare": 24, "export": 17, "import": 24, "re-import": 17, "refusal": 7}
    assert set(LAYOUTS) == {"llava", "llava_projector", "llava_lora", "llava_hf", "moe_llava", "cumo"}
