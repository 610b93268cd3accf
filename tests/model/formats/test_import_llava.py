"""LLaVA's own layout: whole, projector alone, LoRA; against an evaluation by hand of the same tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llava_moe.convert import export_checkpoint, import_checkpoint
from llava_moe.data.processing import load_processor
from llava_moe.model.assemble import load_model
from llava_moe.model.formats import Options, detect, importing
from llava_moe.model.formats.tensors import read_file
from llava_moe.model.modeling import CheckpointError
from tests.model.formats.layouts import (
    ROWS,
    bare,
    clip_features,
    decoder,
    deep_projector,
    inputs,
    linear_projector,
    llava_config,
    lora,
    prefixed,
    projector,
    reference_logits,
    stage_one,
    tower_folder,
    whole,
    write,
)
from tests.tiny import tiny_llama_tokenizer
from tests.tiny_model import HIDDEN, tiny_text_config

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
    path, base, model, tower, project = stage_one(tmp_path)
    with pytest.raises(CheckpointError, match="name the language model with --base"):
        import_checkpoint(path, tmp_path / "out", Options(), "plain")
    facts = import_checkpoint(path, tmp_path / "out", Options(base=base), "plain")
    assert facts["layout"] == "llava_projector"
    compare(tmp_path / "out", model, clip_features(tower), project)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_as_peft_does(tmp_path: Path, rslora: bool) -> None:
    path, base, merged, tower, project = lora(tmp_path, use_rslora=rslora)
    facts = import_checkpoint(path, tmp_path / "out", Options(base=base), "v1")
    assert facts["layout"] == "llava_lora"
    compare(tmp_path / "out", merged, clip_features(tower), project)


@pytest.mark.parametrize(("options", "words"), [({"use_dora": True}, "use_dora=True"), ({"bias": "all"}, "bias='all'")])
def test_adapters_that_are_more_than_lora_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path, base, *_ = lora(tmp_path, **options)
    with pytest.raises(CheckpointError, match=f"{words} cannot be merged here; merge it with peft"):
        import_checkpoint(path, tmp_path / "out", Options(base=base), "v1")
    assert not (tmp_path / "out").exists()


def test_dora_is_refused_also_where_its_config_is_silent(tmp_path: Path) -> None:
    """Its magnitudes are tensors of their own."""
    path, base, *_ = lora(tmp_path, use_dora=True)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False}))
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.*no LoRA adapter of a linear map"):
        import_checkpoint(path, tmp_path / "out", Options(base=base), "v1")


def test_adapters_of_another_base(tmp_path: Path) -> None:
    path, base, *_ = lora(tmp_path)
    other = AutoModelForCausalLM.from_config(tiny_text_config("llama", ROWS))
    tensors = {name: value[..., :-1] if "q_proj" in name else value for name, value in other.state_dict().items()}
    write(base, other.config.to_dict(), tensors, tiny_llama_tokenizer())
    with pytest.raises(CheckpointError, match="is this the base it was trained on"):
        import_checkpoint(path, tmp_path / "out", Options(base=base), "v1")


@pytest.mark.parametrize("both_in_files", [False, True])
def test_tied_embeddings(tmp_path: Path, both_in_files: bool) -> None:
    extra = {"lm_head.weight": torch.ones(ROWS, HIDDEN)} if both_in_files else {}
    path, model, tower, project = whole(tmp_path, "qwen2", tied=True, tie_word_embeddings=True)
    if extra:  # transformers ties whatever lies there, and so do we
        tensors = load_file(path / "model.safetensors") | extra
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    ours = load_model(tmp_path / "out")
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    compare(tmp_path / "out", model, clip_features(tower), project)


@pytest.mark.parametrize(("kind", "make"), [("linear", linear_projector), ("mlp3x_gelu", deep_projector)])
@pytest.mark.parametrize("named", [True, False])
def test_other_projectors(tmp_path: Path, kind: str, make: Any, named: bool) -> None:
    path, model, tower, project = whole(tmp_path, project=make(), mm_projector_type=kind if named else None)
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    assert load_model(tmp_path / "out").config.projector == kind
    compare(tmp_path / "out", model, clip_features(tower), project)


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


def test_a_model_of_tiles_comes_in_as_one_of_whole_pictures_if_asked(tmp_path: Path) -> None:
    newline = {"model.image_newline": torch.ones(HIDDEN)}
    path, model, tower, project = whole(
        tmp_path, extra=newline, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad"
    )
    facts = import_checkpoint(path, tmp_path / "out", Options(image_mode="pad"), "v1")
    assert [origin.rpartition(": ")[2] for origin in facts["left_out"]] == ["model.image_newline"]
    compare(tmp_path / "out", model, clip_features(tower), project)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_rotary_positions_of_older_config_files(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    """rope_theta and rope_scaling, which transformers now writes as rope_parameters."""
    path, _, tower, project = whole(tmp_path, rope_theta=500.0, rope_scaling=scaling)
    config = tiny_text_config("llama", ROWS)
    config.rope_parameters = {"rope_theta": 500.0, "rope_type": "linear" if scaling else "default"}
    config.rope_parameters |= {"factor": 2.0} if scaling else {}
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(decoder().state_dict())
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    compare(tmp_path / "out", model, clip_features(tower), project)
    with pytest.raises(AssertionError):  # or the test would not see it
        compare(tmp_path / "out", decoder(), clip_features(tower), project)


@pytest.mark.parametrize("window", [None, 7])
def test_no_window_is_not_the_default_window(tmp_path: Path, window: int | None) -> None:
    """config.json of Mistral 0.2 says null; the default of its class is 4096."""
    path, *_ = whole(tmp_path, "mistral", model_type="llava_mistral", sliding_window=window)
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    assert load_model(tmp_path / "out").config.text_config.sliding_window == window


def test_a_tokenizer_of_sentencepiece_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, *_ = whole(tmp_path)
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    monkeypatch.setattr(importing, "is_sentencepiece_available", lambda: False)
    monkeypatch.setattr(importing, "is_protobuf_available", lambda: True)
    with pytest.raises(CheckpointError, match=r"sentencepiece and protobuf; pip install sentencepiece$"):
        import_checkpoint(path, tmp_path / "out", Options(), "v1")


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    path, *_ = whole(tmp_path)
    with pytest.raises(CheckpointError, match=r"--base .*checkpoint-5 is complete without it .*leave --base out"):
        import_checkpoint(path, tmp_path / "out", Options(base=tmp_path), "v1")
    import_checkpoint(path, tmp_path / "out", Options(), "v1")
    export_checkpoint(tmp_path / "out", tmp_path / "stock")
    for options, word in ((Options(base=tmp_path), "--base"), (Options(tower=tmp_path), "--vision-tower")):
        with pytest.raises(CheckpointError, match=f"^{word} .*leave {word} out"):
            import_checkpoint(tmp_path / "stock", tmp_path / "back", options)


def test_an_image_mode_does_not_hide_tokens_around_pictures(tmp_path: Path) -> None:
    path, *_ = whole(tmp_path, mm_use_im_start_end=True)
    for options in (Options(), Options(image_mode="pad")):
        with pytest.raises(CheckpointError, match="mm_use_im_start_end puts tokens around every picture"):
            import_checkpoint(path, tmp_path / "out", options, "v1")


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


class Trap:
    """Unpickled as it is, it makes a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def pickled_code(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    (path / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": Trap(path / "ran")}, path / "pytorch_model.bin")


def lost_index(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")


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
        (lost_index, ["model.safetensors.index.json is missing", "model-00001-of-00002.safetensors"]),
        (changed(mm_projector_type="linear"), ["mm_projector.2.", "mlp2x_gelu", "mm_projector_type='linear'"]),
        (changed(mm_resampler_type="spatial_pool"), ["mm_resampler_type='spatial_pool'"]),
        (changed(image_aspect_ratio="highres"), ["image_aspect_ratio='highres'", "--image-mode pad"]),
        (changed(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad"), ["model.image_newline is missing"]),
        (changed(image_aspect_ratio="anyres", image_grid_pinpoints=[[17, 16]]), ["config.json", "(17, 16)"]),
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
    assert not (path / "ran").exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_template_must_be_named(tmp_path: Path) -> None:
    path, *_ = whole(tmp_path)
    with pytest.raises(ValueError, match=r"--template \(LLaVA-1.5 and Vicuna: v1"):
        import_checkpoint(path, tmp_path / "out", Options())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "mm_projector.bin", "adapter_model.bin"])
def test_a_pickle_never_runs(tmp_path: Path, file: str, old: bool) -> None:
    """Also in the format that torch had before 1.6; the same file runs where it is trusted."""
    path = tmp_path / "source"
    path.mkdir()
    torch.save({"x": Trap(tmp_path / "ran")}, path / file, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_file(path / file)
    assert not (tmp_path / "ran").exists()
    torch.load(path / file, weights_only=False)
    assert (tmp_path / "ran").is_dir()


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
