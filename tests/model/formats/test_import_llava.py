"""LLaVA's own layout: whole, projector alone, LoRA; against an evaluation by hand of the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llava_moe.convert import import_checkpoint
from llava_moe.data.processing import load_processor
from llava_moe.model.assemble import load_model
from llava_moe.model.formats import Options, detect
from llava_moe.model.modeling import CheckpointError
from tests.model.formats.layouts import (
    ROWS,
    bare,
    clip_features,
    decoder,
    inputs,
    llava_config,
    prefixed,
    projector,
    reference_logits,
    tower_folder,
    write,
)
from tests.tiny import tiny_llama_tokenizer

AT = 3


def compare(out: Path, model: Any, features: Any, project: Any, rows: int = ROWS) -> None:
    """The imported model against the parts it was made of."""
    ours = load_model(out)
    ids, full, pixels = inputs(ours.config.image_token_id, ours.config.image_seq_length, AT)
    expected = reference_logits(model, features, project, ids, pixels, AT)
    with torch.no_grad():
        found = ours(input_ids=full, pixel_values=pixels).logits[..., :rows]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1  # a model whose answers do not depend on anything would prove nothing


def whole(folder: Path, family: str = "llama", saved_tower: bool = False, **changes: Any) -> tuple[Path, Any, Any, Any]:
    """A whole LLaVA checkpoint: (directory, decoder, tower, projector)."""
    tower_dir, tower = tower_folder(folder / "tower")
    model, project = decoder(family), projector()
    tensors = dict(model.state_dict()) | prefixed("model.mm_projector.", project.state_dict())
    if saved_tower:
        tower.requires_grad_(False)
        for parameter in tower.parameters():  # trained: another tower than in its own directory
            parameter.mul_(1.1)
        saved = {bare(name): value for name, value in tower.state_dict().items()}
        tensors |= prefixed("model.vision_tower.vision_tower.vision_model.", saved)
    raw = llava_config(model, tower_dir, **changes)
    return write(folder / "checkpoint-5", raw, tensors, tiny_llama_tokenizer()), model, tower, project


@pytest.mark.parametrize("saved_tower", [False, True])
def test_a_whole_model(tmp_path: Path, saved_tower: bool) -> None:
    path, model, tower, project = whole(tmp_path, saved_tower=saved_tower)
    facts = import_checkpoint(path, tmp_path / "out", Options(), "v1")
    assert facts["layout"] == "llava"
    assert facts["image_mode"] == "pad"
    assert facts["new_rows"] > 0
    assert detect(tmp_path / "out")[0] == "llava_hf"
    compare(tmp_path / "out", model, clip_features(tower), project)
    processor = load_processor(tmp_path / "out")
    assert (processor.template, processor.image_mode, processor.num_image_tokens) == ("v1", "pad", 4)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "stablelm", "phi3"])
def test_families_are_found_by_their_tensors(tmp_path: Path, family: str) -> None:
    path, model, tower, project = whole(tmp_path, family, model_type="llava")
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    compare(tmp_path / "out", model, clip_features(tower), project)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_files(tmp_path: Path, sharded: bool) -> None:
    path, model, tower, project = whole(tmp_path)
    tensors = dict(model.state_dict()) | prefixed("model.mm_projector.", project.state_dict())
    (path / "model.safetensors").unlink()
    if not sharded:
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, group in halves.items():
            torch.save({name: tensors[name].clone() for name in group}, path / file)
        places = {name: file for file, group in halves.items() for name in group}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    compare(tmp_path / "out", model, clip_features(tower), project)


def test_a_projector_alone(tmp_path: Path) -> None:
    tower_dir, tower = tower_folder(tmp_path / "tower")
    model, project = decoder(), projector()
    base = write(tmp_path / "vicuna", model.config.to_dict(), model.state_dict(), tiny_llama_tokenizer())
    path = tmp_path / "stage1"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(llava_config(model, tower_dir)))
    torch.save(prefixed("model.mm_projector.", project.state_dict()), path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="name the language model with --base"):
        import_checkpoint(path, tmp_path / "out", Options(), "plain")
    facts = import_checkpoint(path, tmp_path / "out", Options(base=base), "plain")
    assert facts["layout"] == "llava_projector"
    compare(tmp_path / "out", model, clip_features(tower), project)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_as_peft_does(tmp_path: Path, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    tower_dir, tower = tower_folder(tmp_path / "tower")
    model, project = decoder(), projector()
    base = write(tmp_path / "vicuna", model.config.to_dict(), model.state_dict(), tiny_llama_tokenizer())
    options = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    adapted: Any = get_peft_model(model, options)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "any-name"
    adapted.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(llava_config(model, tower_dir)))
    torch.save(prefixed("base_model.model.model.mm_projector.", project.state_dict()), path / "non_lora_trainables.bin")
    facts = import_checkpoint(path, tmp_path / "out", Options(base=base), "v1")
    assert facts["layout"] == "llava_lora"
    compare(tmp_path / "out", adapted.merge_and_unload(), clip_features(tower), project)


def test_a_siglip_tower_that_was_cut(tmp_path: Path) -> None:
    """LLaVA-NeXT takes the last layer off and reads what is then the last: layer -2 of the whole tower."""
    tower_dir, tower = tower_folder(tmp_path / "tower", "siglip")
    model, project = decoder("qwen2"), projector()
    kept = {bare(name): value for name, value in tower.state_dict().items() if ".layers.2." not in name}
    tensors = dict(model.state_dict()) | prefixed("model.mm_projector.", project.state_dict())
    tensors |= prefixed("model.vision_tower.vision_tower.vision_model.", kept)
    path = write(tmp_path / "next", llava_config(model, tower_dir, "llava_qwen"), tensors, tiny_llama_tokenizer())
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    config = load_model(tmp_path / "out").config
    assert (config.vision_feature_layer, config.vision_config.num_hidden_layers) == (-1, 2)
    compare(tmp_path / "out", model, lambda x: tower(x, output_hidden_states=True).hidden_states[-2], project)


def test_anyres_is_refused_unless_one_picture_is_enough(tmp_path: Path) -> None:
    path, model, tower, project = whole(tmp_path, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad")
    tensors = dict(model.state_dict()) | prefixed("model.mm_projector.", project.state_dict())
    write(path, json.loads((path / "config.json").read_text()), tensors | {"model.image_newline": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"image_aspect_ratio='anyres'.*--image-mode pad"):
        import_checkpoint(path, tmp_path / "out", Options(), "v1")
    facts = import_checkpoint(path, tmp_path / "out", Options(image_mode="pad"), "v1")
    assert [origin.rpartition(": ")[2] for origin in facts["left_out"]] == ["model.image_newline"]
    compare(tmp_path / "out", model, clip_features(tower), project)


def break_off(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without(name: str) -> Any:
    def change(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensors = {key: value for key, value in tensors.items() if key != name}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


def with_extra(name: str, shape: tuple[int, ...]) -> Any:
    def change(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors | {name: torch.zeros(shape)}, path / "model.safetensors", metadata={"format": "pt"})

    return change


def missing_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {"lm_head.weight": "model-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def pickled_code(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    (path / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": Path("x")}, path / "pytorch_model.bin")


def changed(**values: Any) -> Any:
    def change(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | values))

    return change


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_off, ["model.safetensors", "cut short"]),
        (without(NORM), ["no tensor for model.language_model.layers.1.input_layernorm.weight"]),
        (without("model.mm_projector.2.bias"), ["no tensor for model.multi_modal_projector.linear_2.bias"]),
        (with_extra("model.layers.1.mlp.extra.weight", (3,)), ["safetensors: model.layers.1.mlp.extra.weight"]),
        (with_extra(NORM, (31,)), [f"model.safetensors: {NORM}", "(31,)", "(32,)"]),
        (with_extra("model.mm_projector.4.weight", (32, 32)), ["mm_projector.4.weight", "mlp2x_gelu"]),
        (with_extra("model.video_tower.x", (1,)), ["model.video_tower.x", "video towers"]),
        (missing_shard, ["model-00002.safetensors is missing (1 of 2 shards)"]),
        (pickled_code, ["pytorch_model.bin", "damaged, cut short, or more than tensors"]),
        (changed(num_hidden_layers=9), ["num_hidden_layers=9", "4 layers"]),
        (changed(mm_use_im_start_end=True), ["mm_use_im_start_end"]),
        (changed(mm_vision_tower="/nowhere/tower"), ["/nowhere/tower", "--vision-tower"]),
        (changed(mm_vision_select_layer=-9), ["mm_vision_select_layer=-9"]),
        (changed(model_type="llava_gemma"), ["llava_gemma", "known families"]),
    ],
)  # fmt: skip
def test_refusals_name_file_and_key(tmp_path: Path, damage: Any, words: list[str]) -> None:
    path, model, _, project = whole(tmp_path)
    tensors = dict(model.state_dict()) | prefixed("model.mm_projector.", project.state_dict())
    damage(path, {name: value.clone() for name, value in tensors.items()})
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(path, tmp_path / "out", Options(), "v1")
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_template_must_be_named(tmp_path: Path) -> None:
    path, *_ = whole(tmp_path)
    with pytest.raises(ValueError, match=r"--template \(LLaVA-1.5 and Vicuna: v1"):
        import_checkpoint(path, tmp_path / "out", Options())


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        detect(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no config.json there \(found notes.txt\)"):
        detect(tmp_path)
    model = decoder()
    write(tmp_path / "lm", model.config.to_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match=r"no layout that can be imported: model_type is 'llama'"):
        detect(tmp_path / "lm")
