"""LLaVA-NeXT and LLaVA-OneVision against transformers' own classes, and what only ours do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from llava_moe.config import GrowSection, NamedSection, PartSection, UpcycleSection
from llava_moe.data.collator import Collator
from llava_moe.data.schema import Turn
from llava_moe.model.assemble import load_model
from llava_moe.model.growing import grow
from llava_moe.model.offload import is_streamed, open_model
from llava_moe.model.upcycling import upcycle
from tests.model.inputs import gradients, greedy
from tests.reference import anyres
from tests.tiny import tiny_tokenizer
from tests.tiny_families import (
    MODES,
    TILE,
    family_config,
    family_model,
    family_processor,
    images,
    prompts,
    write_family_checkpoint,
)
from tests.tiny_model import TINY_MOE, tiny_text_config, tiny_vision_config

TILED = ("llava_next", "llava_onevision")
GRIDS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48], [48, 48]]
IMAGE = tiny_tokenizer().convert_tokens_to_ids("<image>")
VIDEO = 433


def stock_model(family: str, vision: str = "siglip") -> Any:
    """A tiny model of transformers' own class."""
    torch.manual_seed(0)
    kinds: dict[str, Any] = {
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
        "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
    }
    config_class, model_class = kinds[family]
    extra = {} if family == "llava_next" else {"vision_aspect_ratio": "anyres_max_2", "video_token_index": VIDEO}
    tower = tiny_vision_config(vision)
    config = config_class(
        vision_config=tower,
        text_config=tiny_text_config("qwen2"),
        image_token_index=IMAGE,
        vision_feature_layer=-2 if vision == "clip" else -1,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        image_grid_pinpoints=GRIDS,
        **extra,
    )
    model = model_class(config).eval()
    for parameter in (*model.model.multi_modal_projector.parameters(), model.model.image_newline):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def sequence(counts: list[int], token: int = IMAGE) -> torch.Tensor:
    """One row: text, then each visual with some text behind it."""
    parts = [torch.arange(3)]
    for number, count in enumerate(counts):
        parts += [torch.full((count,), token), torch.arange(4) + 7 * number]
    return torch.cat(parts).unsqueeze(0)


@pytest.mark.parametrize("vision", ["siglip", "clip"])
@pytest.mark.parametrize("family", TILED)
def test_a_stock_checkpoint_answers_as_in_transformers(family: str, vision: str, tmp_path: Path) -> None:
    stock = stock_model(family, vision)
    stock.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert type(ours).__name__.startswith("LlavaNextMoe" if family == "llava_next" else "LlavaOnevisionMoe")
    assert ours.state_dict().keys() == stock.state_dict().keys()
    sizes = torch.tensor([[20, 40], [33, 17], [70, 66], [16, 16]])
    pixels = torch.randn(4, 10, 3, TILE, TILE)  # padded to the most tiles, as stock processors give them
    with torch.no_grad():
        counts = [len(features) for features in stock.model.get_image_features(pixels, sizes).pooler_output]
        inputs = {"input_ids": sequence(counts), "pixel_values": pixels, "image_sizes": sizes}
        expected = stock(**inputs).logits
        found = ours(**inputs).logits
    assert len(set(counts)) > 2, counts
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 1
    assert greedy(ours, 6, **inputs) == greedy(stock, 6, **inputs)


@pytest.mark.parametrize("family", TILED)
def test_packing_is_the_stock_one_on_odd_sizes(family: str, tmp_path: Path) -> None:
    """spatial_unpad and anyres_max_N, for all sizes at which transformers' own packing works."""
    stock = stock_model(family)
    stock.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    equal, empty = 0, []
    for size in anyres.ODD_SIZES:
        sizes = torch.tensor([size])
        pixels = torch.randn(1, 10, 3, TILE, TILE)
        with torch.no_grad():
            found = ours.model.get_image_features(pixels, sizes).pooler_output[0]
            try:
                expected = stock.model.get_image_features(pixels, sizes).pooler_output[0]
            except RuntimeError:
                # its limit asks for an image of no row or no column; ours keeps one
                empty.append(size)
                continue
        torch.testing.assert_close(found, expected)
        equal += 1
    assert equal + len(empty) == len(anyres.ODD_SIZES)
    assert equal >= 30
    assert empty == [], empty


