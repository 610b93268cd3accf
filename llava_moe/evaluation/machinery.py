"""How lmms-eval is run: its tasks, one evaluation of one adapter, and what keeps it quiet and off the network."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.registry import MODEL_ID
from llava_moe.evaluation.tasks import SPLIT, TASKS_FOLDER


def task_manager(include_defaults: bool) -> Any:
    """lmms-eval's index of tasks: ours, and its own where asked for (which takes ten seconds)."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=include_defaults, model_name=MODEL_ID)


def accelerator() -> Any:
    """accelerate's view of this process; all of scoring must take it from here.

    Raises:
        EvaluationError: it sees another number of processes than were launched; each would answer everything.
    """
    import torch
    from accelerate import Accelerator

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # without `cpu` the ranks of a machine without a GPU would not know of each other
    found = Accelerator(cpu=True) if launched > 1 and not torch.cuda.is_available() else Accelerator()
    if found.num_processes != launched:
        raise EvaluationError(
            f"WORLD_SIZE is {launched}, but accelerate sees {found.num_processes} processes; start with torchrun, and "
            "on a machine without a GPU with ACCELERATE_USE_CPU=true"
        )
    return found


def run_lmms_eval(
    adapter: Any, sources: Mapping[str, Path], out: Path, arguments: Mapping[str, Any], silent: bool = False
) -> dict[str, Any] | None:
    """lmms-eval's raw results; None on ranks other than 0.

    Args:
        adapter: a `LlavaMoe`.
        sources: the data files of the local ones among the tasks.
        out: gets a folder `lmms_eval` with what lmms-eval and the scorers say and write.
        arguments: tasks, batch_size and limit.
        silent: sends progress bars and warnings there, too.

    Raises:
        EvaluationError: a local task came back without answers.
    """
    from lmms_eval import evaluator

    names = arguments["tasks"]
    logs = out / "lmms_eval"
    logs.mkdir(exist_ok=True)
    rank = os.environ.get("RANK", "0")
    log = logs / ("log.txt" if rank == "0" else f"log_rank{rank}.txt")
    with tempfile.TemporaryDirectory(prefix="llava_moe_eval_") as cache, captured(log, silent):
        raw: dict[str, Any] | None = evaluator.simple_evaluate(
            model=adapter,
            tasks=[_task_config(name, sources[name], cache) if name in sources else name for name in names],
            task_manager=task_manager(include_defaults=len(sources) < len(names)),
            batch_size=arguments["batch_size"],
            limit=arguments["limit"],
            bootstrap_iters=0,
            log_samples=True,
            process_docs_parallel=1,
            cli_args=argparse.Namespace(output_path=str(logs), process_with_media=False),
        )
    missing = [] if raw is None else [name for name in names if name in sources and not raw["samples"].get(name)]
    if missing:
        raise EvaluationError(f"lmms-eval returned no answers for {', '.join(missing)}; see {log}")
    return raw


def _task_config(name: str, source: Path, cache: str) -> dict[str, Any]:
    # A cache of its own for each run: the shared one would keep a copy of every version of the data for ever.
    return {"task": name, "dataset_kwargs": {"data_files": {SPLIT: str(source.resolve())}, "cache_dir": cache}}


@contextlib.contextmanager
def offline(active: bool) -> Iterator[None]:
    """Keeps the Hugging Face libraries from the network for a while, also where they are imported already."""
    if not active:
        yield
        return
    import datasets.config
    import huggingface_hub.constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: os.environ.get(name) for name in names}
    modules: list[tuple[Any, bool]] = [
        (module, module.HF_HUB_OFFLINE) for module in (datasets.config, huggingface_hub.constants)
    ]
    os.environ.update(dict.fromkeys(names, "1"))
    for module, _ in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in modules:
            module.HF_HUB_OFFLINE = value
        for name, before in environment.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


@contextlib.contextmanager
def captured(log: Path, silent: bool) -> Iterator[None]:
    """Sends what lmms-eval logs and prints to a file; its progress bars stay on the terminal unless it is silent."""
    from loguru import logger

    terminal = sys.stderr
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(file))
        if silent:
            stack.enter_context(contextlib.redirect_stderr(file))
        logger.remove()
        logger.add(file, level="INFO")
        logger.add(terminal, level="ERROR")
        try:
            yield
        finally:
            logger.remove()
            logger.add(terminal, level="WARNING")
