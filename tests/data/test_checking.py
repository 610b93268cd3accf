import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from llava_moe.data.check_report import as_json, as_text, histogram
from llava_moe.data.checking import Limits, MixtureReport, _blocks, check_mixture, processor_mark
from llava_moe.data.collator import Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.image_marks import DEFAULT_DISTANCE, Benchmarks, difference_hash
from llava_moe.data.index import ROW, RecordIndex
from llava_moe.data.indexed import IndexedDataset, exact_lengths, has_visuals
from llava_moe.data.mixture import Mixture, SourceSpec
from llava_moe.data.schema import DataError
from llava_moe.data.sources import ParquetFile
from tests.data.test_sources import rows, shard_members, write_parquet, write_tar
from tests.tiny import tiny_image, tiny_siglip_processor, write_llava_json
from tests.tiny_families import family_processor, write_mixed_json

PROCESSOR = tiny_siglip_processor()


def mixture_of(*sources: SourceSpec | tuple[Path, Path], seed: int = 0) -> Mixture:
    specs = [s if isinstance(s, SourceSpec) else SourceSpec(str(s[0]), str(s[1])) for s in sources]
    return Mixture(tuple(specs), seed)


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def edit(path: Path, index: int, **changes: Any) -> None:
    records = json.loads(path.read_text())
    records[index].update(changes)
    path.write_text(json.dumps(records))


def answer(text: str, question: str = "<image>\nWhat?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": text}]


def broken_source(folder: Path) -> tuple[Path, Path]:
    """Eleven records: 0 and 10 are good, each other has one problem."""
    path, images = write_llava_json(folder, 11)
    edit(path, 1, image="gone.png")
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:70])
    edit(path, 3, conversations=answer("red", "What?"))
    edit(path, 4, conversations=answer("  "))
    edit(path, 5, conversations=answer("red " * 60))
    edit(path, 6, id=None)
    Image.new("RGB", (200, 100)).save(images / "7.png")
    (images / "8.png").write_text("no image")
    edit(path, 9, conversations=answer("red", "<image> <image> What?"))
    return path, images


def test_every_kind_of_problem_is_found_and_named(tmp_path: Path) -> None:
    source = broken_source(tmp_path)
    limits = Limits(max_length=64, max_pixels=10_000)
    report = check_mixture(mixture_of(source), processor=PROCESSOR, limits=limits, workers=3)
    wanted = {
        "missing_image": "'sample-1'",
        "corrupt_image": "'sample-2'",
        "placeholders": "'sample-3'",
        "empty_answer": "'sample-4'",
        "overlong": "'sample-5'",
        "record": "id None",
        "oversized_image": "'sample-7'",
    }
    assert report.counts == {**dict.fromkeys(wanted, 1), "corrupt_image": 2, "placeholders": 2}
    for kind, name in wanted.items():
        assert name in report.examples[kind][0]
        assert str(source[0]) in report.examples[kind][0]
    assert (report.records, report.kept) == (11, 2)
    assert sum(report.left_out.values()) == 9
    assert not report.is_clean
    text = as_text(report)
    for kind in wanted:
        assert f"{kind}: " in text
    assert "11 records" in text and "2 can be used" in text  # noqa: PT018
    assert json.loads(json.dumps(as_json(report)))["problems"]["overlong"]["count"] == 1


def test_a_clean_mixture_gives_lengths_and_a_histogram(tmp_path: Path) -> None:
    source = write_llava_json(tmp_path, 6, text_only_every=3, num_turns=2)
    seen = []
    report = check_mixture(
        mixture_of(source), processor=PROCESSOR, progress=lambda done, total: seen.append((done, total))
    )
    assert report.is_clean
    assert (report.records, report.kept, report.images) == (6, 6, 4)
    data = ConversationDataset([source], PROCESSOR, max_length=256)
    assert report.lengths.tolist() == [len(data[i]["input_ids"]) for i in range(6)] == exact_lengths(data).tolist()
    assert seen == [(i + 1, 6) for i in range(6)]
    unmeasured = check_mixture(mixture_of(source))
    assert len(unmeasured.lengths) == 0
    assert "tokens: not counted" in as_text(unmeasured)
    with pytest.raises(DataError, match="max_length counts tokens"):
        check_mixture(mixture_of(source), limits=Limits(max_length=5))


def test_the_histogram_holds_every_length() -> None:
    lengths = np.array([1, 2, 3, 100, 1000, 1000, 1555], np.int32)
    bins = histogram(lengths)
    assert sum(count for *_, count in bins) == 7
    assert all(b[0] == a[1] + 1 for a, b in pairwise(bins))
    assert bins[0][0] == 1
    assert bins[-1][1] >= 1555
    assert len(bins) <= 12
    for first, last, count in bins:
        assert count == ((lengths >= first) & (lengths <= last)).sum()
    assert histogram(np.zeros(0, np.int32)) == []