def test_several_images_of_a_sample_are_one_tile_each_in_onevision() -> None:
    stock = stock_model("llava_onevision")
    ours = family_model("llava_onevision", vision_feature_layer=-1)
    ours.load_state_dict(stock.state_dict())
    sizes, pixels = torch.tensor([[20, 40], [33, 17], [33, 17]]), torch.randn(3, 10, 3, TILE, TILE)
    ours.config.image_grid_pinpoints = GRIDS
    for batch_num_images in ([2, 1], [1, 1, 1]):
        numbers = torch.tensor(batch_num_images)
        with torch.no_grad():
            expected = stock.model.get_image_features(pixels, sizes, batch_num_images=numbers).pooler_output
            found = ours.model.get_image_features(pixels, sizes, batch_num_images=numbers).pooler_output
        assert [len(one) for one in found] == [len(one) for one in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_videos_are_those_of_onevision() -> None:
    """Behind <video> as the stock class takes them, and behind <image> as our processor gives them."""
    stock = stock_model("llava_onevision")
    ours = family_model("llava_onevision", vision_feature_layer=-1)
    ours.load_state_dict(stock.state_dict())
    ours.config.video_token_id = VIDEO
    frames = torch.randn(1, 3, 3, TILE, TILE)
    count = 3 * 1 + 1  # a frame of 2 x 2 features becomes 1 x 1; one newline
    with torch.no_grad():
        inputs = {"input_ids": sequence([count], VIDEO), "pixel_values_videos": frames}
        expected = stock(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, expected)
        mine = {"pixel_values": frames[0], "image_sizes": [(TILE, TILE)], "num_tiles": [3], "is_video": [True]}
        found = ours(input_ids=sequence([count]), **mine).logits
    real = (inputs["input_ids"] != VIDEO)[0]
    torch.testing.assert_close(found[0, real], expected[0, real])
    assert greedy(ours, 5, **inputs) == greedy(stock, 5, **inputs)
    assert greedy(ours, 5, input_ids=sequence([count]), **mine) == greedy(stock, 5, **inputs)


MERGES: list[dict[str, Any]] = [
    {"merge": "flat"},
    {"merge": "spatial"},
    {"merge": "spatial", "base": False},
    {"merge": "spatial_maxpool2x2"},
    {"merge": "spatial_unpad", "base": False, "unpad_rounding": "llava"},
    {"merge": "spatial_unpad", "several_images": "anyres", "frames": {"stride": 1, "mode": "max", "newline": "row"}},
]


@pytest.mark.parametrize("tiling", MERGES, ids=str)
def test_every_merge_has_as_many_features_as_placeholders(tiling: dict[str, Any], tmp_path: Path) -> None:
    processor = family_processor("llava_next", **tiling)
    merge = {key: tiling[key] for key in ("merge", "base", "unpad_rounding") if key in tiling}
    model = family_model("llava_next", processor=processor, merge=merge)
    has_newline = tiling["merge"] == "spatial_unpad"
    assert ("model.image_newline" in model.state_dict()) == has_newline
    turns = [Turn("user", "<image>\n<image>\nWhat?")]
    encoded = [*prompts(processor), processor.encode_prompt(turns, [images(3), images(1)[0]])]  # a video and an image
    batch = processor.pad_prompts(encoded)
    assert batch["is_video"].count(True) == 1
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path, save_original_format=True)
    again = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)


def test_more_than_one_tile_changes_the_answer_and_its_order_counts() -> None:
    model, processor = family_model("llava_next"), family_processor("llava_next")
    turns = [Turn("user", "<image>\n<image>\nWhat?")]
    one, other = images(2)
    prompt = processor.pad_prompts([processor.encode_prompt(turns, [one, other])])
    swapped = processor.pad_prompts([processor.encode_prompt(turns, [other, one])])
    whole = family_processor("llava_next", "pad")
    assert whole.pad_prompts([whole.encode_prompt(turns[:1], [one, other])])["num_tiles"] == [1, 1]
    with torch.no_grad():
        assert not torch.allclose(model(**prompt).logits[0, -1], model(**swapped).logits[0, -1])


@pytest.mark.parametrize("family", ["llava", *TILED])
def test_beams_and_samples_keep_the_images_of_their_row(family: str) -> None:
    """transformers repeats what it is given row by row; two images of a row must not be torn apart."""
    model, processor = family_model(family, TINY_MOE), family_processor(family)
    batch = processor.pad_prompts([prompts(processor)[4], prompts(processor)[0]])
    alone = greedy(model, 5, **batch)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_return_sequences": 2}
    beams = model.generate(**batch, num_beams=2, do_sample=False, **options)
    sampled = model.generate(**batch, do_sample=True, top_k=1, **options)
    width = batch["input_ids"].shape[1]
    assert sampled[:, width:].tolist() == [row for row in alone for _ in range(2)]
    assert beams.shape[0] == 4


@pytest.mark.parametrize("family", TILED)
def test_a_batch_of_text_trains_every_part_with_zero(family: str) -> None:
    processor = family_processor(family)
    model = family_model(family).train()
    turns = [Turn("user", "What?"), Turn("assistant", "red")]
    batch = Collator.of(processor)([{"sample_id": "t", **processor.encode_sample(turns, [])}])
    assert batch["batch_num_images"] == [0]
    model(**batch, use_cache=False).loss.backward()
    found = gradients(model)
    for part in ("model.image_newline", "model.multi_modal_projector.linear_1.weight"):
        assert found[part].abs().sum() == 0
    model.eval()
    with pytest.raises(Exception, match="Image features and image tokens do not match"):
        model(**batch)


