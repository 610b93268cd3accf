"""Resuming a scoring run by request: every answer is written to a journal as it comes, and looked up by content.

The key of an answer is a hash over all that decides it: the weights, the task's definition and data, the document, the
prompt as sent, the generation settings, the dtype and what pictures are shown. So answers of other weights, another
prompt or other data are never taken, wherever the journal came from. Batch size, device and the number of ranks are
left out, as greedy answers do not depend on them: a run that was killed on four GPUs goes on with one. (Sampled ones
come from one stream of random numbers; those of a resumed run are fair draws, but not those of an undisturbed run.)

Each rank writes a file of its own and reads all of them, so several ranks never write to one file, and a run may go on
with another number of ranks. A line that was cut by the kill is dropped and answered again.

`attach` puts it between lmms-eval and the adapter: known answers are taken before batches are planned, and each
finished batch is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError

FOLDER = "answers"
METHODS = ("generate_until", "loglikelihood")


class Journal:
    """The answers of a run so far.

    Args:
        run: folder of the run; the journal lies in its subfolder `answers`.
        rank: of this process.
        settings: what decides an answer besides the request: hash of the weights, dtype, blank pictures.
        task_hashes: hash of definition and data by task.

    Raises:
        EvaluationError: a journal holds something else than answers.

    Attributes:
        reused, answered: answers that were found, and that were written.
    """

    def __init__(self, run: Path, rank: int, settings: Mapping[str, Any], task_hashes: Mapping[str, str]) -> None:
        self.reused = self.answered = 0
        self._settings, self._task_hashes = dict(settings), task_hashes
        folder = run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{rank}.jsonl"
        _drop_cut_line(path)
        self._known: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("rank*.jsonl")):
            self._known |= _read(file)
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Ends the writing."""
        self._file.close()

    def keys(self, method: str, requests: Sequence[Any], documents: Mapping[str, Any]) -> list[str]:
        """One key for each request; the n-th of equal requests (repeated sampling) has a key of its own."""
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            key = self._key(method, request.args, documents)
            seen[key] += 1
            keys.append(f"{key}-{seen[key]}")
        return keys

    def find(self, key: str) -> Any | None:
        """The recorded answer as lmms-eval's result, or None."""
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        row = self._known.get(key)
        if row is None:
            return None
        self.reused += 1
        answer, tokens = row["answer"], row["tokens"]
        text = answer if isinstance(answer, str) else (float(answer[0]), bool(answer[1]))
        return GenerationResult(text, None if tokens is None else TokenCounts(**tokens))

    def add(self, keys: Sequence[str], requests: Sequence[Any], results: Sequence[Any]) -> None:
        """Writes answers, and leaves nothing of them in a buffer: what is answered survives a kill."""
        for key, request, result in zip(keys, requests, results, strict=True):
            tokens = None if result.token_counts is None else result.token_counts.to_dict()
            answer = result.text if isinstance(result.text, str) else list(result.text)
            doc_id, task = request.args[3:5]
            row = {"key": key, "task": task, "doc_id": doc_id, "answer": answer, "tokens": tokens}
            self._file.write(json.dumps(row) + "\n")
            self._known[key] = row
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answered += len(results)

    def _key(self, method: str, args: tuple[Any, ...], documents: Mapping[str, Any]) -> str:
        context, second, _, doc_id, task, split = args
        if callable(second):  # a continuation that is made from the document
            second = second(documents[task][split][doc_id])
        content = [self._settings, self._task_hashes[task], method, context, second, doc_id, split]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def attach(adapter: Any, journal: Journal) -> None:
    """Makes an adapter answer only what the journal does not hold, and write down each batch as it is answered.

    Args:
        adapter: a `LlavaMoe`; its `generate_until` and `loglikelihood` are replaced on this object, and its
            `on_answers` is set.
        journal: open for this rank.
    """
    for method in METHODS:
        setattr(adapter, method, _resumed(adapter, method, journal))


def _resumed(adapter: Any, method: str, journal: Journal) -> Callable[[list[Any]], list[Any]]:
    answer = getattr(adapter, method)

    def resumed(requests: list[Any]) -> list[Any]:
        keys = journal.keys(method, requests, adapter.task_dict)
        results = [
            journal.find(key) if adapter.is_recorded(request) else None
            for key, request in zip(keys, requests, strict=True)
        ]
        waiting = [index for index, result in enumerate(results) if result is None]
        # the same object comes several times where a task repeats its requests
        open_keys: dict[int, list[str]] = {}
        for index in waiting:
            open_keys.setdefault(id(requests[index]), []).append(keys[index])

        def write(asked: Sequence[Any], answers: Sequence[Any]) -> None:
            journal.add([open_keys[id(request)].pop(0) for request in asked], asked, answers)

        adapter.on_answers = write
        if waiting:
            asked = [requests[index] for index in waiting]
            for index, result in zip(waiting, answer(asked), strict=True):
                results[index] = result
        return results

    return resumed


def _drop_cut_line(path: Path) -> None:
    """Shortens a file to its last whole line."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    *lines, _cut = path.read_text(encoding="utf-8", errors="replace").split("\n")  # of a rank killed while it wrote
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["key"]] = {"answer": row["answer"], "tokens": row["tokens"]}
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path}, line {number}, is no recorded answer ({error}); delete the file") from error
    return rows
