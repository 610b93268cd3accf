import io
import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from llava_moe.data.image import load_image
from llava_moe.data.schema import DataError, load_records, parse_record
from llava_moe.data.sources import SOURCES, EmbeddedImage, Locator, RecordError, kind_of, open_files
from tests.tiny import tiny_image, write_llava_json


def png(index: int) -> bytes:
    file = io.BytesIO()
    tiny_image(index).save(file, "PNG")
    return file.getvalue()


def turns(answer: str, markers: int = 1) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\n" * markers + "What?"}, {"from": "gpt", "value": answer}]


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return path


def shard_members(n: int) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for index in range(n):
        members[f"dir/{index:03}.json"] = json.dumps({"conversations": turns(f"answer {index}")}).encode()
        members[f"dir/{index:03}.png"] = png(index)
    return members


def rows(n: int) -> list[dict[str, Any]]:
    cell = [{"bytes": png(index), "path": None} for index in range(n)]
    return [{"id": f"r{i}", "image": cell[i], "conversations": turns(f"answer {i}")} for i in range(n)]


def write_parquet(path: Path, records: list[dict[str, Any]], group: int = 2) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=group)
    return path


def save_dataset(path: Path, records: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(records).cast_column("image", datasets.Image())
    data.save_to_disk(path)
    return path


def answers(path: Path | str, folder: Path | None = None, **options: Any) -> list[str]:
    readers = open_files(path, folder, **options)
    return [sample.turns[-1].text for reader in readers for sample in reader.samples()]


def test_every_kind_is_registered_once() -> None:
    assert sorted(SOURCES.names()) == ["hf", "json", "jsonl", "parquet", "tar"]


def test_json_gives_what_loading_it_whole_gives(tmp_path: Path) -> None:
    path, folder = write_llava_json(tmp_path, 5, text_only_every=3)
    records = load_records(path)
    records[1]["conversations"][1]["value"] = 'ünï \\" \u2028 \U0001f600 ]},{['
    path.write_text("\ufeff"[:0] + json.dumps(records, ensure_ascii=False, indent=3), encoding="utf-8")
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", encoding="utf-8")
    wanted = [parse_record(record, folder, "x") for record in records]
    for file in (path, lines):
        (reader,) = open_files(file, folder)
        found = list(reader.samples())
        assert [(s.id, s.images, s.turns) for s in found] == [(s.id, s.images, s.turns) for s in wanted]
        assert {s.source for s in found} == {str(file)}
        places = list(reader.scan())
        assert reader.sample(places[3]) == found[3]  # in any order
    path.write_text(" [ ] ")
    assert list(open_files(path, folder)[0].scan()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"id": 1},\n {"id": 2,,}]', r"not valid JSON at line 2, column 11"),
        ('[{"id": 1},\n]', r"line 2, column 1: a comma before the end"),
        ('[{"id": 1} {"id": 2}]', r"line 1, column 12: expecting ',' or '\]'"),
        ('{"id": 1}', r"the top level is no list of records"),
        ('[{"id": 1}', r"line 1, column 11: expecting"),
    ],
)
def test_a_broken_json_file_is_placed(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    (reader,) = open_files(tmp_path / "broken.json", tmp_path)
    with pytest.raises(DataError, match=said) as caught:
        list(reader.scan())
    assert "broken.json" in str(caught.value)


def test_a_bad_line_does_not_hide_the_others(tmp_path: Path) -> None:
    good = json.dumps({"id": "a", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]})
    path = tmp_path / "d.jsonl"
    path.write_bytes(f'{good}\n{{"id": }}\n[1]\n'.encode() + b'{"id": "\xff"}\n' + good.encode())
    (reader,) = open_files(path)
    places = list(reader.scan())
    assert [reader.sample(place).id for place in (places[0], places[4])] == ["a", "a"]
    said = []
    for place in places[1:4]:
        with pytest.raises(RecordError) as caught:
            reader.sample(place)
        assert caught.value.kind == "unreadable"
        said.append(str(caught.value))
    assert [f"line {n}" in text for n, text in zip((2, 3, 4), said, strict=True)] == [True] * 3
    assert all(str(path) in text for text in said)
    with pytest.raises(RecordError, match="ends before byte"):
        reader.read(Locator(path.stat().st_size - 3, 10))


def test_rules_of_the_schema_name_file_record_and_kind(tmp_path: Path) -> None:
    records = [
        {"id": "no-marker", "image": "a.png", "conversations": turns("x", 0)},
        {"id": "two-users", "conversations": [{"from": "human", "value": "?"}] * 2},
        {"conversations": turns("x", 0)},
        {"id": "escapes", "image": "../a.png", "conversations": turns("x")},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    (reader,) = open_files(path, tmp_path)
    found = []
    for locator in reader.scan():
        with pytest.raises(RecordError) as caught:
            reader.sample(locator)
        found.append((caught.value.kind, str(caught.value)))
    assert [kind for kind, _ in found] == ["placeholders", "record", "record", "record"]
    for (_, text), name, line in zip(
        found, ("'no-marker'", "'two-users'", "id None", "'escapes'"), (1, 2, 3, 4), strict=True
    ):
        assert str(path) in text
        assert name in text
        assert f"line {line}" in text
    (without,) = open_files(path)
    with pytest.raises(RecordError, match="line 1: names image files, but the source has no image_folder"):
        without.sample(next(without.scan()))


def test_tar_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "b-1.tar", {**shard_members(2), "dir/" + "long" * 40 + ".txt": b" a caption \n"})
    two = {"x.0.png": png(3), "x.1.jpg": png(4), "x.json": json.dumps({"id": 7, "messages": turns("two", 2)}).encode()}
    write_tar(tmp_path / "a-0.tar", two)
    readers = open_files(tmp_path / "*.tar")
    assert [reader.path.name for reader in readers] == ["a-0.tar", "b-1.tar"]
    samples = [sample for reader in readers for sample in reader.samples()]
    assert [sample.id for sample in samples] == ["7", "dir/000", "dir/001", "dir/" + "long" * 40]
    assert samples[3].turns[-1].text == "a caption"
    assert samples[3].images == ()
    assert [len(sample.images) for sample in samples] == [2, 1, 1, 0]
    image = samples[2].images[0]
    assert isinstance(image, EmbeddedImage)
    assert str(image).endswith("b-1.tar:dir/001.png")
    assert load_image(image, "x").tobytes() == tiny_image(1).tobytes()  # type: ignore[arg-type]
    places = list(readers[1].scan())
    assert readers[1].sample(places[1]) == samples[2]


