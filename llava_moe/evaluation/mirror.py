"""A folder of data sets in the place of the Hugging Face Hub: checked before compute, read without network or token.

Layout: `DIR/ORGANISATION/NAME` is a snapshot of the data set of that name, with the README.md that names its
configurations. lmms-eval's own task files find it unchanged, since `datasets` prefers a folder of that relative name
to the Hub; so while the mirror is used, it is the working directory. `DIR/mirror.json`, which
`scripts/prepare_benchmarks.sh` writes, records revision, files and rows of each data set. A mirror that was made by
hand has none; it works, and only the comparison with the record falls away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.machinery import offline as without_network
from llava_moe.evaluation.suites import BENCHMARKS, Source
from llava_moe.evaluation.tasks import LOCAL_TASKS

MANIFEST = "mirror.json"
VERSION = 1
DEFAULT_CONFIG = "default"
# 0.7.3 of lmms-eval says the first, 0.7.2 said the second
ORGANISATION, FORMER_ORGANISATION = "lmms-lab-encoder", "lmms-lab"
CACHE_VARIABLE = "LMMS_EVAL_DATASETS_CACHE"


@dataclass(frozen=True)
class File:
    """One file of a snapshot: bytes, and its checksum."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Recorded:
    """What mirror.json says about a data set.

    Attributes:
        revision: commit on the Hub; None where the files were given and theirs is not known.
        origin: "hub", or the folder that the files were taken from.
        licence: as the publisher states it, or "unknown".
        at: when it was recorded (UTC).
        files: by path below the data set's folder.
        rows: by configuration and split; None for files whose rows cannot be counted without reading them all.
    """

    revision: str | None
    origin: str
    licence: str
    at: str
    files: dict[str, File] = field(default_factory=dict)
    rows: dict[str, dict[str, int | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A split that a task reads, as it lies in a mirror.

    Attributes:
        task: who reads it.
        source: what is read.
        rows: see `Recorded.rows`.
        revision: of the data set, where mirror.json holds it.
    """

    task: str
    source: Source
    rows: int | None
    revision: str | None


def read_manifest(folder: Path) -> dict[str, Recorded]:
    """The records of a mirror by data set; none of a mirror that was made by hand.

    Raises:
        EvaluationError: mirror.json is there and cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']!r}, this program writes {VERSION}")
        return {repo: _recorded(entry) for repo, entry in raw["datasets"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}); delete it, and let scripts/prepare_benchmarks.sh write it anew"
        ) from error


def _recorded(entry: dict[str, Any]) -> Recorded:
    files = {name: File(**file) for name, file in entry["files"].items()}
    return Recorded(**{**entry, "files": files})


def write_manifest(folder: Path, records: dict[str, Recorded]) -> None:
    """Writes mirror.json in one step."""
    content = {"version": VERSION, "datasets": {repo: dataclasses.asdict(records[repo]) for repo in sorted(records)}}
    fresh = folder / f"{MANIFEST}.new"
    fresh.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, folder / MANIFEST)


def prepare_command(folder: Path, names: Sequence[str]) -> str:
    """What to run so that a mirror holds what tasks or suites read."""
    return f"bash scripts/prepare_benchmarks.sh {' '.join(names)} --mirror {shlex.quote(str(folder))}"


def sources_of(task: str) -> tuple[Source, ...]:
    """What a task reads: from the catalogue, otherwise from lmms-eval's task file. Nothing for the local tasks.

    Raises:
        EvaluationError: there is no such task, or its file names no data set on the Hub.
    """
    if task in LOCAL_TASKS:
        return ()
    if task in BENCHMARKS:
        return BENCHMARKS.get(task).sources
    config = _task_file(task)
    repo, split = config.get("dataset_path"), config.get("test_split") or config.get("validation_split")
    if not isinstance(repo, str) or repo.count("/") != 1 or not isinstance(split, str):
        raise EvaluationError(f"task {task!r} of lmms-eval names no data set of the Hub; leave it out with --mirror")
    return (Source(repo, config.get("dataset_name"), split),)


def _task_file(task: str) -> dict[str, Any]:
    """The task file of that name, with what it includes. Found by text: lmms-eval's own index takes ten seconds."""
    spec = util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise EvaluationError(f"what task {task!r} reads is not known without lmms-eval: bash scripts/install.sh eval")
    named = re.compile(rf"^task: *[\"']?{re.escape(task)}[\"']? *$", re.MULTILINE)
    for path in sorted((Path(spec.origin).parent / "tasks").rglob("*.yaml")):
        if named.search(path.read_text(encoding="utf-8", errors="replace")):
            from lmms_eval.utils import load_yaml_config

            config: dict[str, Any] = load_yaml_config(str(path), mode="simple")
            return config
    raise EvaluationError(
        f"what task {task!r} reads is not known: it is in no suite, and lmms-eval has no file of that one task; "
        "name its single tasks"
    )


def check(folder: Path, tasks: Sequence[str]) -> list[Found]:
    """Refuses a mirror that lacks something the tasks read.

    Of every split the files must be there, readable, of the recorded size and with the recorded number of rows. Nothing
    is hashed; `scripts/prepare_benchmarks.sh --check` does that.

    Args:
        folder: the mirror.
        tasks: names of tasks (not of suites).

    Returns:
        Every split that is read, with rows and revision.

    Raises:
        EvaluationError: all that is wrong, by task, data set and split, and the command that mends it.
    """
    if not folder.is_dir():
        raise EvaluationError(f"mirror {folder} is not a folder; make it: {prepare_command(folder, tasks)}")
    records = read_manifest(folder)
    found: list[Found] = []
    problems: dict[Source, str] = {}
    seen: dict[Source, int | None] = {}
    lacking: list[str] = []
    for task in tasks:
        for source in sources_of(task):
            record = records.get(source.repo)
            if source not in seen and source not in problems:
                try:
                    seen[source] = _check_split(folder, source, record)
                except EvaluationError as error:
                    problems[source] = f"task {task!r}, {source}: {error}"
            if source in problems:
                lacking.append(task)
            else:
                found.append(Found(task, source, seen[source], None if record is None else record.revision))
    if problems:
        command = prepare_command(folder, list(dict.fromkeys(lacking)))
        raise EvaluationError("\n".join([f"the mirror {folder} lacks something:", *problems.values(), command]))
    return found


