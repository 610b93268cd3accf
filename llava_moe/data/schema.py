"""The one record format: LLaVA's JSON (or jsonl) conversations, checked strictly.

A record is `{"id", "image": str | list[str] (absent: text only), "conversations": [{"from": "human"|"gpt", "value"}]}`.
In the place of images it may have one `"video"`: a file, or the list of the files of its frames; its marker is
`<video>` or `<image>`. Turns written as `{"role": "user"|"assistant", "content"}` are read too, and the first may be a
system message (`"from": "system"`), if the template has a place for one. Other keys are ignored. Records in the wild
break these rules silently (images without a marker, two user turns in a row) and are usually trained on all the same;
here each one is refused with its id.
"""

from __future__ import annotations

import json
import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class DataError(ValueError):
    """A record, image or data file that cannot be trained on; the message names it and says how to mend it."""


@dataclass(frozen=True)
class Turn:
    """One message. `text` may contain image markers in user turns only."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One checked record: image files in the order of their markers, and turns that end with an answer.

    The turns alternate, the user first; a system message may stand in front of them.

    Attributes:
        video: a file, or the files of the frames in order; there are no images then, and one image marker stands for
            the whole video.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    source: str
    video: Path | tuple[Path, ...] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the record names."""
        frames = self.video if isinstance(self.video, tuple) else () if self.video is None else (self.video,)
        return (*self.images, *frames)

    @property
    def num_visuals(self) -> int:
        """Image markers in the turns."""
        return len(self.images) + (self.video is not None)


def load_records(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON list, or one JSON object per line if the file is called *.jsonl.

    Raises:
        DataError: the file is missing, is not valid JSON (with line and column), or holds anything but objects.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file; check the path in the recipe") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}; convert the file to UTF-8") from error
    records: list[Any] = []
    if path.suffix == ".jsonl":
        # split at "\n" only: a raw U+2028 inside a string is legal JSON, and str.splitlines would cut there
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                records.append(_parse_json(line, path, first_line=number))
    else:
        parsed = _parse_json(text, path, first_line=1)
        if not isinstance(parsed, list):
            raise DataError(
                f"{path}: the top level is {type(parsed).__name__}, expected a list of records; "
                "for one record per line name the file *.jsonl"
            )
        records = parsed
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}: record {index} is {type(record).__name__}, expected an object")
    return records


def _parse_json(text: str, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}: not valid JSON at line {line}, column {error.colno}: {error.msg}") from error


def parse_record(record: dict[str, Any], image_folder: Path, source: str) -> Sample:
    """Checks one training record and resolves its image paths (without opening them).

    Args:
        record: one object of `load_records`.
        image_folder: image paths are relative to it and may not leave it.
        source: name of the data file, for messages.

    Raises:
        DataError: any rule of the module is broken.
    """
    sample_id = record.get("id")
    if not isinstance(sample_id, (str, int)) or isinstance(sample_id, bool):
        raise DataError(
            f"{source}: a record has id {sample_id!r}; give every record a string 'id' (keys: {sorted(record)})"
        )
    where = f"{source}: record {str(sample_id)!r}"
    images = _paths(record.get("image"), "image", Path(image_folder), where)
    frames = _paths(record.get("video"), "video", Path(image_folder), where)
    if images and frames:
        raise DataError(f"{where}: has both 'image' and 'video'; make two records of it")
    if record.get("video") == []:
        raise DataError(f"{where}: 'video' is an empty list; list the files of its frames, or leave it out")
    video = frames[0] if isinstance(record.get("video"), str) else frames or None
    turns = parse_turns(record.get("conversations"), where)
    if video is not None:
        turns = tuple(_with_image_marker(turn) for turn in turns)
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: the last turn is from the {turns[-1].role}; end the conversation with an answer (from: gpt)"
        )
    placed = place_markers(turns, len(images) + (video is not None), where)
    return Sample(id=str(sample_id), images=images, turns=placed, source=source, video=video)


def parse_turns(conversations: Any, where: str) -> tuple[Turn, ...]:
    """Reads LLaVA or role/content turns: user first, then strictly alternating; a system message may come first.

    Raises:
        DataError: an empty or malformed conversation, an unknown role, or two turns of one role in a row.
    """
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: 'conversations' must be a list with at least one turn")
    turns: list[Turn] = []
    for index, message in enumerate(conversations):
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: turn {index} is {type(message).__name__}, expected an object with from and value"
            )
        role_name = message.get("from", message.get("role"))
        text = message.get("value", message.get("content"))
        if role_name not in _ROLES:
            raise DataError(f"{where}: turn {index} is from {role_name!r}; known: {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise DataError(f"{where}: turn {index} has no text; 'value' must be a string, found {type(text).__name__}")
        turn = Turn(role=_ROLES[role_name], text=text)
        expected: Role = "assistant" if turns and turns[-1].role == "user" else "user"
        if turn.role != expected and not (turn.role == "system" and index == 0):
            raise DataError(
                f"{where}: turn {index} is from {role_name!r} where the {expected} should speak; a conversation starts "
                "with the user (or one system message) and roles alternate - remove or merge turns"
            )
        if turn.role != "user" and IMAGE_MARKER in text:
            kind = "an answer" if turn.role == "assistant" else "a system message"
            raise DataError(
                f"{where}: turn {index} is {kind} that contains {IMAGE_MARKER}; markers belong to user turns"
            )
        turns.append(turn)
    return tuple(turns)


def place_markers(turns: tuple[Turn, ...], num_images: int, where: str) -> tuple[Turn, ...]:
    """Checks that there is one marker for each image, and moves a single marker to the front of its turn.

    With one image LLaVA puts the marker first, followed by a newline, wherever the annotator wrote it; with several
    images every marker keeps its place (LLaVA-NeXT).

    Raises:
        DataError: the number of markers differs from the number of images.
    """
    num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if num_markers != num_images:
        mend = (
            f"write {IMAGE_MARKER} once for each image into a user turn"
            if num_markers < num_images
            else f"remove the surplus {IMAGE_MARKER} or list the missing files under 'image'"
        )
        raise DataError(f"{where}: {num_images} image(s) but {num_markers} {IMAGE_MARKER} marker(s); {mend}")
    if num_images != 1:
        return turns
    return tuple(
        Turn(turn.role, f"{IMAGE_MARKER}\n{turn.text.replace(IMAGE_MARKER, '').strip()}")
        if IMAGE_MARKER in turn.text and not turn.text.startswith(IMAGE_MARKER)
        else turn
        for turn in turns
    )


def _paths(value: Any, key: str, image_folder: Path, where: str) -> tuple[Path, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: {key!r} must be a file name or a list of file names, found {value!r}")
    # Lexical on purpose: data folders are often assembled from symbolic links that resolve elsewhere.
    root = os.path.abspath(image_folder)
    paths = []
    for name in names:
        path = os.path.normpath(os.path.join(root, name))
        if not path.startswith(root.rstrip(os.sep) + os.sep):
            raise DataError(f"{where}: {key} {name!r} leaves the image folder {image_folder}; use a path inside it")
        paths.append(Path(path))
    return tuple(paths)


def _with_image_marker(turn: Turn) -> Turn:
    return Turn(turn.role, turn.text.replace(VIDEO_MARKER, IMAGE_MARKER)) if turn.role == "user" else turn
