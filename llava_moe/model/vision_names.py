"""The parts of a tower's name in a recipe; see `llava_moe.model.vision_load` for what can be named."""

from __future__ import annotations

import re

_KINDS = ("timm", "open_clip", "fused", "s2")
_LAYER = re.compile(r"@(-?\d+)$")


class MissingTowerError(ValueError):
    """The config or image processor of a tower is not on this machine and could not be fetched."""


def split_source(source: str) -> tuple[str, str]:
    """The kind of a tower and the rest of its name; the kind is empty for one of transformers."""
    kind, found, rest = source.partition(":")
    return (kind, rest) if found and kind in _KINDS else ("", source)


def with_layer(source: str) -> tuple[str, int | None]:
    """`NAME@LAYER` as name and layer; None where no layer is named."""
    match = _LAYER.search(source)
    return (source, None) if match is None else (source[: match.start()], int(match[1]))


def with_scales(rest: str) -> tuple[list[int], str]:
    """`1,2:NAME` as scales and name.

    Raises:
        ValueError: it has another form.
    """
    numbers, _, source = rest.partition(":")
    if not source or not re.fullmatch(r"\d+(,\d+)*", numbers):
        raise ValueError(f"model.vision_tower=s2:{rest}: write the scales and a tower, as in s2:1,2:DIR")
    return [int(number) for number in numbers.split(",")], source