def test_a_file_that_breaks_off_is_one_problem(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path, 3)
    path.write_text(path.read_text()[:-40])
    limits = Limits(max_length=99)
    mixture = mixture_of((path, images), write_llava_json(tmp_path / "b", 2))
    report = check_mixture(mixture, processor=PROCESSOR, limits=limits, index=tmp_path / "index")
    assert report.counts == report.left_out == {"file": 1}
    assert "not valid JSON at line 1" in report.examples["file"][0]
    assert report.kept == 4  # two before the break, two of the other source
    with pytest.raises(DataError, match=r"left records out \({'file': 1} of 4\)"):
        IndexedDataset(tmp_path / "index", PROCESSOR, 99)


def test_limits_and_weights_decide_what_is_checked(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path, 6)
    edit(path, 5, image="gone.png")
    spec = SourceSpec(str(path), str(images), "first:4", 1.5)
    report = check_mixture(mixture_of(spec), index=tmp_path / "index")
    assert report.is_clean  # the last one takes no part
    assert (report.records, report.kept, report.images) == (6, 6, 4)
    names = [sample.id for sample in RecordIndex(tmp_path / "index")]
    assert names[:4] == [f"sample-{i}" for i in range(4)]
    assert len(set(names)) == 4
    edit(path, 4, image="gone.png")
    twice = SourceSpec(str(path), str(images), "end:2", 2)
    report = check_mixture(mixture_of(twice))
    assert report.counts == {"missing_image": 2}
    assert [f"record 'sample-{i}': " in report.examples["missing_image"][i - 4] for i in (4, 5)] == [True, True]
    assert (report.records, report.kept, report.left_out) == (4, 0, {"missing_image": 4})


def test_an_index_gives_the_batches_of_the_files(tmp_path: Path) -> None:
    source = write_llava_json(tmp_path, 5, text_only_every=2)
    tar = write_tar(tmp_path / "s.tar", shard_members(2))
    parquet = write_parquet(tmp_path / "d.parquet", rows(3))
    mixture = mixture_of(source, SourceSpec(str(tar)), SourceSpec(str(parquet)))
    limits = Limits(max_length=256)
    check_mixture(mixture, processor=PROCESSOR, limits=limits, index=tmp_path / "index")
    data = IndexedDataset(tmp_path / "index", PROCESSOR, 256)
    assert len(data) == 10
    assert [len(data[i]["input_ids"]) for i in range(10)] == data.lengths.tolist()
    assert data.report() == {"records": 10, "used": 10, "skipped_overlong": 0, "truncated": 0}
    plain = ConversationDataset([source], PROCESSOR, 256)
    for index in range(5):
        for key, value in plain[index].items():
            assert (data[index][key] == value).all() if hasattr(value, "all") else data[index][key] == value
    assert data[6]["pixel_values"].equal(PROCESSOR.encode_images([tiny_image(1)]))
    assert data[9]["pixel_values"].equal(PROCESSOR.encode_images([tiny_image(2)]))
    batch = Collator.of(PROCESSOR)([data[i] for i in range(10)])
    assert batch["pixel_values"].shape[0] == 8


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_lengths_of_tiled_images_are_exact(family: str, tmp_path: Path) -> None:
    source, processor = write_mixed_json(tmp_path), family_processor(family)
    limits = Limits(max_length=512)
    check_mixture(mixture_of(source), processor=processor, limits=limits, index=tmp_path / "index")
    data = IndexedDataset(tmp_path / "index", processor, 512)
    plain = ConversationDataset([source], processor, 512)
    wanted = [len(plain[i]["input_ids"]) for i in range(6)]
    assert data.lengths.tolist() == wanted == [len(data[i]["input_ids"]) for i in range(6)]
    assert exact_lengths(plain).tolist() == wanted
    assert has_visuals(data).tolist() == has_visuals(plain).tolist() == [True, True, False] * 2


