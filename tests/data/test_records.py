"""Records that are read one by one, and how little of them stays in memory."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llava_moe.data.broken import KEY
from llava_moe.data.check import check_sources
from llava_moe.data.collator import PADDING, Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.indexed import exact_lengths
from llava_moe.data.packing import PackedDataset, PackingCollator
from llava_moe.data.parallel import in_order
from llava_moe.data.records import Records, open_plain, walk
from llava_moe.data.schema import DataError, load_records, parse_record
from tests.data.test_checking import edit
from tests.tiny import tiny_siglip_processor, write_llava_json
from tests.tiny_families import family_processor, write_mixed_json

PROCESSOR = tiny_siglip_processor()


def test_samples_are_those_of_the_parsed_files(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path, 6, text_only_every=3, num_turns=2)
    data = ConversationDataset([(path, images)], PROCESSOR, 256)
    wanted = [parse_record(record, images, str(path)) for record in load_records(path)]
    assert list(data.samples) == wanted
    assert data.samples[1:3] == wanted[1:3]
    assert data.samples[-1] == wanted[-1]
    assert data.visuals.tolist() == [sample.num_visuals for sample in wanted]
    copy = pickle.loads(pickle.dumps(data.samples))
    assert copy[4] == wanted[4]


def test_what_is_kept_of_a_record_is_twenty_bytes(tmp_path: Path) -> None:
    data = ConversationDataset([write_llava_json(tmp_path, 8)], PROCESSOR, 256)
    assert isinstance(data.samples, Records)
    assert data.samples.places.nbytes == 20 * 8
    assert isinstance(data.lengths, np.ndarray)
    # nothing else may grow with the data: a list or a dict is copied into every worker, page by page
    assert not [name for name, value in vars(data).items() if isinstance(value, list | dict) and len(value) > 5]


def test_the_problems_of_all_files_come_in_order_and_a_broken_file_hides_none(tmp_path: Path) -> None:
    first, images = write_llava_json(tmp_path / "a", 4)
    edit(first, 1, image="gone.png")
    first.write_text(first.read_text()[:-20])
    second, _ = write_llava_json(tmp_path / "b", 3)
    edit(second, 2, id=None)
    readers, problems = open_plain([(first, images), (tmp_path / "none.json", images), (second, images)])
    assert ["no such data file" in said for said in problems] == [True]
    found = [(f.sample.id if f.sample else f.problem) for f in walk(readers)]
    assert [said for said in found if said.startswith("sample-")] == [f"sample-{i}" for i in (0, 2, 0, 1)]
    broken = [said for said in found if not said.startswith("sample-")]
    assert ["gone.png does not exist" in broken[0], "not valid JSON" in broken[1], "id None" in broken[2]] == [True] * 3
    report = check_sources([(first, images), (second, images)])
    assert (report.num_records, len(report.problems)) == (7, 3)


def test_the_place_of_a_broken_record_is_a_line(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path, 300)
    records = load_records(path)
    for index in (7, 150, 299):
        records[index]["conversations"] = []
    import json

    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]")
    said = [found.problem for found in walk(open_plain([(path, images)])[0]) if found.problem]
    assert [text.rsplit("(", 1)[1] for text in said] == ["line 9)", "line 152)", "line 301)"]


@pytest.mark.parametrize("family", [None, "llava_next"])
def test_lengths_are_the_same_from_one_process_or_two(family: str | None, tmp_path: Path) -> None:
    if family is None:
        data = ConversationDataset([write_llava_json(tmp_path, 150, num_turns=2)], PROCESSOR, 256)
    else:
        data = ConversationDataset([write_mixed_json(tmp_path)], family_processor(family), 512)
    alone, together = exact_lengths(data, workers=0), exact_lengths(data, workers=2)
    assert alone.dtype == together.dtype == np.int32
    assert alone.tolist() == together.tolist()
    assert alone[0] == len(data[0]["input_ids"])


def test_blocks_come_back_in_order_and_no_random_number_is_drawn() -> None:
    blocks = [list(range(n)) for n in range(9)]
    before = torch.get_rng_state()
    for workers in (0, 2):
        assert list(in_order(sum, blocks, workers)) == [sum(block) for block in blocks]
    assert torch.equal(torch.get_rng_state(), before)
    assert list(in_order(sum, [], 2)) == []


def broken_data(tmp_path: Path, hands_over: bool = True) -> ConversationDataset:
    """Five samples, of which 1 and 3 break after they were looked at."""
    path, images = write_llava_json(tmp_path, 5)
    data = ConversationDataset([(path, images)], PROCESSOR, 256)
    (images / "1.png").write_bytes(b"no longer an image")
    (images / "3.png").unlink()
    data.hands_over = hands_over
    return data


def test_a_sample_that_breaks_later_names_record_file_and_source(tmp_path: Path) -> None:
    data = broken_data(tmp_path, hands_over=False)
    with pytest.raises(DataError, match=r"data\.json: record 'sample-1': .*1\.png is not an image"):
        data[1]
    data.hands_over = True
    assert list(data[1]) == [KEY]
    assert "data.json: record 'sample-3': image" in data[3][KEY]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_left_out_of_a_batch_and_named(tmp_path: Path, workers: int) -> None:
    data = broken_data(tmp_path)
    loader = DataLoader(data, batch_size=3, num_workers=workers, collate_fn=Collator.of(PROCESSOR))
    first, second = loader
    assert first["input_ids"].shape[0] == 2
    assert first["pixel_values"].shape[0] == 2
    assert second["input_ids"].shape[0] == 1
    assert [len(first[KEY]), len(second[KEY])] == [1, 1]
    assert "'sample-1'" in first[KEY][0]
    assert KEY not in Collator.of(PROCESSOR)([data[0]])


def test_a_batch_of_which_nothing_is_left_is_padding_alone(tmp_path: Path) -> None:
    data = broken_data(tmp_path)
    batch = Collator.of(PROCESSOR)([data[1], data[3]])
    assert len(batch[KEY]) == 2
    assert (batch["labels"] == -100).all()
    assert (batch["sequence_ids"] == PADDING).all()
    assert "attention_mask" not in batch
    assert batch["pixel_values"].shape == (1, *PROCESSOR.image_shape)
    assert not (batch["input_ids"] == PROCESSOR.image_token_id).any()


@pytest.mark.parametrize("varlen", [False, True])
def test_broken_samples_are_left_out_of_their_packs(tmp_path: Path, varlen: bool) -> None:
    data = broken_data(tmp_path)
    packed = PackedDataset(data, exact_lengths(data), 256)
    collate = PackingCollator(Collator.of(PROCESSOR), PROCESSOR.pad_token_id, flat=varlen, varlen=varlen)
    whole = [data[i] for i in (0, 2, 4)]
    batch = collate([packed[i] for i in range(len(packed))])
    assert len(batch[KEY]) == 2
    assert (batch["sequence_ids"] != PADDING).sum() == sum(len(item["input_ids"]) for item in whole)
    assert batch["pixel_values"].shape[0] == 3
    nothing = collate([[data[1]], [data[3]]])
    assert (nothing["labels"] == -100).all()
    assert ("cu_seq_lens_q" in nothing) == varlen
    mixed = collate([[data[1]], [data[0], data[2]]])
    assert mixed["input_ids"].shape[0] == 1  # a pack of which nothing is left makes no row