def test_broken_tar_shards(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {**shard_members(2), "lone.png": png(0), "bad.json": b"{"})
    (reader,) = open_files(path)
    places = list(reader.scan())
    assert len(places) == 4
    for place, said in ((places[2], "record 'lone': has neither"), (places[3], "record 'bad': not valid JSON")):
        with pytest.raises(RecordError, match=said):
            reader.sample(place)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[: places[1].start + 1600])  # inside the second record
    (reader,) = open_files(cut)
    good = []
    with pytest.raises(DataError, match=r"cut\.tar"):
        good.extend(reader.sample(place).id for place in reader.scan())
    assert good == ["dir/000"]
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"no\.tar: not a readable tar file"):
        list(open_files(tmp_path / "no.tar")[0].scan())


def test_parquet_rows_with_images_inside(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = write_parquet(tmp_path / "d.parquet", rows(5))
    (reader,) = open_files(path)
    samples = list(reader.samples())
    assert [sample.id for sample in samples] == [f"r{i}" for i in range(5)]
    assert load_image(samples[3].images[0], "x").tobytes() == tiny_image(3).tobytes()
    fast = reader.random_access()
    assert [fast.sample(Locator(i)) for i in (4, 0, 2)] == [samples[4], samples[0], samples[2]]
    with pytest.raises(RecordError, match="has no row 5"):
        reader.read(Locator(5))


def test_tables_with_names_aliases_and_without_ids(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_llava_json(tmp_path, 2)
    records = [
        {"images": ["0.png", "1.png"], "messages": said("<image> <image>", "two")},
        {"images": None, "messages": said("?", "text")},
    ]
    (reader,) = open_files(write_parquet(tmp_path / "d.parquet", records), tmp_path / "images")
    one, two = reader.samples()
    assert one.id == "d.parquet#0"
    assert [image.name for image in one.images] == ["0.png", "1.png"]
    assert two.images == ()
    broken = [{"id": "x", "image": {"bytes": None, "path": None}, "conversations": turns("x")}]
    (reader,) = open_files(write_parquet(tmp_path / "e.parquet", broken))
    with pytest.raises(RecordError, match=r"e\.parquet:row 0, image 0: expected encoded bytes"):
        reader.sample(Locator(0))
    (tmp_path / "f.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"f\.parquet: not a readable parquet file"):
        open_files(tmp_path / "f.parquet")


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = save_dataset(tmp_path / "one", rows(3))
    (reader,) = open_files(path)
    assert [s.turns[-1].text for s in reader.samples()] == ["answer 0", "answer 1", "answer 2"]
    assert load_image(reader.sample(Locator(2)).images[0], "x").tobytes() == tiny_image(2).tobytes()
    datasets.DatasetDict({"train": datasets.load_from_disk(path)}).save_to_disk(tmp_path / "many")
    assert len(answers(tmp_path / "many", split="train")) == 3
    with pytest.raises(DataError, match=r"split=None; choose one of train"):
        open_files(tmp_path / "many")
    with pytest.raises(DataError, match="a single data set; leave split out"):
        open_files(path, split="train")
    assert reader.mark() == open_files(path)[0].mark()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for name, said in {
        "gone.json": "no such data file",
        "*.tar": "no file matches",
        "notes.csv": "what kind of data is this",
        "x.tar.gz": "decompress it",
        "folder": "not one of Dataset.save_to_disk",
    }.items():
        if "." in name and not name.startswith(("gone", "*")):
            (tmp_path / name).write_text("x")
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=said):
            open_files(tmp_path / name)
    path, folder = write_llava_json(tmp_path, 1)
    with pytest.raises(DataError, match="split='train' is for folders of save_to_disk"):
        open_files(path, folder, "train")
    assert kind_of(Path("A.JSONL")) == "jsonl"


def test_readers_work_in_other_processes(tmp_path: Path) -> None:
    path, folder = write_llava_json(tmp_path, 4)
    (reader,) = open_files(path, folder)
    places = list(reader.scan())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(reader.sample, places * 5)
    assert found == [reader.sample(place) for place in places] * 5
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.sample(places[1]) == reader.sample(places[1])


def test_a_changed_file_has_another_mark(tmp_path: Path) -> None:
    path, folder = write_llava_json(tmp_path, 2)
    before = open_files(path, folder)[0].mark()
    path.write_text(path.read_text().replace("red", "rad"))
    assert open_files(path, folder)[0].mark() != before


def test_scanning_keeps_no_record_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "big.jsonl"
    answer = "word " * 20_000
    record = json.dumps({"id": "a", "conversations": turns(answer, 0)})
    with path.open("w") as file:
        for _ in range(200):
            file.write(record + "\n")  # 20 MB
    (reader,) = open_files(path)
    tracemalloc.start()
    try:
        assert sum(len(sample.turns) for sample in reader.samples()) == 400
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 18e6
    assert peak < 2e6