def test_what_was_left_out_is_refused_or_counted_and_never_replaced(tmp_path: Path) -> None:
    source = broken_source(tmp_path)
    limits = Limits(max_length=64, max_pixels=10_000)
    check_mixture(mixture_of(source), processor=PROCESSOR, limits=limits, index=tmp_path / "index")
    with pytest.raises(DataError, match=r"left records out \({.*} of 11\); .*on_problem to skip"):
        IndexedDataset(tmp_path / "index", PROCESSOR, 64)
    data = IndexedDataset(tmp_path / "index", PROCESSOR, 64, on_problem="skip")
    assert [data[i]["sample_id"] for i in range(len(data))] == ["sample-0", "sample-10"]
    report = data.report()
    assert (report["records"], report["used"], report["skipped_overlong"]) == (11, 2, 1)
    assert sum(count for name, count in report.items() if name.startswith("left_out_")) == 8
    with pytest.raises(DataError, match="on_problem is 'ignore'; choose one of refuse, skip"):
        IndexedDataset(tmp_path / "index", PROCESSOR, 64, on_problem="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(("overlong", "kept", "truncated"), [("skip", 2, 0), ("truncate", 3, 1)])
def test_long_samples_follow_the_policy_of_the_data_set(
    tmp_path: Path, overlong: Any, kept: int, truncated: int
) -> None:
    path, images = write_llava_json(tmp_path, 4)
    edit(path, 1, conversations=answer("red " * 60))
    edit(path, 2, conversations=answer("red", "<image>\nWhat? " + "red " * 60))
    limits = Limits(max_length=48, overlong=overlong)
    report = check_mixture(mixture_of((path, images)), processor=PROCESSOR, limits=limits, index=tmp_path / "index")
    assert (report.kept, report.truncated) == (kept, truncated)
    data = IndexedDataset(tmp_path / "index", PROCESSOR, 48, overlong)
    plain = ConversationDataset([(path, images)], PROCESSOR, 48, overlong)
    assert data.report() == plain.report()
    assert [data[i]["input_ids"].tolist() for i in range(kept)] == [plain[i]["input_ids"].tolist() for i in range(kept)]
    assert exact_lengths(plain).tolist() == data.lengths.tolist()


def test_an_index_is_refused_where_it_no_longer_fits(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path, 3)
    index = tmp_path / "index"
    check_mixture(mixture_of((path, images)), index=index)
    with pytest.raises(DataError, match="holds no lengths"):
        IndexedDataset(index, PROCESSOR, 64)
    check_mixture(mixture_of((path, images)), processor=PROCESSOR, limits=Limits(max_length=64), index=index)
    assert len(IndexedDataset(index, PROCESSOR, 64)) == 3
    with pytest.raises(DataError, match=r"another max_length \(64 there, 65 now\)"):
        IndexedDataset(index, PROCESSOR, 65)
    with pytest.raises(DataError, match="another overlong"):
        IndexedDataset(index, PROCESSOR, 64, "truncate")
    with pytest.raises(DataError, match="another template, tokenizer or image mode"):
        IndexedDataset(index, tiny_siglip_processor(template="v1"), 64)
    edit(path, 1, id="other")
    with pytest.raises(DataError, match=r"data\.json has changed since"):
        RecordIndex(index)
    (index / "rows.npy").write_bytes(b"half")
    with pytest.raises(DataError, match="not a readable index"):
        RecordIndex(index)
    with pytest.raises(DataError, match="holds no index; choose another place"):
        check_mixture(mixture_of((path, images)), index=images)


def test_no_half_index_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_llava_json(tmp_path, 3)
    check_mixture(mixture_of(source), index=tmp_path / "index")
    before = (tmp_path / "index" / "index.json").read_text()
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        check_mixture(mixture_of(source), index=tmp_path / "index")
    assert (tmp_path / "index" / "index.json").read_text() == before
    assert len(RecordIndex(tmp_path / "index")) == 3


def test_the_processor_mark_follows_what_lengths_depend_on() -> None:
    marks = {
        processor_mark(tiny_siglip_processor(**options))
        for options in ({}, {"template": "v1"}, {"image_size": 32}, {"image_mode": "pad"})
    }
    assert len(marks) == 4
    assert processor_mark(tiny_siglip_processor()) in marks


def test_images_of_benchmarks_are_found(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path / "train", 6)
    held_out = tmp_path / "pope" / "val"
    held_out.mkdir(parents=True)
    for number in range(5):
        noise(number).save(held_out / f"{number}.png")
    (images / "0.png").write_bytes((held_out / "0.png").read_bytes())
    noise(1, (96, 72)).save(images / "1.jpg", quality=70)  # another size and format
    edit(path, 1, image="1.jpg")
    noise(99).save(images / "2.png")
    ImageOps.mirror(noise(3)).save(images / "3.png")  # a mirror image is another image
    Image.new("RGB", (30, 30), "white").save(images / "4.png")  # blank
    Image.new("RGB", (50, 20), "white").save(held_out / "blank.png")
    benchmarks = Benchmarks({"pope": tmp_path / "pope"})
    assert len(benchmarks) == 6
    report = check_mixture(mixture_of((path, images)), benchmarks=benchmarks)
    assert report.is_clean  # reported, and kept
    assert [(where.rsplit("/", 1)[1], match.distance is None) for where, match in report.matches] == [
        ("0.png", True),
        ("1.jpg", False),
    ]
    text = as_text(report)
    assert "pope (6 images): 1 uses of the same file (SHA-1), 1 of images that look the same (dHash)" in text
    limits = Limits(drop_benchmark_images=True)
    report = check_mixture(mixture_of((path, images)), benchmarks=benchmarks, limits=limits, index=tmp_path / "index")
    assert report.left_out == {"benchmark_image": 2}
    assert [s.id for s in RecordIndex(tmp_path / "index")] == [f"sample-{i}" for i in range(2, 6)]


def test_benchmarks_inside_data_files(tmp_path: Path) -> None:
    source = write_llava_json(tmp_path, 3)
    parquet = write_parquet(tmp_path / "bench.parquet", rows(2))
    report = check_mixture(mixture_of(source), benchmarks=Benchmarks({"bench": parquet}))
    assert [match.item for _, match in report.matches] == [f"{parquet}:row {i}, image 0" for i in (0, 1)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="benchmark none: no image in"):
        Benchmarks({"none": tmp_path / "empty"})
    with pytest.raises(DataError, match="distance=-1"):
        Benchmarks({}, distance=-1)


def test_the_hash_survives_what_it_should_and_tells_others_apart() -> None:
    hashes = [difference_hash(noise(seed)) for seed in range(60)]
    assert None not in hashes

    def bits(a: bytes | None, b: bytes | None) -> int:
        assert a is not None
        assert b is not None
        return bin(int.from_bytes(a) ^ int.from_bytes(b)).count("1")

    apart = [bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 20  # of 1770 pairs of unrelated images
    for seed in range(20):
        assert bits(hashes[seed], difference_hash(noise(seed, (128, 96)))) <= DEFAULT_DISTANCE
    assert difference_hash(Image.new("RGB", (20, 20))) is None


def test_processes_do_not_change_what_is_found(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path / "a", 150, num_turns=2)
    chosen = random.Random(0).sample(range(150), 9)
    for index in chosen:
        edit(path, index, image=f"gone-{index}.png")
    for index in range(0, 150, 7):  # records of different processes use the same file
        edit(path, index, image="8.png")
    tar = write_tar(tmp_path / "s.tar", shard_members(40))
    parquet = write_parquet(tmp_path / "d.parquet", rows(50), group=7)
    mixture = mixture_of((path, images), SourceSpec(str(tar)), SourceSpec(str(parquet)))
    one, many = (check_mixture(mixture, processor=PROCESSOR, workers=workers) for workers in (0, 2))
    gone = len([index for index in chosen if index % 7])
    assert one.counts == many.counts == {"missing_image": gone}
    assert one.examples == many.examples
    assert one.lengths.tolist() == many.lengths.tolist()
    assert one.images == many.images
    assert (one.kept, many.kept) == (240 - gone, 240 - gone)


def test_images_can_be_looked_for_and_left_closed(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path, 4)
    (images / "1.png").write_bytes(b"no image")
    (images / "2.png").unlink()
    limits = Limits(max_length=99, decode=False)
    report = check_mixture(mixture_of((path, images)), processor=PROCESSOR, limits=limits)
    assert report.counts == {"missing_image": 1}
    assert report.kept == 3
    assert "4 images (looked for, not decoded)" in as_text(report)
    (images / "1.png").unlink()
    benchmarks = Benchmarks({"b": images})
    with pytest.raises(DataError, match="by their pixels"):
        check_mixture(mixture_of((path, images)), limits=limits, processor=PROCESSOR, benchmarks=benchmarks)


def test_parquet_is_cut_where_its_row_groups_are(tmp_path: Path) -> None:
    """A process that reads one row of a group has to read the group."""
    readers = [ParquetFile(write_parquet(tmp_path / f"{n}.parquet", rows(n), group=4)) for n in (10, 3)]
    table = np.array([(0, row, 0, 0, 0) for row in (0, 1, 3, 4, 8, 9)] + [(1, 2, 0, 0, 0)], ROW)
    assert [block["start"].tolist() for block in _blocks(readers, table)] == [[0, 1, 3], [4], [8, 9], [2]]
    assert list(_blocks(readers, table[:0])) == []


def test_an_index_of_nothing_says_why(tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path, 2)
    for index in (0, 1):
        edit(path, index, image="gone.png")
    with pytest.raises(
        DataError, match=r"(?s)no record of 2 is left .*'sample-0'.*gone\.png does not exist.*'sample-1'"
    ):
        check_mixture(mixture_of((path, images)), index=tmp_path / "index")


def test_an_empty_report_can_be_shown() -> None:
    assert "checked 0 records" in as_text(MixtureReport())
