"""Images as tiles and videos as frames: what the processor, the data set and the collator make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from llava_moe.data.check import check_sources
from llava_moe.data.collator import Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.feature_store import FeatureStore, FeatureStoreWriter
from llava_moe.data.image import IMAGE_MODES
from llava_moe.data.processing import LlavaMoeProcessor, load_processor
from llava_moe.data.schema import DataError, Turn, parse_record
from tests.tiny import tiny_image, tiny_siglip_processor, tiny_tokenizer, write_llava_json
from tests.tiny_families import SIDE, SIZES, TILE, family_processor, images, write_mixed_json

ASK = [Turn("user", "<image>\nWhat is the shape?")]
TURNS = [*ASK, Turn("assistant", "red")]
ODD = [(w, h) for w, h in ((7, 7), (13, 17), (31, 97), (97, 31), (100, 101), (40, 20), (64, 16), (16, 64), (199, 87))]


def placeholders(processor: LlavaMoeProcessor, sample: dict[str, Any]) -> int:
    return int((sample["input_ids"] == processor.image_token_id).sum())


def test_every_image_has_its_own_number_of_tokens_and_tiles():
    processor = family_processor("llava_next")
    for image in images(4):
        sample = processor.encode_sample(TURNS, [image])
        rows, cols = processor.planner.tiling.tile_grid((image.height, image.width))
        assert sample["num_tiles"] == [1 + rows * cols]
        assert sample["pixel_values"].shape == (1 + rows * cols, 3, TILE, TILE)
        assert sample["image_sizes"] == [(image.height, image.width)]
        assert (
            placeholders(processor, sample)
            == sample["image_tokens"][0]
            == processor.image_tokens([image.size[::-1]])[0]
        )
    assert len({tuple(processor.image_tokens([size[::-1]])) for size in SIZES}) > 2


def test_several_images_keep_their_places():
    processor = family_processor("llava_next", several_images="anyres")
    turns = [Turn("user", "First <image> then <image> and <image>?"), Turn("assistant", "red")]
    sample = processor.encode_sample(turns, images(3))
    ids = sample["input_ids"].tolist()
    runs, previous = [], None
    for token in ids:
        if token == processor.image_token_id:
            runs = [*runs, 0] if previous != token else runs
            runs[-1] += 1
        previous = token
    assert runs == sample["image_tokens"] == processor.image_tokens([(i.height, i.width) for i in images(3)])
    assert len(set(runs)) > 1
    starts = np.cumsum([0, *sample["num_tiles"]])
    for index, image in enumerate(images(3)):
        alone = processor.encode_visuals([image])["pixel_values"]
        assert torch.equal(sample["pixel_values"][starts[index] : starts[index + 1]], alone)
    padded = family_processor("llava_next").encode_sample(turns, images(3))
    assert padded["num_tiles"] == [1, 1, 1]
    assert padded["image_tokens"] == [SIDE**2 + 1] * 3


@pytest.mark.parametrize("mode", IMAGE_MODES.names())
def test_a_model_with_tiles_can_be_shown_whole_images(mode: str):
    processor = family_processor("llava_next", mode)
    image = tiny_image(0, (40, 20))
    sample = processor.encode_sample(TURNS, [image])
    assert (sample["num_tiles"], sample["image_tokens"]) == ([1], [SIDE**2 + 1])
    assert torch.equal(sample["pixel_values"], tiny_siglip_processor(image_mode=mode).encode_images([image]))


def test_a_video_is_its_frames():
    processor = family_processor("llava_next")
    frames = [tiny_image(i, (24, 20)) for i in range(3)]
    sample = processor.encode_sample(TURNS, [frames])
    assert (sample["num_tiles"], sample["is_video"]) == ([3], [True])
    assert sample["image_tokens"] == [3 * 1 + 1]  # 2 x 2 features become 1 x 1, and one newline ends the video
    assert placeholders(processor, sample) == 4
    whole = tiny_siglip_processor()
    plain = whole.encode_sample(TURNS, [frames])
    assert plain["pixel_values"].shape[0] == 3
    assert placeholders(whole, plain) == 3 * whole.num_image_tokens
    with pytest.raises(DataError, match="frames is null, so there are no videos"):
        family_processor("llava_next", frames=None).encode_sample(TURNS, [frames])
    with pytest.raises(DataError, match="a video of 0 frames"):
        processor.encode_sample(TURNS, [[]])


def test_prompts_are_padded_and_joined_in_order():
    processor = family_processor("llava_next")
    text = processor.encode_prompt([Turn("user", "What?")], [])
    first, second = (processor.encode_prompt(ASK, [image]) for image in images(2))
    batch = processor.pad_prompts([first, text, second])
    assert batch["batch_num_images"] == [1, 0, 1]
    assert batch["num_tiles"] == [*first["num_tiles"], *second["num_tiles"]]
    assert batch["image_sizes"] == [*first["image_sizes"], *second["image_sizes"]]
    assert "is_video" not in batch
    assert torch.equal(batch["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))
    assert set(processor.pad_prompts([text])) == {"input_ids", "attention_mask"}
    assert all(isinstance(number, int) for number in batch["num_tiles"])


def test_it_is_saved_with_its_tiling(tmp_path: Path):
    processor = family_processor("llava_onevision", frames={"stride": 1}, several_images="anyres")
    processor.num_frames = 5
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert (again.tiling, again.image_mode, again.num_frames) == (processor.tiling, "anyres_max_2", 5)
    assert again.planner == processor.planner
    one, other = (p.encode_sample(TURNS, images(1)) for p in (processor, again))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    changed = load_processor(tmp_path, image_mode="anyres_max_1", tiling={"merge": "spatial_unpad", "base": False})
    assert changed.planner.tiling.max_tiles == 1
    assert changed.tiling["several_images"] == "anyres"
    tiny_siglip_processor().save_pretrained(tmp_path / "whole")
    with pytest.raises(DataError, match="image_mode 'anyres' needs a model with tiles"):
        load_processor(tmp_path / "whole", image_mode="anyres")
    with pytest.raises(DataError, match="tiling is given, but this checkpoint's model has no tiles"):
        load_processor(tmp_path / "whole", tiling={"merge": "flat"})


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ({"gids": 1}, "did you mean 'grids'"),
        ({"grids": "all of them"}, "allowed are 'llava-1.6'"),
        ({"grids": [[20, 16]]}, "multiples of 16"),
        ({"merge": "spatil"}, "merge is 'spatil'; allowed"),
        ({"frames": {"stide": 2}}, "frames has no key 'stide'; did you mean 'stride'"),
        ({"frames": {"mode": "sum"}}, "mode is 'sum'; allowed"),
        ({"several_images": "crop"}, "several_images is 'crop'; allowed: pad, anyres"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiling: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        family_processor("llava_next", **tiling)


def test_a_limit_needs_a_merge_that_shrinks():
    with pytest.raises(DataError, match="only merge 'spatial_unpad' shrinks"):
        family_processor("llava_onevision", merge="spatial")


def test_what_knows_no_tiles_is_refused():
    processor = family_processor("llava_next")
    with pytest.raises(DataError, match="use encode_prompt and pad_prompts"):
        processor(images=[tiny_image(0)], text="<image>What?", return_tensors="pt")
    with pytest.raises(DataError, match="use encode_visuals"):
        processor.encode_images([tiny_image(0)])
    with pytest.raises(DataError, match="differ in their tokens"):
        processor.encode_text(TURNS, 1)
    assert processor(text="What?", return_tensors="pt")["input_ids"].shape[0] == 1


def noise(size: tuple[int, int]) -> Image.Image:
    """A picture in which every pixel matters."""
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def stock_processor(folder: Path, family: str) -> Any:
    """A stock processor, saved as published checkpoints are, beside a config.json."""
    grids = [[TILE * rows, TILE * cols] for rows in (1, 2, 3) for cols in (1, 2, 3)]
    size = {"height": TILE, "width": TILE}
    common = {"vision_feature_select_strategy": "full"}
    if family == "llava_next":
        sizes = {"size": {"shortest_edge": TILE}, "crop_size": size}
        image_processor: Any = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=grids)
        made: Any = LlavaNextProcessor(image_processor, tiny_tokenizer(), patch_size=TILE // SIDE, **common)
    else:
        image_processor = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grids, image_mean=[0.4] * 3)
        video = LlavaOnevisionVideoProcessor(size=size)
        common |= {"num_image_tokens": SIDE**2, "vision_aspect_ratio": "anyres_max_2"}
        made = LlavaOnevisionProcessor(image_processor, tiny_tokenizer(), video, **common)
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vision_config": {"patch_size": TILE // SIDE}}))
    return made


@pytest.mark.parametrize(("family", "mode"), [("llava_next", "anyres"), ("llava_onevision", "anyres_max_2")])
def test_a_stock_processor_is_read_with_its_grids(family: str, mode: str, tmp_path: Path):
    stock = stock_processor(tmp_path, family)
    ours = load_processor(tmp_path)
    assert ours.image_mode == mode
    for size in ODD:
        image = noise(size)
        expected = stock(images=[image], text="<image>", return_tensors="pt")
        found = ours.encode_visuals([image])
        assert found["image_tokens"] == [expected["input_ids"].shape[1]], size
        assert found["image_sizes"] == [tuple(expected["image_sizes"][0].tolist())]
        # a value of 255 is 0.015; transformers resizes to whole numbers in another order of channels
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"][0], rtol=0, atol=1e-4)
    pair = [noise(ODD[0]), noise(ODD[1])]
    expected = stock(images=[pair], text=["<image><image>"], return_tensors="pt")
    found = ours.encode_visuals(pair)
    assert sum(found["image_tokens"]) == expected["input_ids"].shape[1]
    assert (found["num_tiles"] == [1, 1]) == (family == "llava_onevision")
    for index, count in enumerate(found["num_tiles"]):
        start = sum(found["num_tiles"][:index])
        wanted = expected["pixel_values"][index, :count]
        torch.testing.assert_close(found["pixel_values"][start : start + count], wanted, rtol=0, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    assert load_processor(tmp_path / "ours").planner == ours.planner


def test_samples_and_batches(tmp_path: Path):
    processor = family_processor("llava_next")
    source = write_mixed_json(tmp_path)
    check_sources([source]).raise_if_broken()
    data = ConversationDataset([source], processor, max_length=256)
    batch = Collator.of(processor)([data[index] for index in range(len(data))])
    assert batch["batch_num_images"] == [1, 2, 0, 1, 2, 0]
    assert sum(batch["num_tiles"]) == batch["pixel_values"].shape[0]
    assert batch["num_tiles"][1:3] == [1, 1]
    assert batch["num_tiles"][0] > 1
    assert set(batch) == {
        "input_ids", "attention_mask", "labels", "pixel_values", "image_sizes", "num_tiles", "batch_num_images",
    }  # fmt: skip
    for index, length in enumerate(data.lengths):
        tokens = sum(data[index].get("image_tokens", []))
        assert length > tokens


def test_lengths_are_checked_with_the_tiles(tmp_path: Path):
    source = write_mixed_json(tmp_path, 3)
    tokens = family_processor("llava_next").image_tokens([SIZES[0][::-1]])[0]
    with pytest.raises(DataError, match=r"mixed-0.*more than max_length"):
        ConversationDataset([source], family_processor("llava_next"), max_length=tokens + 5)
    data = ConversationDataset([source], family_processor("llava_next"), max_length=tokens + 5, overlong="skip")
    assert data.report()["skipped_overlong"] >= 1


def test_a_sample_that_does_not_fit_its_tiles_is_named(tmp_path: Path):
    processor = family_processor("llava_next")
    collate = Collator.of(processor)
    good = {"sample_id": "good", **processor.encode_sample(TURNS, images(1))}
    cut = {**good, "sample_id": "bad", "input_ids": good["input_ids"][3:], "labels": good["labels"][3:]}
    cut["input_ids"] = cut["input_ids"].clone()
    cut["input_ids"][int((cut["input_ids"] == processor.image_token_id).nonzero()[0])] = 1
    with pytest.raises(DataError, match=r"sample 'bad': \d+ image placeholders, but its images become"):
        collate([good, cut])
    with pytest.raises(DataError, match=r"sample 'bad': \d+ pictures, but its images have \[2\] tiles"):
        collate([good, {**good, "sample_id": "bad", "num_tiles": [2]}])
    whole = {"sample_id": "bad", **tiny_siglip_processor().encode_sample(TURNS, images(1))}
    with pytest.raises(DataError, match="sample 'bad': has no 'image_sizes'"):
        collate([whole])
    dummy = collate([{"sample_id": "t", **processor.encode_sample([Turn("user", "a"), TURNS[1]], [])}])
    assert (dummy["num_tiles"], dummy["image_sizes"], dummy["batch_num_images"]) == ([1], [(TILE, TILE)], [0])
    with pytest.raises(DataError, match="a model with tiles needs image_shape"):
        Collator(0, 1, 4, feature_shape=(4, 5), is_tiled=True)


def video_json(folder: Path, marker: str = "<video>") -> tuple[Path, Path]:
    """One record with the frames of a video, and one with an image."""
    path, where = write_llava_json(folder, 1)
    names = []
    for index in range(6):
        names.append(f"frame-{index}.png")
        tiny_image(index, (24, 20)).save(where / names[-1])
    turns = [{"from": "human", "value": f"{marker}\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*records, {"id": "v", "video": names, "conversations": turns}]))
    return path, where


@pytest.mark.parametrize("marker", ["<video>", "<image>"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_videos_of_frame_files_are_trained_on(family: str, marker: str, tmp_path: Path):
    processor = family_processor(family)
    processor.num_frames = 4
    source = video_json(tmp_path, marker)
    check_sources([source]).raise_if_broken()
    data = ConversationDataset([source], processor, max_length=256)
    item = data[1]
    frames = [0, 1, 3, 5]  # the first, the last, and others at equal distances
    expected = processor.encode_sample(
        [Turn("user", "<image>\nWhat is it?"), Turn("assistant", "red")], [[tiny_image(i, (24, 20)) for i in frames]]
    )
    assert torch.equal(item["input_ids"], expected["input_ids"])
    assert torch.equal(item["pixel_values"], expected["pixel_values"])
    batch = Collator.of(processor)([data[0], item])
    assert batch.get("is_video") == (None if family == "llava" else [False, True])


def test_broken_videos_are_named(tmp_path: Path):
    path, where = video_json(tmp_path)
    (where / "frame-3.png").unlink()
    with pytest.raises(DataError, match=r"record 'v': video .*frame-3.png does not exist"):
        check_sources([(path, where)]).raise_if_broken()
    records = json.loads(path.read_text())
    turns = [{"from": "human", "value": "<video> and <image>?"}, {"from": "gpt", "value": "the <video>"}]
    with pytest.raises(DataError, match=r"1 image\(s\) but 2"):
        parse_record({**records[1], "conversations": turns}, where, "s")


def test_stored_features_know_neither_tiles_nor_videos(tmp_path: Path):
    source = video_json(tmp_path)
    with FeatureStoreWriter(tmp_path / "store", "f", num_images=1, num_tokens=4, channels=3) as writer:
        writer.add(["0" * 40], np.zeros((1, 4, 3), dtype=np.float32))
    store = FeatureStore(tmp_path / "store", "f")
    with pytest.raises(DataError, match="record 'v': is a video, and only features of images are stored"):
        ConversationDataset([source], tiny_siglip_processor(), max_length=256, feature_store=store)
    with pytest.raises(DataError, match="this model is shown tiles; leave feature_cache out"):
        ConversationDataset([source], family_processor("llava_next"), max_length=256, feature_store=store)


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA"])
def test_images_of_other_colour_modes_are_cut_as_rgb(mode: str):
    processor = family_processor("llava_next")
    image = noise((40, 20)).convert(mode)
    found = processor.encode_visuals([image])["pixel_values"]
    assert torch.equal(found, processor.encode_visuals([image.convert("RGB")])["pixel_values"])
