"""The HTTP side of the Hub as its client speaks to it for one data set, from folders on disk."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.data_prep.fake_hub import FakeHub


def _files(place: Path) -> Iterator[tuple[str, bytes, str]]:
    for path in sorted(place.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            yield path.relative_to(place).as_posix(), content, hashlib.sha256(content).hexdigest()


def _info(hub: FakeHub, repo: str) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for name, content, digest in _files(hub.root / repo):
        one: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": digest[:40]}
        if name.endswith(".parquet"):
            one["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
        siblings.append(one)
    return {"id": repo, "sha": hub.commit(repo), "private": False, "gated": False, "tags": [], "siblings": siblings}


def _tree(hub: FakeHub, repo: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, content, digest in _files(hub.root / repo):
        one: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}
        if name.endswith(".parquet"):
            one["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        entries.append(one)
    return entries


@contextmanager
def serving_hub(hub: FakeHub) -> Iterator[str]:
    """The address that HF_ENDPOINT must be set to; `hub.fetched` gets the files that are downloaded."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api, rest = (True, parts[2:]) if parts[0] == "api" else (False, parts[1:])
            repo, what = "/".join(rest[:2]), rest[2:]
            if not (hub.root / repo).is_dir():
                self._send(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, with_body, 404)
            elif is_api and what[:1] == ["tree"]:
                self._send(json.dumps(_tree(hub, repo)).encode(), {}, with_body)
            elif is_api:
                self._send(json.dumps(_info(hub, repo)).encode(), {}, with_body)
            else:
                assert what[:2] == ["resolve", hub.commit(repo)]
                content = (hub.root / repo / "/".join(what[2:])).read_bytes()
                if with_body:
                    hub.fetched.append("/".join([repo, *what[2:]]))
                tag = hashlib.sha256(content).hexdigest()
                self._send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": hub.commit(repo)}, with_body)

        def _send(self, body: bytes, headers: dict[str, str], with_body: bool, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
