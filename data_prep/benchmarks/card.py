"""A data set's README.md: which files hold the splits that are read, and the same card without all others.

`datasets` loads every split of a configuration, and looks for the files of the first one whichever is asked for. So a
snapshot that holds the wanted splits alone needs a card that names them alone: without it, VQAv2's validation split
would cost its 555,000 test questions, too. The publisher's card is kept beside as README.upstream.md.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import yaml

from data_prep.errors import PrepareError

CARD, UPSTREAM_CARD = "README.md", "README.upstream.md"
DEFAULT_CONFIG = "default"
# other places of the same facts, which would bring the left-out splits back
_OTHER_FACTS = ("dataset_infos.json", ".huggingface.yaml")
_NO_DATA = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.txt", CARD, UPSTREAM_CARD, *_OTHER_FACTS)

# where a card names no files, `datasets` looks for these first
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")

Wants = Mapping[str | None, frozenset[str]]


@dataclass(frozen=True)
class Selection:
    """What to take of a data set.

    Attributes:
        files: the data files, without the card.
        card: the text of the card to write; None where the publisher's own is right, as it names nothing else.
    """

    files: tuple[str, ...]
    card: str | None


def select(repo: str, text: str, listing: Iterable[str], wants: Wants) -> Selection:
    """The files of the wanted splits.

    Args:
        repo: for messages.
        text: README.md; "" where there is none.
        listing: all files of the data set.
        wants: splits by configuration; None is the configuration that is loaded when none is named.

    Raises:
        PrepareError: the card has no such configuration or split, or names files that are not there.
    """
    data = [name for name in listing if not name.startswith(".") and name not in _NO_DATA]
    head, body = _split(repo, text)
    configs = {str(entry["config_name"]): entry for entry in head.get("configs") or _from_names(data)}
    if not configs:  # in a layout of its own
        return Selection(tuple(data), None)
    files: dict[str, None] = {}
    kept = []
    for name, splits in _by_name(repo, configs, wants).items():
        entry, found = _without_others(repo, name, configs[name], splits, data)
        kept.append(entry)
        files |= dict.fromkeys(found)
    if _names_nothing_else(head, configs, kept):
        return Selection(tuple(files), None)
    trimmed = {**head, "configs": kept}
    if "dataset_info" in head:
        trimmed["dataset_info"] = _kept_infos(head, kept)
    front = yaml.safe_dump(trimmed, sort_keys=False, allow_unicode=True)
    return Selection(tuple(files), f"---\n{front}---\n{body}")


def _names_nothing_else(head: Mapping[str, Any], configs: Mapping[str, Any], kept: Sequence[dict[str, Any]]) -> bool:
    """Whether the card is about the wanted splits alone."""
    if len(kept) != len(configs) or any(entry != configs[str(entry["config_name"])] for entry in kept):
        return False
    before = [len(info.get("splits") or []) for info in _infos(head)]
    return before == [len(info["splits"]) for info in _kept_infos(head, kept)]


def licence_of(repo: str, text: str) -> str | None:
    """The licence that a card states.

    Raises:
        PrepareError: its head is no YAML.
    """
    stated = _split(repo, text)[0].get("license")
    return None if stated in (None, "unknown", "other") else ", ".join(_as_list(stated))


def _from_names(data: Sequence[str]) -> list[dict[str, Any]]:
    """The one configuration of a card without any, if the files have the names that `datasets` gives them."""
    splits = dict.fromkeys(match[1] for match in map(_SHARD.fullmatch, data) if match)
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    return [{"config_name": DEFAULT_CONFIG, "data_files": files}] if files else []


def _split(repo: str, text: str) -> tuple[dict[str, Any], str]:
    """The YAML at the head of a card, and the rest."""
    lines = text.splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return {}, text
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---"), None)
    if end is None:
        return {}, text
    try:
        head = yaml.safe_load("".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise PrepareError(f"{repo}: the head of its {CARD} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(head, dict):
        return {}, text
    return head, "".join(lines[end + 1 :])


def _by_name(repo: str, configs: Mapping[str, Any], wants: Wants) -> dict[str, frozenset[str]]:
    """The wants with None replaced by the name that it stands for."""
    named: dict[str, frozenset[str]] = {}
    for config, splits in wants.items():
        name = _default_name(repo, configs) if config is None else config
        if name not in configs:
            raise PrepareError(f"{repo} has no configuration {name!r}; its {CARD} names {', '.join(sorted(configs))}")
        named[name] = named.get(name, frozenset()) | splits
    return named


def _default_name(repo: str, configs: Mapping[str, Any]) -> str:
    if len(configs) == 1:
        return next(iter(configs))
    marked = [name for name, entry in configs.items() if name == DEFAULT_CONFIG or entry.get("default")]
    if len(marked) != 1:
        raise PrepareError(f"{repo} has no default configuration among {', '.join(sorted(configs))}")
    return marked[0]


def _without_others(
    repo: str, config: str, entry: Mapping[str, Any], splits: frozenset[str], data: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the wanted splits alone, and their files."""
    given, below = entry.get("data_files"), str(entry.get("data_dir") or "")
    if _is_by_split(given):
        parts = [item for item in given if item["split"] in splits]
        missing = sorted(splits - {item["split"] for item in parts})
        if missing:
            known = ", ".join(item["split"] for item in given)
            raise PrepareError(f"{repo}, configuration {config!r} has no split {missing[0]!r}; it has {known}")
        patterns = [path for item in parts for path in _as_list(item["path"])]
        entry = {**entry, "data_files": parts}
    else:  # splits by file name: all files of the configuration
        patterns = _as_list(given) if given is not None else ["*"]
    files: dict[str, None] = {}
    for pattern in patterns:
        whole = "/".join(part for part in (below.strip("/"), str(pattern)) if part)
        matching = [name for name in data if _matches(name, whole)]
        if not matching:
            raise PrepareError(f"{repo}, configuration {config!r}: no file matches {whole!r}, which its {CARD} names")
        files |= dict.fromkeys(matching)
    return dict(entry), list(files)


def _is_by_split(given: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(given, list) and all(isinstance(item, dict) for item in given)


def _as_list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    if pattern.endswith("/"):
        pattern += "*"
    # `**/` may stand for no folder at all
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern.replace("**/", ""))


def _infos(head: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = head.get("dataset_info") or []
    return [info for info in (given if isinstance(given, list) else [given]) if isinstance(info, dict)]


def _kept_infos(head: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the card states of the kept configurations and splits."""
    files = {str(entry["config_name"]): entry.get("data_files") for entry in kept}
    infos = []
    for info in _infos(head):
        name = str(info.get("config_name", DEFAULT_CONFIG))
        if name not in files:
            continue
        parts = info.get("splits") or []
        given = files[name]
        if _is_by_split(given):
            listed = {item["split"] for item in given}
            parts = [split for split in parts if split["name"] in listed]
        info = {key: value for key, value in info.items() if key not in ("download_size", "dataset_size")}
        info |= {"config_name": name, "splits": parts}
        if all("num_bytes" in split for split in parts):
            info["dataset_size"] = sum(split["num_bytes"] for split in parts)
        infos.append(info)
    return infos