def test_numbers_that_do_not_fit_are_refused() -> None:
    model = family_model("llava_next")
    pixels = torch.zeros(3, 3, TILE, TILE)
    with pytest.raises(ValueError, match="image_sizes is missing"):
        model.model.get_image_features(pixels)
    with pytest.raises(ValueError, match=r"3 pictures for 1 sizes and num_tiles=\[2\]"):
        model.model.get_image_features(pixels, [(20, 20)], num_tiles=[2])
    one = {"pixel_values": pixels[:1], "image_sizes": [(20, 40)], "num_tiles": [1]}
    encoded = {"image": model.model.get_image_features(**one)}
    with pytest.raises(ValueError, match="pixel_values or mm_encoder_outputs"):
        model(input_ids=sequence([5]), **one, mm_encoder_outputs=encoded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio='pad' must be anyres or anyres_max_N"),
        ({"merge": {"merg": "flat"}}, "merge has no key 'merg'; did you mean 'merge'"),
        ({"merge": {"merge": "spatil"}}, "merge is 'spatil'; allowed"),
        ({"merge": {"merge": "flat"}, "vision_aspect_ratio": "anyres_max_9"}, "only merge 'spatial_unpad' shrinks"),
        ({"merge": {"merge": "flat"}, "frames": {"newline": "row"}}, "only merge spatial_unpad has a newline"),
        ({"frames": {"stride": 0}}, "stride is 0"),
        ({"moe": {"decodr": {}}}, "did you mean 'decoder'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family_config("llava_next", **{"moe": None, **changes})


@pytest.mark.parametrize("family", TILED)
def test_upcycling_is_exact_and_streams(family: str, tmp_path: Path) -> None:
    parent = write_family_checkpoint(tmp_path / "dense", family)
    section = UpcycleSection(
        parent=str(parent),
        decoder=PartSection(layers=[1], num_experts=3),
        vision=PartSection(layers=[0], num_experts=2),
        projector=PartSection(layers=[0], num_experts=2),
    )
    facts = upcycle(section, tmp_path / "sparse", whole_bytes=0)  # both models layer by layer
    assert facts["exact"]
    assert facts["max_abs_logit_error"] <= 1e-5 * max(1.0, facts["max_abs_logit"])
    dense, sparse = load_model(parent), load_model(tmp_path / "sparse")
    processor = family_processor(family)
    batch = processor.pad_prompts(prompts(processor))
    with torch.no_grad():
        found, expected = sparse(**batch), dense(**batch)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert {site for site, _ in found.routings} == {"decoder", "vision", "projector"}
        streamed = open_model(tmp_path / "sparse", whole_bytes=0)
        assert is_streamed(streamed)
        torch.testing.assert_close(streamed(**batch).logits, found.logits)
    assert greedy(sparse, 4, **batch) == greedy(dense, 4, **batch)


def test_a_stock_checkpoint_can_be_upcycled(tmp_path: Path) -> None:
    processor = family_processor("llava_next")
    stock_model("llava_next").save_pretrained(tmp_path / "stock")
    processor.save_pretrained(tmp_path / "stock")
    section = UpcycleSection(parent=str(tmp_path / "stock"), decoder=PartSection(layers=[1], num_experts=2))
    assert upcycle(section, tmp_path / "sparse")["exact"]
    assert load_model(tmp_path / "sparse").config.model_type == "llava_next_moe"


def test_a_decoder_with_tiles_grows(tmp_path: Path) -> None:
    processor = family_processor("llava_next")
    model = family_model("llava_next", text_config=tiny_text_config("llama"), processor=processor)
    model.save_pretrained(tmp_path / "small", save_original_format=True)
    processor.save_pretrained(tmp_path / "small")
    target = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    section = GrowSection(parent=str(tmp_path / "small"), target=target, width=NamedSection("fpi"))
    assert grow(section, tmp_path / "large")["max_abs_logit_error"] < 1e-3
    large, small = load_model(tmp_path / "large"), load_model(tmp_path / "small")
    assert large.model.image_newline.shape == (64,)
    batch = processor.pad_prompts(prompts(processor))
    with torch.no_grad():
        torch.testing.assert_close(large(**batch).logits, small(**batch).logits, rtol=1e-4, atol=1e-4)


def test_modes_of_the_families() -> None:
    assert {family: family_model(family).config.vision_aspect_ratio for family in TILED} == {
        family: MODES[family] for family in TILED
    }
    assert isinstance(tiny_vision_config("clip"), CLIPVisionConfig)


def test_projectors_without_a_grid_need_the_flat_merge() -> None:
    options: dict[str, Any] = {"projector": "perceiver", "projector_args": {"num_latents": 4, "depth": 1}}
    with pytest.raises(ValueError, match="the embeddings of projector 'perceiver' are no grid"):
        family_model("llava_next", **options)
    processor = family_processor("llava_next", merge="flat")
    model = family_model("llava_next", processor=processor, merge={"merge": "flat"}, **options)
    with torch.no_grad():
        assert model(**processor.pad_prompts(prompts(processor))).logits.isfinite().all()
