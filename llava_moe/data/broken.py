"""Samples that break when they are read, long after every record and picture was checked.

A worker process hands such a sample over in the place of its item; the collator leaves it out of the batch (nothing
takes its place) and writes down what happened; the process that trains refuses to go on, or counts it. An error raised
in a worker would come as a page of tracebacks, and no count would leave the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KEY = "broken"
"""Of an item that is broken, and of a batch with such items: one message for each."""


def broken_item(error: Exception) -> dict[str, Any]:
    """What stands for a sample that cannot be read; the message names data file, record and picture."""
    return {KEY: str(error)}


def split(items: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The items that are whole, and the messages of the others."""
    whole = [item for item in items if KEY not in item]
    return whole, [item[KEY] for item in items if KEY in item]
