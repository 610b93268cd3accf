"""What a scoring run reads and writes: checkpoint and data checks, content hashes, sample files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.tasks import LOCAL_TASKS, LocalTask

RESULTS_FILE = "results.json"
MAX_INDEX = 10**6  # MMBench's scorer reads larger indices as rotations of the same question
# All that decides an answer: weights, config, tokenizer, prompt template and picture preparation.
CHECKPOINT_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "processor_config.json",
    "preprocessor_config.json",
)


def samples_path(run: Path, task: str) -> Path:
    """Where a run keeps its answers to a task."""
    return run / f"samples_{task}.jsonl"


def sha256_of(paths: Iterable[Path]) -> str:
    """One hash over the names and contents of files, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def checkpoint_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that decide its answers.

    Raises:
        EvaluationError: the folder is missing, or holds no config or no weights.
    """
    if not checkpoint.is_dir():
        raise EvaluationError(f"checkpoint {checkpoint} is not a directory; give the folder that holds config.json")
    for pattern in ("config.json", "*.safetensors"):
        if not any(checkpoint.glob(pattern)):
            held = ", ".join(sorted(path.name for path in checkpoint.iterdir())[:8]) or "nothing"
            raise EvaluationError(f"checkpoint {checkpoint} has no {pattern} (it holds: {held})")
    return sorted({path for pattern in CHECKPOINT_PATTERNS for path in checkpoint.glob(pattern) if path.is_file()})


def data_file(data: Path, task: LocalTask) -> Path:
    """The records of a local task.

    Raises:
        EvaluationError: the file is missing.
    """
    path = data / task.file
    if not path.is_file():
        deeper = next(iter(sorted(data.glob(f"*/{task.file}"))), None) if data.is_dir() else None
        hint = f"; did you mean --data {deeper.parent}?" if deeper else "; build it, or leave the task out"
        raise EvaluationError(f"task {task.name!r} needs {path}, which does not exist{hint}")
    return path


def read_rows(path: Path, task: LocalTask) -> list[dict[str, Any]]:
    """The records of a local task without their pictures, checked.

    Raises:
        EvaluationError: a column is missing, or a record has an impossible id, answer or index.
    """
    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise EvaluationError(f"{path} cannot be read as parquet: {error}") from error
    missing = [column for column in task.all_columns if column not in schema.names]
    if missing:
        raise EvaluationError(f"{path}: task {task.name!r} needs the missing columns {', '.join(missing)}")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    if features.get("image", {}).get("_type") != "Image":
        raise EvaluationError(f"{path}: column 'image' must be written as datasets.Image() with the bytes embedded")
    rows = parquet.read_table(path, columns=[name for name in schema.names if name != "image"]).to_pylist()
    if not rows:
        raise EvaluationError(f"{path} holds no records")
    _check_rows(rows, path, task)
    return rows


def _check_rows(rows: list[dict[str, Any]], path: Path, task: LocalTask) -> None:
    for column in ("id", "index") if "index" in task.columns else ("id",):
        seen: set[Any] = set()
        for row in rows:
            if row[column] in seen:
                raise EvaluationError(f"{path}: {column} {row[column]!r} occurs twice; every record needs its own")
            seen.add(row[column])
    for row in rows:
        if task.allowed_answers is not None and row["answer"] not in task.allowed_answers:
            known = ", ".join(sorted(task.allowed_answers))
            raise EvaluationError(f"{path}: record {row['id']!r} has the answer {row['answer']!r}; allowed: {known}")
        if "index" in task.columns and not (isinstance(row["index"], int) and 0 <= row["index"] < MAX_INDEX):
            raise EvaluationError(f"{path}: record {row['id']!r} needs a whole index in 0..{MAX_INDEX - 1}")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON in one step: a reader sees the old file or the whole new one."""
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_samples(run: Path, task: str, samples: list[dict[str, Any]]) -> None:
    """Writes a task's answers, one JSON object a line."""
    _write_text(
        samples_path(run, task), "".join(json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples)
    )


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        EvaluationError: the file is missing or no JSON.
    """
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; was the step that writes it run?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} is not JSON: {error}") from error


def read_samples(run: Path) -> list[dict[str, Any]]:
    """All answers of a finished run, in the order of its tasks; each sample names its task.

    Raises:
        EvaluationError: the run is not finished, tasks of it failed, or a sample file is missing.
    """
    results = read_json(run / RESULTS_FILE)
    if failed := results.get("failed"):
        raise EvaluationError(f"{run}: the scoring of {', '.join(failed)} failed; score {run} again")
    samples: list[dict[str, Any]] = []
    for task in results["tasks"]:
        path = samples_path(run, task)
        if not path.is_file():
            raise EvaluationError(f"{path} is missing although {run / RESULTS_FILE} lists the task; score {run} again")
        samples.extend({"task": task, **sample} for sample in read_task_samples(run, task))
    return samples


def hardware() -> str:
    """The name of what computes: the GPUs that this process may use, or the CPU."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").split("\n") if listed.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(iter(named), platform.processor() or platform.machine())
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def read_task_samples(run: Path, task: str) -> list[dict[str, Any]]:
    """The answers to one task, in the order of its documents."""
    # by "\n" alone: splitlines would also cut at U+2028, which stands in answers unescaped
    lines = samples_path(run, task).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def local_tasks(names: Iterable[str]) -> list[LocalTask]:
    """Those of the named tasks that are local ones."""
    return [LOCAL_TASKS.get(name) for name in names if name in LOCAL_TASKS]


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