def holds(folder: Path, task: str) -> bool:
    """Whether the folders of all that a task reads are there; `check` looks closer."""
    return all((folder / source.repo).is_dir() for source in sources_of(task))


def _check_split(folder: Path, source: Source, record: Recorded | None) -> int | None:
    """The rows of a split, or what is wrong with it."""
    place = folder / source.repo
    if not place.is_dir():
        raise EvaluationError(_missing(folder, source))
    files, rows = read_split(place, source.config, source.split)
    if record is None:
        return rows
    for file in files:
        expected = record.files.get(file.relative_to(place.resolve()).as_posix())
        if expected is not None and file.stat().st_size != expected.size:
            raise EvaluationError(f"{file} has {file.stat().st_size} bytes, {MANIFEST} says {expected.size}")
    expected_rows = record.rows.get(source.config or DEFAULT_CONFIG, {}).get(source.split)
    if expected_rows is not None and rows != expected_rows:
        raise EvaluationError(f"the split has {rows} rows, {MANIFEST} says {expected_rows}")
    return rows


def _missing(folder: Path, source: Source) -> str:
    organisation, _, name = source.repo.partition("/")
    if organisation == ORGANISATION and (folder / FORMER_ORGANISATION / name).is_dir():
        link = folder / ORGANISATION
        if not link.exists():
            return f"only {FORMER_ORGANISATION}/{name} is there; `ln -s {FORMER_ORGANISATION} {shlex.quote(str(link))}`"
    return f"{folder / source.repo} does not exist"


def read_split(place: Path, config: str | None, split: str) -> tuple[list[Path], int | None]:
    """Files and rows of a split in a snapshot, as `datasets` finds them: by its README.md or by the files' names.

    The rows are read from the ends of parquet files; of files of another kind they are None.

    Raises:
        EvaluationError: the snapshot has no such configuration or split, lacks files of it, a file is cut, or the rows
            are others than README.md states, which `datasets` would refuse.
    """
    import datasets

    with tempfile.TemporaryDirectory(prefix="llava_moe_mirror_") as cache, without_network(active=True):
        try:
            builder = datasets.load_dataset_builder(str(place.resolve()), config, cache_dir=cache)
        except FileNotFoundError as error:
            raise EvaluationError(
                f"{place} cannot be read: files that its README.md names are missing (`datasets` looks for those of "
                f"the first configuration, whichever is asked for): {_first_line(error)}"
            ) from error
        except (ValueError, OSError, TypeError, datasets.exceptions.DatasetsError) as error:
            raise EvaluationError(f"{place} cannot be read: {_first_line(error)}") from error
    by_split = builder.config.data_files or {}
    names = sorted(map(str, by_split))
    if split not in by_split:
        raise EvaluationError(f"{place} has no split {split!r} (it has: {', '.join(names) or 'none'})")
    files = [Path(file) for file in by_split[split]]
    rows = _count_rows(files)
    if rows == 0:
        raise EvaluationError(f"the split has no rows in {place}")
    stated = builder.info.splits
    if stated and sorted(stated) != names:
        raise EvaluationError(f"{place}: README.md states the splits {', '.join(stated)}, but has {', '.join(names)}")
    if stated and rows is not None and stated[split].num_examples not in (0, rows):
        raise EvaluationError(f"{place}: the split has {rows} rows, README.md states {stated[split].num_examples}")
    return files, rows


def _count_rows(files: Sequence[Path]) -> int | None:
    import pyarrow.parquet as parquet

    total = 0
    for file in files:
        if file.suffix != ".parquet":
            return None
        try:
            total += parquet.read_metadata(file).num_rows
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise EvaluationError(f"{file} cannot be read as parquet: {_first_line(error)}") from error
    return total


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def offline(folder: Path, cache: Path | None = None) -> Iterator[None]:
    """Makes lmms-eval read a mirror: the working directory is the mirror, and nothing may ask the network.

    Everything is as before afterwards. Paths that are relative to the former working directory mean something else
    within, so make them absolute first. `datasets` converts what it reads to Arrow files, in its own cache.

    Args:
        folder: a mirror that `check` has passed.
        cache: the place of these Arrow files instead of `$LMMS_EVAL_DATASETS_CACHE`, `$HF_DATASETS_CACHE` or
            `$HF_HOME/datasets`.
    """
    import datasets.config

    before, variable = datasets.config.HF_DATASETS_CACHE, os.environ.get(CACHE_VARIABLE)
    if cache is None and variable:
        cache = Path(variable)  # lmms-eval follows it, but not where a task loads a second data set (gqa)
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_network(active=True))
        if cache is not None:
            cache = cache.absolute()
            cache.mkdir(parents=True, exist_ok=True)
            stack.callback(setattr, datasets.config, "HF_DATASETS_CACHE", before)
            stack.callback(_set_variable, CACHE_VARIABLE, variable)
            datasets.config.HF_DATASETS_CACHE = cache
            os.environ[CACHE_VARIABLE] = str(cache)
        stack.enter_context(contextlib.chdir(folder))
        yield


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
