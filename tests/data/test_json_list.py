"""Where the records of a JSON list lie, found with a window that is smaller than the file."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from llava_moe.data.schema import DataError
from llava_moe.data.sources import json_list, open_files

PIECES = ["a", '"', "\\", "\n", "ü", "\u2028", "\U0001f600", "]},{[", "\t", " "]


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_BLOCK", 7)  # cuts strings, escapes, literals and multi-byte characters everywhere


def odd_records(n: int) -> list[object]:
    generator = random.Random(0)
    text = ["".join(generator.choices(PIECES, k=generator.randrange(40))) for _ in range(n)]
    return [{"id": t, "n": [1.5e-7, -12, True, None], "t": {t: text[-i]}} for i, t in enumerate(text)]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 3])
def test_every_record_is_found_whatever_the_window_cuts(
    small_window: None, tmp_path: Path, ascii_only: bool, indent: int | None
) -> None:
    records = odd_records(40)
    path = tmp_path / "odd.json"
    text = " \n" + json.dumps(records, ensure_ascii=ascii_only, indent=indent) + "\n"
    path.write_text(text, encoding="utf-8")
    data, (reader,) = path.read_bytes(), open_files(path, tmp_path)
    found = [data[place.start : place.start + place.size] for place in reader.scan()]
    assert [json.loads(piece) for piece in found] == records


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"id": "long enough to pass a window"},\n {"id": 2,,}]', "line 2, column 11"),
        ('[{"id": 1},\n]', "line 2, column 1: a comma before the end"),
        ('[{"id": "\\ud83d\\uXX"}]', "line 1, column"),
        ('[{"id": "first line"},\n {"id": "never ends }, {"}, {"id": 3}', "line 2, column 38"),
        ('[{"id": tru}]', "line 1, column 9: Expecting value"),
        ('[{"id": 1}] [', "line 1, column 13: extra data behind the list"),
        ('[{"id": 1}', "line 1, column 11: expecting ',' or ']'"),
        ("", "the top level is no list"),
    ],
)
def test_what_is_broken_is_placed_in_the_whole_file(small_window: None, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    (reader,) = open_files(tmp_path / "broken.json", tmp_path)
    with pytest.raises(DataError, match=said) as caught:
        list(reader.scan())
    assert "broken.json" in str(caught.value)


def test_bytes_that_are_not_utf8_are_placed(small_window: None, tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('[{"id": "ü"}, {"id": "'.encode() + b'\xff"}]')
    (reader,) = open_files(tmp_path / "latin.json", tmp_path)
    with pytest.raises(DataError, match="not UTF-8 text at byte 23"):
        list(reader.scan())


def test_the_memory_of_a_scan_does_not_follow_the_size(tmp_path: Path) -> None:
    record = json.dumps({"id": "a", "text": "wörd \U0001f600 " * 400}, ensure_ascii=False)
    peaks = []
    for name, count in (("small", 600), ("large", 3000)):
        path = tmp_path / f"{name}.json"
        path.write_text("[" + ",\n".join([record] * count) + "]", encoding="utf-8")
        (reader,) = open_files(path, tmp_path)
        tracemalloc.start()
        try:
            assert sum(1 for _ in reader.scan()) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert path.stat().st_size > 12e6
    assert peaks[1] < 1.2 * peaks[0]
