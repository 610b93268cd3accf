"""What lies on disk, what loads, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_moe.model.assemble import check_checkpoint, load_model, whole_directory
from llava_moe.model.configuration import LlavaMoeConfig, MoeSection
from llava_moe.model.modeling import CheckpointError, LlavaMoeForConditionalGeneration
from tests.model.inputs import greedy, logits_of, picture_batch, prompt_batch
from tests.tiny_model import TINY_MOE, tiny_config, tiny_model, tiny_moe, tiny_vision_config


def keys_on_disk(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def edit_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((path / "config.json").read_text())
    change(raw)
    (path / "config.json").write_text(json.dumps(raw))


@pytest.fixture
def copied(moe_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the sparse checkpoint to damage."""
    return Path(shutil.copytree(moe_checkpoint, tmp_path / "copied"))


def test_keys_of_a_finished_checkpoint(moe_checkpoint: Path) -> None:
    """The names of llava-hf, and in a sparse layer those of Qwen-MoE's experts: stock readers find their way."""
    found = keys_on_disk(moe_checkpoint)
    layer = "language_model.model.layers.0."
    golden = {
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32),
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
        "mlp.router.scorer.weight": (4, 32),
    }
    for e in range(4):
        golden[f"mlp.experts.{e}.gate_proj.weight"] = (48, 32)
        golden[f"mlp.experts.{e}.up_proj.weight"] = (48, 32)
        golden[f"mlp.experts.{e}.down_proj.weight"] = (32, 48)
    assert {k.removeprefix(layer): v for k, v in found.items() if k.startswith(layer)} == golden
    dense = layer.replace(".0.", ".1.")
    assert {k.removeprefix(dense) for k in found if k.startswith(dense + "mlp.")} == {
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip
    assert {k for k in found if "projector" in k} == {
        f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert {k for k in found if "lm_head" in k} == {"language_model.lm_head.weight"}
    assert {k.split(".")[0] for k in found} == {"language_model", "multi_modal_projector", "vision_tower"}


def test_experts_on_disk_are_slices_of_the_stack(moe_checkpoint: Path) -> None:
    stacked = load_model(moe_checkpoint).model.language_model.layers[2].mlp.experts
    files = load_file(moe_checkpoint / "model.safetensors")
    for e in range(4):
        one = {key.split(".")[-2]: t for key, t in files.items() if f"layers.2.mlp.experts.{e}." in key}
        assert torch.equal(stacked.gate_up_proj[e], torch.cat([one["gate_proj"], one["up_proj"]]))
        assert torch.equal(stacked.down_proj[e], one["down_proj"])


def test_keys_of_a_training_checkpoint_are_those_in_memory(tmp_path: Path) -> None:
    """The Trainer resumes by these names; converted ones would silently load nothing."""
    model = tiny_model(TINY_MOE)
    model.save_pretrained(tmp_path)
    assert set(keys_on_disk(tmp_path)) == set(model.state_dict())


@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_stock_checkpoint_loads_whole_and_answers_the_same(tmp_path: Path, vision: str) -> None:
    ours = tiny_config(vision=vision)
    raw = {k: v for k, v in ours.to_dict().items() if k not in ("model_type", "moe", "projector", "architectures")}
    if vision == "siglip":  # stock files hold a pooling head that nothing reads
        raw["vision_config"] = {**raw["vision_config"], "vision_use_head": True}
    stock = LlavaForConditionalGeneration(LlavaConfig(**raw)).eval()
    stock.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, LlavaMoeForConditionalGeneration)
    assert model.config.moe is None
    batch = picture_batch(model)
    assert torch.equal(logits_of(model, **batch), logits_of(stock, **batch))
    prompts = prompt_batch(model)
    assert greedy(model, **prompts) == greedy(stock, **prompts)


def test_our_dense_checkpoint_opens_in_the_stock_class(dense_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dense_checkpoint, tmp_path / "stock"))
    edit_config(copy, lambda raw: (raw.update(model_type="llava"), raw.pop("moe"), raw.pop("projector")))
    stock, info = LlavaForConditionalGeneration.from_pretrained(copy, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = picture_batch(stock)
    assert torch.equal(logits_of(stock.eval(), **batch), logits_of(load_model(dense_checkpoint), **batch))


def test_our_dense_keys_are_those_of_the_stock_class(dense_checkpoint: Path, tmp_path: Path) -> None:
    raw = {k: v for k, v in tiny_config().to_dict().items() if k not in ("model_type", "moe", "projector")}
    LlavaForConditionalGeneration(LlavaConfig(**raw)).save_pretrained(tmp_path)
    assert keys_on_disk(tmp_path) == keys_on_disk(dense_checkpoint)


def test_names_of_older_files_load_too(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The hub's llava-hf files have one level more in the tower."""
    copy = Path(shutil.copytree(dense_checkpoint, tmp_path / "older"))
    file = copy / "model.safetensors"
    tensors = {k.replace("vision_tower.", "vision_tower.vision_model."): t for k, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    found, expected = (load_model(path).state_dict() for path in (copy, dense_checkpoint))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dtype_and_mode(moe_checkpoint: Path) -> None:
    assert not load_model(moe_checkpoint).training
    assert load_model(moe_checkpoint).dtype == torch.float32
    half = load_model(moe_checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    prompts = prompt_batch(half)
    prompts["pixel_values"] = prompts["pixel_values"].bfloat16()
    assert len(greedy(half, **prompts)) == 2


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert path.name in str(caught.value), "the message names the checkpoint"


def test_dense_weights_under_a_sparse_config_are_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Never random experts."""
    copy = Path(shutil.copytree(dense_checkpoint, tmp_path / "copied"))
    edit_config(copy, lambda raw: raw.update(moe=TINY_MOE))
    refused(copy, "missing .*mlp.experts.* and .* more; .*llava-moe upcycle")


def test_sparse_weights_under_a_dense_config_are_refused(copied: Path) -> None:
    edit_config(copied, lambda raw: raw.update(moe=None))
    refused(copied, "missing .*mlp.down_proj.weight.*not used")


def test_decoder_weights_without_a_place_are_refused(copied: Path) -> None:
    edit_config(copied, lambda raw: raw["text_config"].update(num_hidden_layers=3))
    refused(copied, r"not used .*layers\.3\..*weights and config.json do not match")


def test_another_number_of_experts_is_refused_by_name(copied: Path) -> None:
    edit_config(copied, lambda raw: raw["moe"]["decoder"].update(num_experts=8))
    refused(copied, r"is \(4, .*\) in the files, config.json asks for \(8, .*\) and 5 more")


def test_a_lost_tensor_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    lost = next(key for key in tensors if "layers.1.mlp.up_proj" in key)
    save_file({key: t for key, t in tensors.items() if key != lost}, file, metadata={"format": "pt"})
    refused(copied, r"missing model\.language_model\.layers\.1\.mlp\.up_proj\.weight; weights and config.json")


def test_a_lost_expert_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = {key: t for key, t in load_file(file).items() if ".experts.3.down_proj" not in key}
    save_file(tensors, file, metadata={"format": "pt"})
    refused(copied, "experts")


def test_a_cut_file_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(copied, r"model\.safetensors: damaged or cut short")


def test_a_missing_shard_is_refused(moe_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "sharded"
    load_model(moe_checkpoint).save_pretrained(path, max_shard_size="100KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    assert load_model(path).config.moe is not None
    shards[1].unlink()
    refused(path, rf"{shards[1].name} is missing \(1 of {len(shards)} shards\)")


def test_directories_that_are_no_checkpoint(copied: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such checkpoint directory")
    refused(tmp_path, r"no config\.json there \(found copied\)")
    (copied / "model.safetensors").unlink()
    refused(copied, r"no \*\.safetensors there; the checkpoint was not written to its end")
    edit_config(copied, lambda raw: raw.update(model_type="llama"))
    refused(copied, "its model_type is 'llama'; this program reads llava_moe, llava, llava_next_moe")
    (copied / "config.json").write_text("{")
    refused(copied, r"config\.json: not valid JSON")
    (copied / "config.json").write_text("[]")
    refused(copied, "its model_type is None")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found nothing"):
        check_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"layer": [0], "num_experts": 2}, "moe.decoder has no key 'layer'; did you mean 'layers'"),
        ({"num_experts": 2}, "moe.decoder.layers is missing"),
        ({"layers": [0]}, "moe.decoder.num_experts is missing"),
        ({"layers": [], "num_experts": 2}, "moe.decoder.layers must name at least one layer"),
        ({"layers": [1, 1], "num_experts": 2}, "each once"),
        ({"layers": [0], "num_experts": 0}, "moe.decoder.num_experts must be at least 1"),
        ({"layers": [0, 1], "num_experts": [2, 0]}, "moe.decoder.num_experts must be at least 1"),
        ({"layers": [0, 1], "num_experts": [2, 3, 4]}, "names 3 numbers for 2 layers"),
        ({"layers": [0], "num_experts": 2, "router": "top_k"}, "moe.decoder.router must be"),
        ({"layers": [0], "num_experts": 2, "router": {"nam": "top_k"}}, "moe.decoder.router must be"),
        (
            {"layers": [0], "num_experts": 2, "experts": {"name": "stacked", "kernel": "loop"}},
            "decoder.experts must be",
        ),
    ],
)
def test_wrong_moe_part(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeSection.from_dict({"decoder": moe})
    with pytest.raises(ValueError, match=message):
        tiny_config({"decoder": moe})


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({}, "names no part with experts"),
        ({"decoder": None}, "names no part with experts"),
        ({"decodr": {"layers": [0], "num_experts": 2}}, "moe has no key 'decodr'; did you mean 'decoder'"),
        ({"vision": [0]}, "moe.vision must be a mapping"),
    ],
)
def test_wrong_moe_section(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeSection.from_dict(moe)


def test_moe_section_round_trip(tmp_path: Path) -> None:
    config = tiny_config(tiny_moe(layers=[2, 0], num_experts=[3, 4]))
    config.save_pretrained(tmp_path)
    loaded = LlavaMoeConfig.from_pretrained(tmp_path)
    assert loaded.moe_section == config.moe_section
    assert loaded.moe_section.decoder.layers == (0, 2)
    assert loaded.moe_section.decoder.num_experts == (4, 3)
    assert MoeSection.from_dict(config.moe_section.to_dict()) == config.moe_section
    assert type(loaded.vision_config) is type(tiny_vision_config())


def test_whole_directory_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"

    def interrupted() -> None:
        with whole_directory(target) as partial:
            (partial / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert list(target.parent.iterdir()) == []
    for content in ("one", "two"):
        with whole_directory(target) as partial:
            (partial / "file").write_text(content)
        assert (target / "file").read_text() == content
    assert [p.name for p in target.parent.iterdir()] == ["target"]
