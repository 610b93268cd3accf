"""Scores a checkpoint: a wrapper of lmms-eval's `simple_evaluate` that fails loudly and records what it scored.

lmms-eval's own command exits with 0 after any error, hashes neither the data nor the checkpoint, and needs the hub.
Here a failure raises, `results.json` names what was scored by content, and the local tasks never leave the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError, records, stats
from llava_moe.evaluation.machinery import offline, run_lmms_eval, task_manager
from llava_moe.evaluation.tasks import LOCAL_TASKS
from llava_moe.registry import near_misses

PACKAGES = ("llava_moe", "lmms-eval", "torch", "transformers", "datasets", "pillow", "numpy")
DEFAULT_BATCH_SIZE = 16
YES_NO = {"yes", "no"}


def evaluate(
    checkpoint: Path,
    data: Path,
    tasks: Sequence[str],
    out: Path,
    batch_size: int = DEFAULT_BATCH_SIZE,
    limit: int | None = None,
    blank_images: bool = False,
    device: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Scores one checkpoint and writes OUT/results.json and OUT/samples_TASK.jsonl.

    Args:
        checkpoint: directory of a llava_moe or stock LLaVA checkpoint.
        data: folder with the local tasks' parquet files.
        tasks: local tasks, or any task of lmms-eval (those fetch their data themselves).
        out: folder of this run; a finished run of the same content and arguments there is returned as it is.
        batch_size: prompts answered together.
        limit: only the first so many records of each task.
        blank_images: shows a mid-grey picture instead of every picture (the blind baseline).
        device: where to compute; by default a GPU when there is one.
        dtype: of the weights.

    Returns:
        What results.json holds; empty on the ranks other than 0 of a distributed run.

    Raises:
        EvaluationError: something asked for is missing or inconsistent; said before computing where possible.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be a whole number from 1 on, not {limit}")
    files, sources = records.checkpoint_files(checkpoint), check_tasks(tasks, data)
    all_local = len(sources) == len(tasks)
    key: dict[str, Any] = {
        "checkpoint_sha256": records.sha256_of(files),
        "data_sha256": {name: records.sha256_of([path]) for name, path in sources.items()},
        "arguments": {"tasks": list(tasks), "batch_size": batch_size, "limit": limit}
        | {"blank_images": blank_images, "device": device, "dtype": dtype},
        "versions": versions(),
    }
    out.mkdir(parents=True, exist_ok=True)
    if all_local and (finished := _finished_run(out, key)) is not None:
        print(f"{out}: already scored with the same checkpoint, data and arguments; skipped")
        return finished
    rows = {name: records.read_rows(path, LOCAL_TASKS.get(name)) for name, path in sources.items()}
    (out / records.RESULTS_FILE).unlink(missing_ok=True)  # never an old score beside new answers

    start = time.perf_counter()
    with offline(active=all_local):
        adapter = _adapter(checkpoint, key["arguments"])
        raw = run_lmms_eval(adapter, sources, out, key["arguments"])
    if raw is None:
        return {}
    scored = score_answers(raw, rows, out)
    results = {"checkpoint": str(checkpoint), **key, "template": str(adapter.processor.template), **scored}
    results["seconds"] = round(time.perf_counter() - start, 3)
    records.write_json(out / records.RESULTS_FILE, results)
    return results


def _adapter(checkpoint: Path, arguments: dict[str, Any]) -> Any:
    from llava_moe.evaluation.lmms import LlavaMoe

    options = ("batch_size", "device", "dtype", "blank_images")
    return LlavaMoe(pretrained=str(checkpoint), **{name: arguments[name] for name in options})


def versions() -> dict[str, str]:
    """The installed versions of everything that can move a score."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a source tree that was never installed
            found[package] = metadata.version(package)
    return found


