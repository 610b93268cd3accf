"""LLaVA's own form, one JSON list of objects, without ever having the file in memory whole.

A list of 665,298 conversations is 1 GB as bytes and four times that as a Python string (one emoji makes every character
four bytes wide), before a single record is parsed. So a window of text moves over the file, and tells where each record
lies in bytes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from llava_moe.data.schema import DataError
from llava_moe.data.sources.base import SOURCES, Locator
from llava_moe.data.sources.ranges import JsonLines

_BLOCK = 1 << 20
_SPACE = " \t\r\n"
_TAIL = 16  # the longest piece of JSON, other than a string, that the end of the window can cut: -Infinity, \\uXXXX


@SOURCES.register("json")
class JsonList(JsonLines):
    """LLaVA's own form: one JSON list of objects."""

    kind = "json"

    def scan(self) -> Iterator[Locator]:
        with _Window(self.path) as window:
            if window.skip_space() != "[":
                raise DataError(
                    f"{self.path}: the top level is no list of records; for one record per line name the file *.jsonl"
                )
            window.advance(1)
            while window.skip_space() != "]":
                end = window.end_of_value()
                yield Locator(window.byte, window.advance(end - window.place))
                if window.skip_space() == ",":
                    window.advance(1)
                    if window.skip_space() == "]":
                        raise window.broken(window.place, "a comma before the end of the list")
                elif window.skip_space() != "]":
                    raise window.broken(window.place, "expecting ',' or ']'")
            window.advance(1)
            if window.skip_space():
                raise window.broken(window.place, "extra data behind the list")


class _Window:
    """A stretch of a UTF-8 file as text, which grows at its end and is cut at its beginning.

    Attributes:
        text: the stretch.
        place: the character that comes next.
        byte: its place in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text, self.place, self.byte = "", 0, 0
        self._file = path.open("rb")
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._at_end = False
        self._read = 0
        self._lines, self._in_line = 0, 0  # newlines before the text; characters of its first line before it

    def __enter__(self) -> _Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def advance(self, count: int) -> int:
        """Goes on by some characters; returns how many bytes these are."""
        passed = self.text[self.place : self.place + count]
        size = len(passed) if passed.isascii() else len(passed.encode())
        self.place += count
        self.byte += size
        return size

    def skip_space(self) -> str:
        """Goes on to the next character that is no white space; an empty string at the end of the file."""
        while True:
            place = self.place
            while place < len(self.text) and self.text[place] in _SPACE:
                place += 1
            self.advance(place - self.place)
            if place < len(self.text):
                return self.text[place]
            if not self._more():
                return ""

    def end_of_value(self) -> int:
        """Where the JSON value that begins here ends in `text`.

        Raises:
            DataError: it is broken; names line and column.
        """
        while True:
            try:
                _, end = self._decode(self.text, self.place)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _TAIL
                if cut_off and self._more():
                    continue
                raise self.broken(error.pos, error.msg) from error
            if end < len(self.text) or not self._more():  # a number may go on behind the end of the window
                return end

    def broken(self, place: int, message: str) -> DataError:
        line = 1 + self._lines + self.text.count("\n", 0, place)
        last = self.text.rfind("\n", 0, place)
        column = place - last if last >= 0 else place + 1 + self._in_line
        return DataError(f"{self.path}: not valid JSON at line {line}, column {column}: {message}")

    def _more(self) -> bool:
        """Drops what was passed and reads on, at least as much again as there is; False at the end of the file."""
        if self._at_end:
            return False
        passed = self.text[: self.place]
        self._lines += passed.count("\n")
        last = passed.rfind("\n")
        self._in_line = len(passed) - last - 1 if last >= 0 else self._in_line + len(passed)
        self.text, self.place = self.text[self.place :], 0
        data = self._file.read(max(_BLOCK, len(self.text)))
        self._at_end = not data
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            byte = self._read - pending + error.start
            raise DataError(f"{self.path}: not UTF-8 text at byte {byte}; convert the file to UTF-8") from error
        self._read += len(data)
        return True
