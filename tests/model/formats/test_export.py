"""Exports, loaded by transformers' own class in the same process; and back in again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from llava_moe.cli import main
from llava_moe.convert import export_checkpoint, import_checkpoint
from llava_moe.data.processing import load_processor
from llava_moe.data.schema import Turn
from llava_moe.model.assemble import load_model
from llava_moe.model.formats import Options
from llava_moe.model.modeling import CheckpointError
from tests.model.formats.tiles_layouts import original, stock
from tests.tiny import tiny_image
from tests.tiny_model import tiny_config, tiny_model, tiny_moe, tiny_processor, write_tiny_checkpoint

ALL = [0, 1, 2, 3]


def written(folder: Path, text: str = "llama", vision: str = "clip", moe: dict[str, Any] | None = None) -> Path:
    return write_tiny_checkpoint(folder / "ours", moe, text=text, vision=vision)


def names_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def router(**args: Any) -> dict[str, Any]:
    return {"name": "top_k", "args": {"k": 2, **args}}


CASES = {
    "dense llama": ("llama", "clip", None, "llama"),
    "dense qwen2": ("qwen2", "siglip", None, "qwen2"),
    "dense phi3": ("phi3", "siglip", None, "phi3"),
    "llama": ("llama", "clip", tiny_moe(layers=ALL), "mixtral"),
    "mistral, topk_softmax": (
        "mistral",
        "siglip",
        tiny_moe(layers=ALL, router=router(convention="topk_softmax")),
        "mixtral",
    ),
    "qwen2, some layers": ("qwen2", "siglip", tiny_moe(), "qwen2_moe"),
    "qwen2, as they are": ("qwen2", "clip", tiny_moe(router=router(convention="softmax_topk", k=1)), "qwen2_moe"),
    "qwen2, gated shared": ("qwen2", "clip", tiny_moe(shared={"num": 2, "mix": "gated"}), "qwen2_moe"),
    "qwen3, some layers": ("qwen3", "siglip", tiny_moe(layers=[1, 3]), "qwen3_moe"),
    "qwen3, narrow experts": ("qwen3", "clip", tiny_moe(expert_width=16), "qwen3_moe"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stock_class_computes_the_same(tmp_path: Path, case: str) -> None:
    text, vision, moe, target = CASES[case]
    path = written(tmp_path, text, vision, moe)
    facts = export_checkpoint(path, tmp_path / "stock")
    assert facts["target"] == target
    assert facts["max_abs_logit_error"] < 1e-4
    stock, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "stock", dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert all(".shared_expert." in key and stock.state_dict()[key].numel() == 0 for key in info["missing_keys"])
    assert type(stock) is LlavaForConditionalGeneration
    assert stock.config.text_config.model_type == target
    ours, processor = load_model(path), load_processor(path)
    prompt = processor.encode_prompt([Turn("user", "<image>\nWhat is the shape?")], [tiny_image(1)])
    batch = processor.pad_prompts([prompt])
    with torch.no_grad():
        expected, found = ours(**batch).logits, stock.eval()(**batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(
            ours.generate(**batch, max_new_tokens=12, do_sample=False),
            stock.generate(**batch, max_new_tokens=12, do_sample=False),
        )
    names = names_of(tmp_path / "stock")
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "language_model.lm_head.weight" in names
    if target == "mixtral":
        assert "language_model.model.layers.3.block_sparse_moe.experts.3.w2.weight" in names
    elif target.endswith("_moe"):
        layer = moe["decoder"]["layers"][0] if moe is not None else 0
        assert f"language_model.model.layers.{layer}.mlp.experts.3.up_proj.weight" in names
        assert f"language_model.model.layers.{layer}.mlp.gate.weight" in names


def test_every_case_ran() -> None:
    assert len(CASES) == 10
    assert {target for *_, target in CASES.values()} == {"llama", "qwen2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"}


@pytest.mark.parametrize("image_mode", ["square", "pad"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_stock_processor_makes_the_same_inputs(tmp_path: Path, image_mode: str, vision: str) -> None:
    path = written(tmp_path, vision=vision)
    ours = tiny_processor(vision, image_mode=image_mode)
    ours.save_pretrained(path)
    export_checkpoint(path, tmp_path / "stock")
    stock = AutoProcessor.from_pretrained(tmp_path / "stock", backend="pil")
    assert type(stock).__name__ == "LlavaProcessor"
    picture = tiny_image(3, (33, 20))
    prompt = ours.encode_prompt([Turn("user", "<image>\nWhat is the shape?")], [picture])
    messages = [{"role": "user", "content": "<image>\nWhat is the shape?"}]
    text = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    found = stock(images=picture, text=text, return_tensors="pt")
    assert found["input_ids"][0].tolist() == prompt["input_ids"].tolist()
    torch.testing.assert_close(found["pixel_values"].float(), prompt["pixel_values"], rtol=0, atol=1e-5)
    kind = json.loads((tmp_path / "stock" / "preprocessor_config.json").read_text())["image_processor_type"]
    assert not kind.endswith("Pil")


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_the_stock_processor_cuts_the_same_tiles(tmp_path: Path, kind: str) -> None:
    """From our checkpoint to the export's processor, and the tokens that it counts fit the export's model."""
    source, _ = stock(tmp_path, kind)
    import_checkpoint(source, tmp_path / "ours", Options())
    ours = load_processor(tmp_path / "ours")
    assert export_checkpoint(tmp_path / "ours", tmp_path / "stock")["class"] == kind
    exported = AutoProcessor.from_pretrained(tmp_path / "stock")
    assert type(exported) is type(AutoProcessor.from_pretrained(source))
    exported.image_processor = AutoImageProcessor.from_pretrained(tmp_path / "stock", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    for size in ((37, 23), (16, 50), (90, 31)):
        picture = tiny_image(3, (size[1], size[0]))
        found = exported(images=picture, text="<image>\nWhat is the shape?", return_tensors="pt")
        expected = ours.encode_visuals([picture])
        assert tuple(found["image_sizes"][0].tolist()) == size == expected["image_sizes"][0]
        assert int((found["input_ids"] == ours.image_token_id).sum()) == expected["image_tokens"][0]
        torch.testing.assert_close(found["pixel_values"][0].float(), expected["pixel_values"], rtol=0, atol=2e-2)
        with torch.no_grad():
            assert model(**found).logits.shape[1] == found["input_ids"].shape[1]


def test_what_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, *_ = original(tmp_path, "clip", image_aspect_ratio="anyres")
    import_checkpoint(path, tmp_path / "ours", Options(), "v1")
    main(["export", str(tmp_path / "ours"), "--to", str(tmp_path / "stock")])
    said = capsys.readouterr().out
    assert "llava_next with a llama decoder" in said
    assert "not the same: padding is cut off as transformers does it" in said
    assert json.loads((tmp_path / "stock" / "export.json").read_text())["notes"]


def test_another_image_mode_than_the_stock_processors_is_refused(tmp_path: Path) -> None:
    path, *_ = original(tmp_path, "clip", image_aspect_ratio="anyres")
    import_checkpoint(path, tmp_path / "ours", Options(), "v1")
    load_processor(tmp_path / "ours", image_mode="pad").save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"its image mode is 'pad', and the stock processor .* anyres alone"):
        export_checkpoint(tmp_path / "ours", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_a_dense_export_comes_back(tmp_path: Path) -> None:
    path = written(tmp_path)
    export_checkpoint(path, tmp_path / "stock")
    facts = import_checkpoint(tmp_path / "stock", tmp_path / "back", Options())
    assert facts["layout"] == "llava_hf"
    assert facts["template"] == "chat_template"
    before, after = load_model(path).state_dict(), load_model(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "layers": ({"moe": tiny_moe()}, ["mixtral", "layers [1, 3] are dense"]),
    "weights": (
        {"moe": tiny_moe(layers=ALL, router=router(convention="softmax_topk"))},
        ["do not sum to 1"],
    ),
    "router": ({"moe": tiny_moe(layers=ALL, router={"name": "cosine", "args": {}})}, ["'cosine'", "top_k alone"]),
    "bias": ({"moe": tiny_moe(layers=ALL, router=router(bias=True))}, ["has a bias"]),
    "counts": ({"moe": tiny_moe(layers=ALL, num_experts=[2, 2, 4, 4])}, ["[2, 2, 4, 4] experts"]),
    "experts": ({"moe": tiny_moe(layers=ALL, experts={"name": "lora", "args": {}})}, ["'lora'"]),
    "shared": ({"moe": tiny_moe(layers=ALL, shared={"num": 1})}, ["shared experts"]),
    "ungated": ({"text": "qwen2", "moe": tiny_moe(shared={"num": 1})}, ["qwen2_moe", "shared experts"]),
    "family": ({"text": "phi3", "moe": tiny_moe(layers=ALL)}, ["phi3", "llama (mixtral)"]),
    "projector": ({"projector": "linear"}, ["'linear'", "two linear maps"]),
    "tower": ({"vision": "timm"}, ["llava_moe_timm", "a class of this project"]),
    "logits": ({"logit_softcap": 5.0}, ["logit_softcap=5.0", "transformers' LLaVA does not"]),
    "parts": (
        {"moe": {"projector": {"layers": [0], "num_experts": 2}}},
        ["experts in its projector", "dense one"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    changes, words = REFUSED[case]
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path / "ours", save_original_format=True)
    tiny_processor(changes.get("vision", "siglip")).save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError) as refused:
        export_checkpoint(tmp_path / "ours", tmp_path / "stock")
    for word in words:
        assert word in str(refused.value), refused.value
    assert not (tmp_path / "stock").exists()


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(CheckpointError, match="holds something else"):
        export_checkpoint(path, path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="holds something else"):
        export_checkpoint(path, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").is_file()


def test_stock_experts_that_nobody_reads_are_refused_on_the_way_in(tmp_path: Path) -> None:
    path = written(tmp_path)
    raw = json.loads((path / "config.json").read_text())
    raw |= {"model_type": "llava", "text_config": {**raw["text_config"], "model_type": "phimoe"}}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"its decoder \(phimoe\) is a mixture of experts .* mixtral, olmoe"):
        import_checkpoint(path, tmp_path / "back", Options())


def test_a_picture_matters() -> None:
    """Or equal answers would prove little: two pictures give two answers."""
    model = tiny_model(vision="clip")
    ids = torch.full((1, 6), int(tiny_config(vision="clip").image_token_index))
    ids[0, 4:] = 7
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    pixels = tiny_processor("clip").encode_images(pictures)
    with torch.no_grad():
        first, second = (model(input_ids=ids, pixel_values=p[None]).logits for p in pixels)
    assert (first - second).abs().max() > 0.1