def check_tasks(tasks: Sequence[str], data: Path) -> dict[str, Path]:
    """Refuses unknown tasks; the data files of the local ones."""
    if not tasks:
        raise EvaluationError(f"no task given; local ones are {', '.join(LOCAL_TASKS.names())}")
    if len(set(tasks)) != len(tasks):
        raise EvaluationError(f"a task is named twice in {', '.join(tasks)}")
    foreign = [name for name in tasks if name not in LOCAL_TASKS]
    for name in foreign:
        if name.startswith("local_"):
            raise EvaluationError(f"unknown task {name!r}; {near_misses(name, LOCAL_TASKS.names())}")
    if foreign:
        known = task_manager(include_defaults=True).all_tasks
        for name in foreign:
            if name not in known:
                raise EvaluationError(f"unknown task {name!r}; {near_misses(name, LOCAL_TASKS.names() + known)}")
    return {task.name: records.data_file(data, task) for task in records.local_tasks(tasks)}


def _finished_run(out: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    path = out / records.RESULTS_FILE
    if not path.is_file():
        return None
    results: dict[str, Any] = records.read_json(path)
    same = all(results.get(name) == value for name, value in key.items())
    complete = all(records.samples_path(out, name).is_file() for name in results.get("tasks", {}))
    return results if same and complete else None


def _samples(name: str, raw: dict[str, Any], rows: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The answers to one task in the order of its documents."""
    samples = []
    for logged in sorted(raw["samples"][name], key=lambda logged: int(logged["doc_id"])):
        doc_id = int(logged["doc_id"])
        prompt = str(logged["arguments"][0]) if logged.get("arguments") else str(logged.get("input", ""))
        sample = {
            "doc_id": doc_id,
            "id": str(doc_id),
            "family": name,
            "question": prompt,
            "prompt": prompt,
            "target": logged["target"],
            "answer": _first(logged["filtered_resps"]),
            "correct": None,  # only the local tasks judge each answer alike
        }
        if rows is not None:
            row = rows[doc_id]
            sample |= {"id": row["id"], "family": row["family"], "question": row["question"]}
            sample["correct"] = LOCAL_TASKS.get(name).is_correct(logged)
        samples.append(sample)
    return samples


def score_answers(raw: dict[str, Any], rows: dict[str, list[dict[str, Any]]], out: Path) -> dict[str, Any]:
    """Writes the answers to each task; the scores of the tasks and families."""
    samples = {name: _samples(name, raw, rows.get(name)) for name in raw["samples"]}
    tasks = {name: _task_score(name, raw, samples[name]) for name in samples}
    for name, task_samples in samples.items():
        records.write_samples(out, name, task_samples)
    return {"tasks": tasks, "families": _family_scores([sample for name in rows for sample in samples[name]])}


def _first(responses: Any) -> Any:
    while isinstance(responses, list) and len(responses) == 1:
        responses = responses[0]
    return responses


def _task_score(name: str, raw: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The official metrics of a task; for a local one also its accuracy, which must agree with them."""
    metrics = {
        metric.partition(",")[0]: value
        for metric, value in raw["results"][name].items()
        if "_stderr" not in metric and isinstance(value, (int, float))
    }
    score: dict[str, Any] = {"n": len(samples), "official": metrics}
    if name in LOCAL_TASKS:
        task = LOCAL_TASKS.get(name)
        correct = [sample["correct"] for sample in samples]
        value = stats.accuracy(correct)
        if abs(value - metrics[task.metric] / task.scale) > 1e-6:
            raise EvaluationError(
                f"task {name!r}: {sum(correct)} of {len(correct)} answers were judged correct, but the official "
                f"{task.metric} is {metrics[task.metric]}; the installed lmms-eval scores in another way than expected"
            )
        interval = list(stats.wilson_interval(sum(correct), len(correct)))
        score |= {"metric": task.metric, "score": value, "interval": interval}
    return score


def _family_scores(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(sample["family"], []).append(sample)
    scores: dict[str, dict[str, Any]] = {}
    for family, members in groups.items():
        correct = [bool(member["correct"]) for member in members]
        targets = [str(member["target"]) for member in members]
        scores[family] = {
            "n": len(members),
            "accuracy": stats.accuracy(correct),
            "interval": list(stats.wilson_interval(sum(correct), len(correct))),
        }
        if set(targets) <= YES_NO:
            scores[family]["balanced_accuracy"] = stats.balanced_accuracy(correct, targets)
            scores[family]["balanced_interval"] = list(stats.balanced_accuracy_interval(correct, targets))
    return scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-moe eval`."""
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="checkpoint directories")
    parser.add_argument("--data", type=Path, required=True, help="folder with the local tasks' parquet files")
    parser.add_argument(
        "--tasks",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        default=LOCAL_TASKS.names(),
        help=f"comma-separated: {', '.join(LOCAL_TASKS.names())}, or tasks of lmms-eval (default: the local ones)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results; one below it per checkpoint")
    parser.add_argument("--limit", type=int, help="only the first N records of each task")
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE)
    parser.add_argument("--blank-images", action="store_true", help="show a grey picture instead (blind baseline)")
    parser.add_argument(
        "--blind", type=Path, metavar="CHECKPOINT", help="score this one on grey pictures too, into OUT/blank"
    )
    parser.add_argument("--device", help="cpu, cuda:0, ...; by default a GPU when there is one")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")


def main(args: argparse.Namespace) -> int:
    """`llava-moe eval`: scores each checkpoint and prints one table for each."""
    runs = [
        (checkpoint, out, args.blank_images)
        for checkpoint, out in zip(args.checkpoints, out_folders(args.checkpoints, args.out), strict=True)
    ]
    if args.blind is not None:
        runs.append((args.blind, args.out / "blank", True))
    for checkpoint, out, blank in runs:
        results = evaluate(
            checkpoint,
            args.data,
            args.tasks,
            out,
            batch_size=args.batch_size,
            limit=args.limit,
            blank_images=blank,
            device=args.device,
            dtype=args.dtype,
        )
        if results:
            _print_scores(results, out)
        if results and not blank:
            _renew_card(checkpoint, results)
    return 0


def _renew_card(checkpoint: Path, results: dict[str, Any]) -> None:
    """Puts the scores into the checkpoint's model card, if it has one of ours that can be written."""
    from llava_moe.model.modeling import CheckpointError
    from llava_moe.model_card import add_scores

    try:
        add_scores(checkpoint, results)
    except (CheckpointError, OSError) as error:
        print(f"model card not renewed: {error}")


def out_folders(checkpoints: Sequence[Path], out: Path) -> list[Path]:
    """OUT for one checkpoint; with several one folder each, named by as few trailing path parts as tell them apart.

    Raises:
        EvaluationError: a checkpoint is named twice.
    """
    if len(checkpoints) == 1:
        return [out]
    parts = [path.resolve().parts for path in checkpoints]
    if len(set(parts)) != len(parts):
        raise EvaluationError("a checkpoint is named twice")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["__".join(path[-depth:]).replace(os.sep, "") for path in parts]
        if len(set(names)) == len(names):
            break
    return [out / name for name in names]


def _print_scores(results: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['checkpoint']}  ({out})")
    for heading in ("task / family", "n", "accuracy", "95 % interval"):
        table.add_column(heading, justify="left" if heading.startswith("task") else "right")
    rows = [
        (name, score["n"], score["score"], score["interval"])
        for name, score in results["tasks"].items()
        if "score" in score
    ]
    rows += [(f"  {name}", s["n"], s["accuracy"], s["interval"]) for name, s in results["families"].items()]
    for name, number, value, (low, high) in rows:
        table.add_row(name, str(number), f"{100 * value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}")
    for name, score in results["tasks"].items():
        if "score" not in score:
            metrics = ", ".join(f"{metric} {value:.4g}" for metric, value in score["official"].items())
            table.add_row(name, str(score["n"]), metrics, "")
    Console().print(table)
