import json
from pathlib import Path
from typing import Any

import pytest

from llava_moe.data.schema import DataError, Turn, load_records, parse_record

ROOT = Path("/data/images")


def record(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "id": "r1",
        "image": "a/1.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}],
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def system(text: str) -> dict[str, str]:
    return {"from": "system", "value": text}


def test_a_record_becomes_a_sample():
    sample = parse_record(record(id=7, model="ignored"), ROOT, "train.json")
    assert sample.id == "7"
    assert sample.images == (ROOT / "a/1.png",)
    assert sample.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "red"))
    assert sample.source == "train.json"


def test_role_and_content_are_read_like_from_and_value():
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "red"}]
    assert parse_record(record(conversations=turns), ROOT, "s").turns == parse_record(record(), ROOT, "s").turns


def test_a_system_message_may_come_first():
    turns = [system("be brief"), *chat("What? <image>", "red", "And?", "blue")]
    parsed = parse_record(record(conversations=turns), ROOT, "s").turns
    assert parsed[0] == Turn("system", "be brief")
    assert parsed[1] == Turn("user", "<image>\nWhat?")
    assert [turn.role for turn in parsed[1:]] == ["user", "assistant"] * 2


@pytest.mark.parametrize("image", [..., None, []])
def test_without_image_a_record_is_text_only(image: Any):
    sample = parse_record(record(image=image, conversations=chat("Hi", "Hello")), ROOT, "s")
    assert sample.images == ()


@pytest.mark.parametrize(
    ("written", "placed"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("What <image> is it?", "<image>\nWhat  is it?"),
        ("<image>What?", "<image>What?"),
    ],
)
def test_a_single_marker_moves_to_the_front(written: str, placed: str):
    sample = parse_record(record(conversations=chat(written, "red")), ROOT, "s")
    assert sample.turns[0].text == placed


def test_several_markers_keep_their_places():
    text = "First <image> then <image>?"
    sample = parse_record(record(image=["1.png", "2.png"], conversations=chat(text, "a", "And?", "b")), ROOT, "s")
    assert sample.turns[0].text == text
    assert [path.name for path in sample.images] == ["1.png", "2.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ...}, "give every record a string 'id'"),
        ({"conversations": chat("What?", "red")}, r"1 image\(s\) but 0 .*write <image> once for each image"),
        ({"image": ...}, r"0 image\(s\) but 1 .*remove the surplus"),
        ({"image": ["1.png", "2.png"]}, r"2 image\(s\) but 1"),
        ({"image": 3}, "file name or a list of file names"),
        ({"image": ["1.png", ""]}, "file name or a list of file names"),
        ({"image": "../secret.png"}, "leaves the image folder"),
        ({"image": "a/../../secret.png"}, "leaves the image folder"),
        ({"image": "/etc/passwd"}, "leaves the image folder"),
        ({"image": "."}, "leaves the image folder"),
        ({"video": "a.mp4"}, "has both .image. and .video."),
        ({"image": ..., "video": "../a.mp4"}, "video .* leaves the image folder"),
        ({"image": ..., "video": []}, "empty list"),
        ({"image": ..., "video": 3}, "must be a file name or a list"),
        ({"conversations": ...}, "at least one turn"),
        ({"conversations": []}, "at least one turn"),
        ({"conversations": ["hi"]}, "turn 0 is str"),
        ({"conversations": chat("<image>\nWhat?")}, "last turn is from the user"),
        ({"conversations": [{"from": "gpt", "value": "x"}, *chat("<image>\nWhat?", "red")]}, "turn 0 is from 'gpt'"),
        ({"conversations": [{"from": "human", "value": "a"}, *chat("<image>\nb", "red")]}, "turn 1 is from 'human'"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "known: human, user, gpt, assistant, system"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "last turn is from the system"),
        ({"conversations": [system("x"), *chat("<image>\nWhat?")]}, "last turn is from the user"),
        ({"conversations": [system("x"), *chat("What?", "red")[1:]]}, "turn 1 is from 'gpt' where the user"),
        ({"conversations": [*chat("<image>\nb", "red"), system("x")]}, "turn 2 is from 'system' where the user"),
        ({"conversations": [system("x"), system("y"), *chat("b", "red")]}, "turn 1 is from 'system' where the user"),
        ({"conversations": [system("<image>"), *chat("What?", "red")]}, "a system message that contains <image>"),
        ({"conversations": [{"from": "human", "value": None}]}, "has no text"),
        ({"conversations": chat("What?", "<image>")}, "an answer that contains <image>"),
    ],
)
def test_broken_records_are_refused_with_their_id(changes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message) as caught:
        parse_record(record(**changes), ROOT, "train.json")
    assert "train.json" in str(caught.value)
    assert "id" in changes or "'r1'" in str(caught.value)


def test_json_and_jsonl_give_the_same_records(tmp_path: Path):
    # U+2028 is a line end for str.splitlines, but legal inside a JSON string
    records = [record(), record(id="line\u2028end")]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    assert load_records(tmp_path / "a.json") == load_records(tmp_path / "a.jsonl") == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"id": 1},\n {"id": }]', "line 2, column 9"),
        ("a.jsonl", b'{"id": 1}\n\n{"id": }', "line 3, column 8"),
        ("a.json", b'{"id": 1}', r"name the file \*.jsonl"),
        ("a.json", b"[3]", "record 0 is int"),
        ("a.json", b'["\xff"]', "not UTF-8 text at byte 2"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_records(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="no such data file"):
        load_records(tmp_path / "none.json")
