"""Single OCR-VQA pictures from the addresses that its authors list.

Their `dataset.json` (https://ocr-vqa.github.io/) maps a key K to `{"imageURL": ...}`; the records of mix665k call
the picture `ocr_vqa/images/K.jpg`. Many addresses are dead: they answer 404, a web page, or a picture of one pixel.
Only what can be opened and is larger than that is kept.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from data_prep.errors import InterruptError, PrepareError, explain_os_error
from data_prep.images import look_at_bytes

_LIMIT = 20 << 20


def read_addresses(path: Path) -> dict[str, str]:
    """Addresses by key.

    Raises:
        PrepareError: not OCR-VQA's dataset.json.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): str(entry["imageURL"]) for key, entry in raw.items()}
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(f"{path}: not OCR-VQA's dataset.json (key -> {{imageURL}}): {error!r}") from error


def fetch_pictures(
    paths: Sequence[Path],
    addresses: Mapping[str, str],
    *,
    connections: int,
    advance: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> dict[Path, str]:
    """Fetches pictures whose key is the stem of their path.

    Returns:
        For each path "" when it is there now, or why not.

    Raises:
        PrepareError: the disk is full or read-only.
        InterruptError: `stop` was set.
    """

    def one(path: Path) -> str:
        if stop is not None and stop.is_set():
            raise InterruptError
        try:
            return _fetch(path, addresses.get(path.stem))
        finally:
            advance(1)

    with ThreadPoolExecutor(connections) as pool:
        return dict(zip(paths, pool.map(one, paths), strict=True))


def _fetch(path: Path, url: str | None) -> str:
    if url is None:
        return "no address in dataset.json"
    try:
        with requests.get(url, timeout=(15, 60), stream=True) as response:
            if response.status_code != 200:
                return f"{url} answers {response.status_code}"
            content = b""
            for piece in response.iter_content(1 << 16):
                content += piece
                if len(content) > _LIMIT:
                    return f"{url} serves more than {_LIMIT} bytes"
    except (requests.RequestException, OSError) as error:
        return f"{url}: {' '.join(str(error).split())[:200]}"
    problem = look_at_bytes(content)[1]
    if problem:
        return f"{url} serves {problem}"
    fresh = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(content)
        os.replace(fresh, path)  # a dead link of --from is replaced, not followed
    except OSError as error:
        raise explain_os_error(error, path, "writing") from error
    return ""
