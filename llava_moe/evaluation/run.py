"""Scores checkpoints on suites of benchmarks with lmms-eval; docs/evaluation.md says more.

Exit code 0 means that every task was scored. What is finished stays in OUT, so a command that was interrupted goes on.
"""

# For programs: `evaluate` scores one checkpoint on any task of the catalogue, local or not. Each sample has a `credit`
# of 0 to 1 (None where only the whole is scored). Answers stay in OUT/answers; give another `variant` where the model
# of a checkpoint is changed before it answers.

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError, prepared, records, suites, tables
from llava_moe.evaluation.judge import Judge, ask, find_judge
from llava_moe.evaluation.scores import score_answers as score_answers  # for live.py
from llava_moe.evaluation.session import Session, Settings
from llava_moe.evaluation.tasks import LOCAL_TASKS
from llava_moe.registry import near_misses

PACKAGES = ("llava_moe", "lmms-eval", "torch", "transformers", "datasets", "pillow", "numpy")
DEFAULT_BATCH_SIZE = 16
BLANK = "blank"


def evaluate(
    checkpoint: Path,
    data: Path | None,
    tasks: Sequence[str],
    out: Path,
    batch_size: int = DEFAULT_BATCH_SIZE,
    limit: int | None = None,
    blank_images: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    mirror: Path | None = None,
    variant: str = "",
) -> dict[str, Any]:
    """Scores one checkpoint and writes OUT/results.json, OUT/samples_TASK.jsonl and OUT/samples.html.

    Args:
        checkpoint: directory of a llava_moe or stock LLaVA checkpoint.
        data: folder with the local tasks' parquet files; None where there are none.
        tasks: local tasks, or any task of lmms-eval.
        out: folder of this run; a finished run of the same content and arguments there is returned as it is, and an
            interrupted one goes on.
        batch_size: prompts answered together.
        limit: only the first so many records of each task.
        blank_images: shows a mid-grey picture instead of every picture (the blind baseline).
        device: where to compute; by default a GPU when there is one.
        dtype: of the weights.
        mirror: folder of data sets (docs/evaluation.md); by default lmms-eval fetches them.
        variant: see `session.Settings`.

    Returns:
        What results.json holds; empty on the ranks other than 0 of a distributed run.

    Raises:
        EvaluationError: something asked for is missing or inconsistent, said before computing where possible; or a task
            failed. results.json then holds the others.
    """
    suites.check_limit(tasks, limit)
    records.checkpoint_files(checkpoint)
    sources, judge = check_tasks(tasks, data), _asked_judge(tasks, None, None)
    settings = Settings(batch_size, limit, blank_images, device, dtype, variant=variant)
    with Session(tasks, sources, versions(), mirror, judge) as session:
        return session.score(checkpoint, out, settings)


def versions() -> dict[str, str]:
    """The installed versions of everything that can move a score."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a source tree that was never installed
            found[package] = metadata.version(package)
    return found


def check_tasks(tasks: Sequence[str], data: Path | None) -> dict[str, Path]:
    """Refuses unknown tasks; the data files of the local ones.

    Raises:
        EvaluationError: names the task, and what was perhaps meant; or a data file that is missing.
    """
    if not tasks:
        raise EvaluationError(f"no task given; local ones are {', '.join(LOCAL_TASKS.names())}")
    if len(set(tasks)) != len(tasks):
        raise EvaluationError(f"a task is named twice in {', '.join(tasks)}")
    foreign = [name for name in tasks if name not in suites.BENCHMARKS]
    for name in foreign:
        if name.startswith("local_"):
            raise EvaluationError(f"unknown task {name!r}; {near_misses(name, LOCAL_TASKS.names())}")
    if foreign:  # the index of lmms-eval's tasks takes ten seconds to read
        suites.expand(foreign, known=prepared.index(include_defaults=True).all_tasks)
    local = records.local_tasks(tasks)
    if local and data is None:
        raise EvaluationError(f"{', '.join(task.name for task in local)}: give --data, the folder of their records")
    return {} if data is None else {task.name: records.data_file(data, task) for task in local}


def _asked_judge(tasks: Sequence[str], url: str | None, model: str | None) -> Judge | None:
    judge = find_judge(tasks, url, model)
    if judge is not None and os.environ.get("RANK", "0") == "0":
        ask(judge, tasks)
    return judge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-moe eval`."""
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="checkpoint directories")
    parser.add_argument(
        "--tasks",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        help=f"comma-separated suites ({', '.join(suites.SUITES.names())}) and tasks; default: quickstart",
    )
    parser.add_argument("--out", type=Path, help="folder for results; with several checkpoints one below it for each")
    parser.add_argument("--data", type=Path, help="folder with the local tasks' parquet files")
    parser.add_argument(
        "--mirror", type=Path, metavar="DIR", help="read benchmarks from here, without network or token"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records of each task")
    parser.add_argument("--list", action="store_true", help="show suites and tasks (those of --tasks), and leave")
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="N")
    parser.add_argument(
        "--batch-tokens", type=int, metavar="N", help="bound on the tokens of a batch, answers included"
    )
    parser.add_argument(
        "--vision-cache-mib", type=float, default=256, metavar="N", help="features of pictures kept; 0: none"
    )
    parser.add_argument("--device", help="cpu, cuda:0, ...; by default a GPU when there is one")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--seed", type=int, metavar="N", help="of all generators; default: lmms-eval's own seeds")
    parser.add_argument("--blank-images", action="store_true", help="show a grey picture instead (blind baseline)")
    parser.add_argument(
        "--blind", type=Path, metavar="CHECKPOINT", help="score this one on grey pictures too, into OUT/blank"
    )
    parser.add_argument("--routing", action="store_true", help="write what the experts did for each question")
    parser.add_argument("--judge", metavar="URL", help="an OpenAI-compatible server of yours, for judged tasks")
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's model; default: MODEL_VERSION or gpt-4o")
    parser.add_argument("--fresh", action="store_true", help="ask everything again, also what is answered in OUT")


