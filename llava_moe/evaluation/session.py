"""Tasks that are checked and built once, and score any number of checkpoints (`checkpoint_run.py` does the scoring)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_moe.evaluation import EvaluationError, mirror, prepared, records
from llava_moe.evaluation.checkpoint_run import CheckpointRun, finished_tasks, is_finished
from llava_moe.evaluation.judge import Judge, judging
from llava_moe.evaluation.machinery import accelerator, captured, offline
from llava_moe.evaluation.prepared import Prepared
from llava_moe.evaluation.progress import Progress
from llava_moe.evaluation.tasks import LOCAL_TASKS

DTYPES = ("float32", "bfloat16", "float16")  # as in lmms.py, which loads torch
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@dataclass(frozen=True)
class Settings:
    """How checkpoints are scored.

    Attributes:
        batch_size: prompts answered together, at most.
        limit: only the first so many records of each task.
        blank_images: shows a mid-grey picture instead of every picture (the blind baseline).
        device: where to compute; by default a GPU when there is one.
        dtype: of the weights.
        batch_tokens, vision_cache_mib: see `lmms.LlavaMoe`.
        routing: writes what the experts did for each question.
        seed: of all random generators; None for lmms-eval's own seeds. Decides random letters and sampled answers.
        variant: what else was done to the model, e.g. "top expert dropped"; answers of one are not taken for another.
    """

    batch_size: int = 16
    limit: int | None = None
    blank_images: bool = False
    device: str | None = None
    dtype: str = "float32"
    batch_tokens: int | None = None
    vision_cache_mib: float = 256
    routing: bool = False
    seed: int | None = None
    variant: str = ""

    def __post_init__(self) -> None:
        """Raises EvaluationError for what would otherwise be found out when the records are read."""
        if self.dtype not in DTYPES:
            raise EvaluationError(f"unknown dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")
        for name, least in (("batch_size", 1), ("batch_tokens", 1), ("vision_cache_mib", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} must be {least} or more, not {value}")

    @property
    def seeds(self) -> dict[str, int]:
        """As lmms-eval takes them."""
        return SEEDS if self.seed is None else dict.fromkeys(SEEDS, self.seed)


class Session(contextlib.AbstractContextManager["Session"]):
    """Checks on entry; scores within.

    Args:
        tasks: names of tasks.
        sources: the data files of the local ones among them.
        versions: of what can move a score, for the records.
        mirror: folder of data sets in the place of the Hub.
        judge: who judges, where a task needs one; asked before.

    Attributes:
        built: the tasks, once one of them was needed.
        rows: the records of the local ones, likewise.
        read_from: task, split, rows and revision of what is read from the mirror.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        sources: Mapping[str, Path],
        versions: Mapping[str, str],
        mirror: Path | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.home = Path.cwd()  # a mirror becomes the working directory
        self.tasks, self.versions = list(tasks), dict(versions)
        self.sources = {name: self.home / path for name, path in sources.items()}
        self.mirror, self.judge = None if mirror is None else self.home / mirror, judge
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.progress = Progress(quiet=self.rank != 0)
        self.built: dict[str, Prepared] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.read_from: list[list[Any]] = []
        self._stack = contextlib.ExitStack()

    @property
    def all_local(self) -> bool:
        """Whether every task has its records in files of ours."""
        return set(self.tasks) <= set(self.sources)

    def __enter__(self) -> Session:
        prepared.refuse_num_image()
        with contextlib.ExitStack() as stack:
            if self.mirror is not None:
                found = mirror.check(self.mirror, self.tasks)
                self.read_from = [[one.task, str(one.source), one.rows, one.revision] for one in found]
                stack.enter_context(mirror.offline(self.mirror))
            stack.enter_context(offline(active=self.all_local))
            if self.judge is not None:
                stack.enter_context(judging(self.judge, self.tasks))
            self._cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_moe_eval_")))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.built.clear()  # their files go with the cache
        self._stack.close()

    def score(self, checkpoint: Path, out: Path, settings: Settings, fresh: bool = False) -> dict[str, Any]:
        """Scores one checkpoint and writes OUT/results.json, OUT/samples_TASK.jsonl and OUT/samples.html.

        Args:
            checkpoint: directory of a llava_moe or stock LLaVA checkpoint.
            out: folder of this run; what is finished there with the same content and arguments is taken as it is.
            settings: see there.
            fresh: asks everything again.

        Returns:
            What results.json holds; empty on the ranks other than 0 of a distributed run.

        Raises:
            EvaluationError: the checkpoint or records are wrong, or tasks failed; the others are in results.json then.
        """
        folder, place = self.home / checkpoint, self.home / out
        key: dict[str, Any] = {
            "checkpoint_sha256": records.sha256_of(records.checkpoint_files(folder)),
            "arguments": asdict(settings),
            "versions": self.versions,
            "judge": None if self.judge is None else self.judge.describe(),
        }
        place.mkdir(parents=True, exist_ok=True)
        hashes = self._hashes()
        done = {} if fresh else finished_tasks(place, key, hashes)
        if not fresh and (finished := is_finished(place, key, hashes, done)):
            self.progress.say(f"{out}: already scored with the same checkpoint, data and arguments; skipped")
            return finished if self.rank == 0 else {}
        self._build()
        self.wait()  # others may still be reading what is removed now
        run = CheckpointRun(self, str(checkpoint), folder, place, settings, key, hashes)
        return run.go({} if settings.routing else done, fresh)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            accelerator().wait_for_everyone()

    def _hashes(self) -> dict[str, tuple[str, str]]:
        """(hash of the records, of definition and records) by task; only local ones are known without building."""
        if self.all_local:
            return {name: prepared.local_hash(name, self.sources[name]) for name in self.tasks}
        self._build()
        return {name: (one.data_sha256, one.sha256) for name, one in self.built.items()}

    def _build(self) -> None:
        """Builds the tasks and reads the local records; rank 0 first, so that the others find its Arrow files."""
        if self.built:
            return
        self.rows = {name: records.read_rows(path, LOCAL_TASKS.get(name)) for name, path in self.sources.items()}
        found: dict[str, Prepared] = {}
        with self._first_rank_first(), captured(Path(os.devnull), silent=True):
            for name in self.tasks:
                if name not in self.sources:
                    self.progress.say(f"{name}: reading its records")
                found |= prepared.build(name, self.tasks, self.sources.get(name), self._cache)
        self.built = found

    def _first_rank_first(self) -> contextlib.AbstractContextManager[Any]:
        if self.world_size == 1:
            return contextlib.nullcontext()
        manager: contextlib.AbstractContextManager[Any] = accelerator().main_process_first()
        return manager
