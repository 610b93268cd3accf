import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFile
from torch.utils.data import DataLoader

from llava_moe.data.check import check_sources
from llava_moe.data.collator import Collator
from llava_moe.data.conversation import IGNORE_INDEX
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.feature_store import FeatureStore, FeatureStoreWriter, image_key
from llava_moe.data.schema import DataError
from tests.tiny import tiny_image, tiny_siglip_processor, write_llava_json

PROCESSOR = tiny_siglip_processor()


def collator() -> Collator:
    return Collator(
        pad_token_id=PROCESSOR.pad_token_id,
        image_token_id=PROCESSOR.image_token_id,
        num_image_tokens=PROCESSOR.num_image_tokens,
        image_shape=PROCESSOR.image_shape,
    )


def edit(path: Path, index: int, **changes: Any) -> None:
    records = json.loads(path.read_text())
    records[index].update(changes)
    path.write_text(json.dumps(records))


def test_items_and_batches(tmp_path: Path):
    source = write_llava_json(tmp_path, 4, text_only_every=2, num_turns=2)
    data = ConversationDataset([source], PROCESSOR, max_length=256)
    assert len(data) == 4
    assert data.report() == {"records": 4, "used": 4, "skipped_overlong": 0, "truncated": 0}
    item = data[0]
    assert item["sample_id"] == "sample-0"
    assert torch.equal(item["pixel_values"], PROCESSOR.encode_images([tiny_image(0)]))
    assert "pixel_values" not in data[1]
    batch = next(iter(DataLoader(data, batch_size=4, collate_fn=collator())))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    for row, item in enumerate(data[index] for index in range(4)):
        length = len(item["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == item["input_ids"].tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, length:] == PROCESSOR.pad_token_id).all()


def test_sources_are_joined_in_order(tmp_path: Path):
    first, second = write_llava_json(tmp_path / "a", 2), write_llava_json(tmp_path / "b", 3)
    data = ConversationDataset([first, second], PROCESSOR, max_length=256)
    assert [sample.source for sample in data.samples] == [str(first[0])] * 2 + [str(second[0])] * 3
    assert len(data.lengths) == 5


def test_all_problems_come_in_one_error_before_any_image_is_opened(tmp_path: Path):
    path, images = write_llava_json(tmp_path, 14)
    for index in range(11):
        edit(path, index, image=f"gone-{index}.png")
    edit(path, 11, image=None)
    (images / "12.png").write_bytes(b"broken, but only a decoder can tell")
    with pytest.raises(DataError) as caught:
        ConversationDataset([(path, images)], PROCESSOR, max_length=256)
    message = str(caught.value)
    assert message.startswith("12 problem(s) in 14 record(s)")
    assert message.count("does not exist") == 10
    assert message.endswith("... and 2 more")


def test_a_corrupt_image_is_named_when_it_is_read(tmp_path: Path):
    path, images = write_llava_json(tmp_path, 2)
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
    data = ConversationDataset([(path, images)], PROCESSOR, max_length=256)
    with pytest.raises(DataError, match=r"'sample-1'.*1\.png"):
        data[1]


def test_a_truncated_image_is_an_error_whatever_other_libraries_tell_pil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does when it is imported
    path, images = write_llava_json(tmp_path, 8)
    for index in (1, 4):
        file = images / f"{index}.png"
        file.write_bytes(file.read_bytes()[:60])
    report = check_sources([(path, images)], num_workers=4)
    assert len(report.problems) == 2
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "the others keep what they chose"


LONG_ANSWER = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red " * 60}]
LONG_QUESTION = [{"from": "human", "value": "<image>\nWhat? " + "red " * 60}, {"from": "gpt", "value": "red"}]
LATE_IMAGE = [
    {"from": "human", "value": "What? " + "red " * 20},
    {"from": "gpt", "value": "red " * 60},
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "red"},
]


def overlong_source(tmp_path: Path) -> tuple[Path, Path]:
    path, images = write_llava_json(tmp_path, 4)
    for index, conversations in enumerate((LONG_ANSWER, LONG_QUESTION, LATE_IMAGE), start=1):
        edit(path, index, conversations=conversations)
    return path, images


def test_overlong_samples_are_an_error_unless_a_policy_is_chosen(tmp_path: Path):
    source = overlong_source(tmp_path)
    with pytest.raises(DataError, match=r"3 problem\(s\).*\n.*'sample-1': \d+ tokens, more than max_length 48"):
        ConversationDataset([source], PROCESSOR, max_length=48)
    with pytest.raises(DataError, match="choose one of error, skip, truncate"):
        ConversationDataset([source], PROCESSOR, max_length=48, overlong="cut")  # type: ignore[arg-type]


def test_overlong_samples_can_be_skipped(tmp_path: Path):
    data = ConversationDataset([overlong_source(tmp_path)], PROCESSOR, max_length=48, overlong="skip")
    assert data.report() == {"records": 4, "used": 1, "skipped_overlong": 3, "truncated": 0}
    assert [sample.id for sample in data.samples] == ["sample-0"]


def test_truncation_never_cuts_an_image_or_the_whole_answer(tmp_path: Path):
    data = ConversationDataset([overlong_source(tmp_path)], PROCESSOR, max_length=48, overlong="truncate")
    assert data.report() == {"records": 4, "used": 2, "skipped_overlong": 2, "truncated": 1}
    assert [sample.id for sample in data.samples] == ["sample-0", "sample-1"]
    assert len(data[1]["input_ids"]) == len(data[1]["labels"]) == 48
    assert (data[1]["labels"] != IGNORE_INDEX).any()
    collator()([data[0], data[1]])


def test_a_sample_of_just_the_longest_length_is_kept(tmp_path: Path):
    source = write_llava_json(tmp_path, 1)
    length = len(ConversationDataset([source], PROCESSOR, max_length=256)[0]["input_ids"])
    assert ConversationDataset([source], PROCESSOR, max_length=length).lengths == [length]
    with pytest.raises(DataError, match=f"{length} tokens"):
        ConversationDataset([source], PROCESSOR, max_length=length - 1)
    with pytest.raises(DataError, match=r"no sample is left of 1 record"):
        ConversationDataset([source], PROCESSOR, max_length=length - 1, overlong="skip")


def test_a_conversation_that_the_template_cannot_hold_is_found_at_once(tmp_path: Path):
    source = write_llava_json(tmp_path, 2, num_turns=2)
    with pytest.raises(DataError, match=r"2 problem.*\n.*'sample-0': template 'plain' holds one image question"):
        ConversationDataset([source], tiny_siglip_processor(template="plain"), max_length=256)


def write_store(path: Path, images: Path, fingerprint: str = "tower-1") -> dict[str, torch.Tensor]:
    features = {image_key(file): torch.randn(4, 6) for file in sorted(images.iterdir())}
    with FeatureStoreWriter(path, fingerprint, num_images=len(features), num_tokens=4, channels=6) as writer:
        for key, value in features.items():
            writer.add([key], value[None])
    return features


def test_stored_features_take_the_place_of_pixels(tmp_path: Path):
    path, images = write_llava_json(tmp_path, 3, text_only_every=3)
    features = write_store(tmp_path / "store", images)
    store = FeatureStore(tmp_path / "store", "tower-1")
    data = ConversationDataset([(path, images)], PROCESSOR, max_length=256, feature_store=store)
    item = data[1]
    assert "pixel_values" not in item
    assert torch.allclose(item["vision_features"][0], features[image_key(images / "1.png")], atol=2e-3)
    collate = Collator(
        PROCESSOR.pad_token_id, PROCESSOR.image_token_id, PROCESSOR.num_image_tokens, feature_shape=store.feature_shape
    )
    assert collate([data[0], data[1], data[2]])["vision_features"].shape == (2, 4, 6)
    assert collate([data[2]])["vision_features"].eq(0).all()


def test_images_missing_in_the_store_are_found_at_once(tmp_path: Path):
    path, images = write_llava_json(tmp_path, 2)
    write_store(tmp_path / "store", images)
    tiny_image(3).save(images / "1.png")
    with pytest.raises(DataError, match=r"'sample-1'.*not in the feature store"):
        ConversationDataset([(path, images)], PROCESSOR, 256, feature_store=FeatureStore(tmp_path / "store", "tower-1"))


def test_check_decodes_every_image(tmp_path: Path):
    path, images = write_llava_json(tmp_path, 5)
    assert check_sources([(path, images)]).problems == []
    edit(path, 0, id=None)
    edit(path, 1, image="gone.png")
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
    report = check_sources([(path, images), (tmp_path / "none.json", images)], num_workers=2)
    assert (report.num_records, report.num_images) == (6, 3)
    assert len(report.problems) == 4
    for words in ("string 'id'", "gone.png does not exist", "none.json: no such data file", "'sample-3'"):
        assert sum(words in problem for problem in report.problems) == 1
    with pytest.raises(DataError, match=r"4 problem\(s\)"):
        report.raise_if_broken()