def main(args: argparse.Namespace) -> int:
    """`llava-moe eval`: scores each checkpoint, prints and writes one table of all.

    Raises:
        EvaluationError: something is wrong with what was asked for; or, at the end, a checkpoint's tasks failed.
    """
    mirror = None if args.mirror is None else args.mirror.absolute()
    if args.list:
        from llava_moe.evaluation.listing import listing

        print(listing(suites.expand(args.tasks) if args.tasks else [], mirror))
        return 0
    tasks = suites.expand(["quickstart"] if args.tasks is None else args.tasks)
    suites.check_limit(tasks, args.limit)
    runs = _runs(args)
    sources = check_tasks(tasks, args.data)
    judge = _asked_judge(tasks, args.judge, args.judge_model)
    scored: dict[str, dict[str, Any]] = {}
    failures: list[Exception] = []
    with Session(tasks, sources, versions(), mirror, judge) as session:
        for name, (checkpoint, out, settings) in runs.items():
            try:
                results = session.score(checkpoint, out, settings, fresh=args.fresh)
            except Exception as error:
                alone = len(runs) == 1 and not isinstance(error, EvaluationError)
                if alone or session.world_size > 1:  # the other ranks must be ended
                    raise
                session.progress.say(f"{checkpoint}: FAILED, {prepared.first_line(error)}")
                failures.append(error)
                results = _kept(session.home / out)
            if results:
                scored[name] = results
                _print_scores(results, out)
            if results and not settings.blank_images:
                _renew_card(session.home / checkpoint, results)
    if scored:
        print(f"{tables.write(args.out, scored)}")
    if failures:
        raise EvaluationError("\n".join(map(prepared.first_line, failures))) from failures[0]
    return 0


def _runs(args: argparse.Namespace) -> dict[str, tuple[Path, Path, Settings]]:
    """By name of the column: checkpoint, folder and settings; refused before anything is computed."""
    if not args.checkpoints:
        raise EvaluationError("give at least one CHECKPOINT directory, or --list")
    if args.out is None:
        raise EvaluationError("give --out, a folder for results")
    settings = {
        name: getattr(args, name)
        for name in ("batch_size", "limit", "device", "dtype", "batch_tokens", "vision_cache_mib", "routing", "seed")
    }
    runs: dict[str, tuple[Path, Path, Settings]] = {}
    for checkpoint, out in zip(args.checkpoints, out_folders(args.checkpoints, args.out), strict=True):
        name = out.name if len(args.checkpoints) > 1 else checkpoint.resolve().name
        runs[name] = (checkpoint, out, Settings(**settings, blank_images=args.blank_images))
    if args.blind is not None:
        if BLANK in runs:
            raise EvaluationError(
                f"--blind writes to {args.out / BLANK}, which is the folder of a checkpoint; rename it"
            )
        runs[BLANK] = (args.blind, args.out / BLANK, Settings(**settings, blank_images=True))
    for checkpoint, out, _ in runs.values():
        _must_be_of(out, checkpoint)
    return runs


def _must_be_of(out: Path, checkpoint: Path) -> None:
    """Raises EvaluationError where a folder holds the scores of another checkpoint, which would be written over."""
    files = records.checkpoint_files(checkpoint)
    path = out / records.RESULTS_FILE
    if not path.is_file():
        return
    found = records.read_json(path)
    same_place = os.path.realpath(found["checkpoint"]) == os.path.realpath(checkpoint)
    if not same_place and found.get("checkpoint_sha256") != records.sha256_of(files):
        raise EvaluationError(
            f"{path} holds the scores of another checkpoint, {found['checkpoint']}; choose another --out, or delete it"
        )


def _kept(out: Path) -> dict[str, Any]:
    """What is there of a checkpoint of which some tasks failed just now."""
    path = out / records.RESULTS_FILE
    found: dict[str, Any] = records.read_json(path) if path.is_file() else {}
    return found if found.get("failed") else {}  # else it is an older one


def _renew_card(checkpoint: Path, results: Mapping[str, Any]) -> None:
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


def _print_scores(results: Mapping[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['checkpoint']}  ({out})")
    for heading in ("task / family", "n", "score", "95 % interval"):
        table.add_column(heading, justify="left" if heading.startswith("task") else "right")
    for name, score in results["tasks"].items():
        value, _, interval = tables.cell(score).partition(" [")
        shown = interval.rstrip("]").replace(", ", " to ")
        table.add_row(f"{name}  {tables.metric(score)}", str(score["n"]), value, shown)
    for name, family in results["families"].items():
        low, high = family["interval"]
        shown = f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(f"  {name}", str(family["n"]), f"{100 * family['accuracy']:.1f}", shown)
    for name, why in results.get("failed", {}).items():
        table.add_row(f"{name}  FAILED: {why}", "", "", "")
    Console().print(table)
