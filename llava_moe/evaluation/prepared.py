"""The tasks of a run as lmms-eval builds them, before a model is loaded; and what each is, as a hash.

lmms-eval's own `task_hashes` and `doc_hash` are constants. Ours is over the task's configuration, the source files of
its functions and the content of its records, pictures included, wherever they were read from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError, records
from llava_moe.evaluation.machinery import task_manager
from llava_moe.evaluation.tasks import SPLIT, TASKS_FOLDER

UNHASHED = ("dataset_kwargs",)  # paths of this machine, tokens; the content is hashed instead
ROWS_AT_ONCE = 64
OCRBENCH_SUMS = "OCRBench_score"
NUM_IMAGE = "NUM_IMAGE"


@dataclasses.dataclass
class Prepared:
    """One task.

    Attributes:
        name: of the task; a group of lmms-eval is taken apart into its tasks.
        task: lmms-eval's object.
        data_sha256: of the records.
        sha256: of definition and records.
    """

    name: str
    task: Any
    data_sha256: str
    sha256: str


def own_tasks() -> list[str]:
    """The tasks that come with this package: the local ones and those in `tasks/benchmarks/`."""
    return sorted(path.stem for path in TASKS_FOLDER.rglob("*.yaml"))


@functools.cache
def index(include_defaults: bool) -> Any:
    """lmms-eval's index of tasks, read once in a process."""
    return task_manager(include_defaults)


def index_for(tasks: Sequence[str]) -> Any:
    """The smallest index that knows all of the tasks: lmms-eval's own takes ten seconds."""
    return index(include_defaults=not set(tasks) <= set(own_tasks()))


def local_hash(name: str, source: Path) -> tuple[str, str]:
    """(hash of the records, of definition and records) of a local task, without building it."""
    data = records.sha256_of([source])
    definition = (TASKS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return data, _sha256([definition, data])


def build(name: str, among: Sequence[str], source: Path | None, cache: Path) -> dict[str, Prepared]:
    """Builds a task: reads its definition, loads and hashes its records.

    Args:
        name: a task, group or tag of lmms-eval, or a task of ours; a group is taken apart into its tasks.
        among: all tasks of the run, which decide how much of lmms-eval's index is read.
        source: the data file of a local task.
        cache: folder for what `datasets` makes of it; must stay as long as the task is used.

    Raises:
        EvaluationError: the records cannot be loaded.
    """
    found: dict[str, Prepared] = {}
    for leaf, task in _leaves(_load(name, index_for(among), source, cache)):
        if source is not None:
            data, whole = local_hash(leaf, source)
        else:
            data = records_hash(task.eval_docs)
            whole = _sha256([definition_of(task), data])
        found[leaf] = Prepared(leaf, task, data, whole)
    return found


def refuse_num_image() -> None:
    """Raises EvaluationError where NUM_IMAGE is set: MMBench, MMMU and HallusionBench would show each picture twice."""
    if os.environ.get(NUM_IMAGE, "1") != "1":
        raise EvaluationError(
            f"{NUM_IMAGE}={os.environ[NUM_IMAGE]} is set: tasks of lmms-eval would show every picture so many times; "
            f"unset {NUM_IMAGE}"
        )


def cause_of(error: BaseException) -> BaseException:
    """What went wrong behind tenacity's RetryError, in which lmms-eval wraps loading and scoring."""
    last = getattr(error, "last_attempt", None)
    inner = None if last is None else last.exception()
    return error if inner is None else inner


def first_line(error: BaseException) -> str:
    """One line about an error: a message of ours as it is, another with its kind."""
    lines = str(error).strip().split("\n")
    return lines[0] if isinstance(error, EvaluationError) else f"{type(error).__name__}: {lines[0]}"


def _load(name: str, manager: Any, source: Path | None, cache: Path) -> Mapping[Any, Any]:
    config = None
    if source is not None:
        # a cache of its own for each run: the shared one would keep a copy of every version of the data for ever
        kwargs = {"data_files": {SPLIT: str(source.resolve())}, "cache_dir": str(cache)}
        config = {"task": name, "dataset_kwargs": kwargs}
    try:
        found: Mapping[Any, Any] = manager.load_task_or_group([name]) if config is None else manager.load_config(config)
    except Exception as error:
        raise EvaluationError(
            f"task {name!r}: its records cannot be loaded ({first_line(cause_of(error))}); without internet give "
            "--mirror DIR, which scripts/prepare_benchmarks.sh fills (docs/evaluation.md)"
        ) from error
    return found


def _leaves(loaded: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for task in loaded.values():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield str(task.config.task), task


def definition_of(task: Any) -> Any:
    """The configuration of a task, with the source file of every function in the place of the function."""
    fields = {field.name: getattr(task.config, field.name) for field in dataclasses.fields(task.config)}
    return {name: _plain(value) for name, value in sorted(fields.items()) if name not in UNHASHED and value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if callable(value):
        function = inspect.unwrap(getattr(value, "func", value))
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        source = records.sha256_of([Path(file)]) if file is not None and Path(file).is_file() else ""
        return [getattr(function, "__qualname__", type(function).__name__), source]
    return value


def records_hash(dataset: Any) -> str:
    """A hash over the content of a `datasets.Dataset`, pictures as they are stored; equal wherever it was read from."""
    import pyarrow

    if not hasattr(dataset, "with_format"):  # some tasks of lmms-eval make lists of documents
        return _sha256(list(dataset))
    digest = hashlib.sha256(repr(sorted(map(repr, dataset.features.items()))).encode())
    raw = dataset.with_format("arrow")
    for start in range(0, len(raw), ROWS_AT_ONCE):
        table = raw[start : start + ROWS_AT_ONCE].combine_chunks().replace_schema_metadata(None)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(memoryview(sink.getvalue()))
    return digest.hexdigest()


def reset_between_models(task: Any) -> None:
    """OCRBench's scorer adds to sums of its module, which the next checkpoint would start from."""
    for function in task.aggregation().values():
        sums = getattr(function, "__globals__", {}).get(OCRBENCH_SUMS)
        if sums is not None:
            sums.update(dict.fromkeys(sums, 0))


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
