"""One checkpoint answers the tasks of a session, one task after the other.

Each task is an evaluation of its own: its random letters do not depend on what was asked before, and where its scorer
fails, the others go on. What is finished stays: answers in the journal (`resume.py`), and the scores of tasks in
finished.json, so a run that was killed repeats nothing, not even a judge's verdicts. results.json holds what was asked
for last, and is written at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_moe.evaluation import EvaluationError, prepared, records, resume, samples_page, scores
from llava_moe.evaluation.machinery import captured
from llava_moe.evaluation.prepared import cause_of, first_line
from llava_moe.evaluation.suites import BENCHMARKS
from llava_moe.evaluation.tasks import LOCAL_TASKS

if TYPE_CHECKING:
    from llava_moe.evaluation.session import Session, Settings

FINISHED = "finished.json"
LOGS = "lmms_eval"
ROUTING = "routing.jsonl.gz"  # as in routing_records.py, which loads torch
JUDGED_BEFORE = "gpt_response"  # HallusionBench's verdicts, kept by position: those of another model would be taken
MOST_UNJUDGED = 0.02  # of the answers
NO_VERDICT = "attempts failed. Last error message"  # in the log of HallusionBench's scorer
ANSWERING = ("llava_moe", "torch", "transformers", "pillow")  # whose versions may change an answer

Hashes = Mapping[str, tuple[str, str]]


def finished_tasks(out: Path, key: Mapping[str, Any], hashes: Hashes) -> dict[str, Any]:
    """The tasks that were finished in a folder with the same key, definition and data, asked for or not."""
    path = out / FINISHED
    if not path.is_file():
        return {}
    found = records.read_json(path)
    if found.get("key") != key:
        return {}
    return {
        name: task
        for name, task in found["tasks"].items()
        if records.samples_path(out, name).is_file()
        and (name not in hashes or task["about"]["sha256"] == hashes[name][1])
    }


def is_finished(out: Path, key: Mapping[str, Any], hashes: Hashes, done: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results, where results.json is that of the same tasks, key and hashes, and nothing of it is missing."""
    path = out / records.RESULTS_FILE
    if not path.is_file() or not set(hashes) <= set(done):
        return None
    if key["arguments"]["routing"] and not (out / ROUTING).is_file():
        return None
    results: dict[str, Any] = records.read_json(path)
    arguments = {**key["arguments"], "tasks": list(hashes)}
    expected = {**key, "arguments": arguments}
    same = all(results.get(name) == value for name, value in expected.items())
    return results if same and not results.get("failed") and set(results["tasks"]) == set(hashes) else None


@dataclass
class CheckpointRun:
    """One checkpoint within a session.

    Attributes:
        session: its tasks are built.
        shown: the checkpoint as the user named it.
        checkpoint, out: absolute.
        settings: how it is scored.
        key: what decides the scores, apart from the tasks and their data.
        hashes: (of the records, of definition and records) by task.
    """

    session: Session
    shown: str
    checkpoint: Path
    out: Path
    settings: Settings
    key: dict[str, Any]
    hashes: Hashes
    failed: dict[str, str] = field(default_factory=dict)

    def go(self, done: Mapping[str, Any], fresh: bool) -> dict[str, Any]:
        """Scores what is not done, and writes results.json.

        Raises:
            EvaluationError: tasks failed.
        """
        start, tasks = time.perf_counter(), dict(done)
        self._prepare_folder(fresh)
        journal = self._journal()
        first: Exception | None = None
        try:
            adapter = self._adapter(journal)
            if self.session.rank == 0:  # never an old score beside new answers
                (self.out / records.RESULTS_FILE).unlink(missing_ok=True)
            for number, name in enumerate(self.hashes, start=1):
                if name in done:
                    continue
                of = f" ({number} of {len(self.hashes)})" if len(self.hashes) > 1 else ""
                self.session.progress.prefix = f"{name}{of}"
                try:
                    tasks[name] = self._score(name, adapter)
                except Exception as error:
                    if self.session.world_size > 1:  # the other ranks wait for this one, and must be ended
                        raise
                    first = first or error
                    self._failed(name, error)
                else:
                    self._write(FINISHED, {"key": self.key, "tasks": tasks})
        finally:
            journal.close()
        results = self._results({name: tasks[name] for name in self.hashes if name in tasks}, adapter, journal)
        results["seconds"] = round(time.perf_counter() - start, 3)
        if results["tasks"]:
            self._write(records.RESULTS_FILE, results)
            if self.session.rank == 0:
                samples_page.write(self.out, results)
        if first is not None:
            raise EvaluationError(self._told()) from first
        return results if self.session.rank == 0 else {}

    def _prepare_folder(self, fresh: bool) -> None:
        if fresh and self.session.rank == 0:
            shutil.rmtree(self.out / resume.FOLDER, ignore_errors=True)
        (self.out / LOGS).mkdir(exist_ok=True)
        self.session.wait()

    def _journal(self) -> resume.Journal:
        arguments = self.key["arguments"]
        settings = {name: arguments[name] for name in ("dtype", "blank_images", "seed", "variant")}
        settings["weights"] = self.key["checkpoint_sha256"]
        settings["versions"] = {name: self.key["versions"].get(name) for name in ANSWERING}
        whole = {name: both for name, (_, both) in self.hashes.items()}
        self._routing_run = json.dumps([settings, whole], sort_keys=True)
        return resume.Journal(self.out, self.session.rank, settings, whole)

    def _adapter(self, journal: resume.Journal) -> Any:
        from llava_moe.evaluation.lmms import LlavaMoe

        settings = self.settings
        with _no_loading_bar():
            adapter = LlavaMoe(
                pretrained=str(self.checkpoint),
                batch_size=settings.batch_size,
                device=settings.device,
                dtype=settings.dtype,
                blank_images=settings.blank_images,
                batch_tokens=settings.batch_tokens,
                vision_cache_mib=settings.vision_cache_mib,
                routing=self.out if settings.routing else None,
                routing_run=self._routing_run if settings.routing else "",
            )
        adapter.progress = self.session.progress
        resume.attach(adapter, journal)
        return adapter

    def _score(self, name: str, adapter: Any) -> dict[str, Any]:
        """Answers and scores one task; empty on other ranks than 0."""
        from lmms_eval import evaluator

        start, task = time.perf_counter(), self.session.built[name].task
        prepared.reset_between_models(task)
        if self.session.rank == 0:
            shutil.rmtree(self.out / LOGS / JUDGED_BEFORE, ignore_errors=True)
        with captured(self._log(name), silent=True):
            raw: dict[str, Any] | None = evaluator.simple_evaluate(
                model=adapter,
                tasks=[task],
                task_manager=prepared.index(include_defaults=False),
                batch_size=self.settings.batch_size,
                limit=self.settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                process_docs_parallel=1,
                cli_args=argparse.Namespace(output_path=str(self.out / LOGS), process_with_media=False),
                **self.settings.seeds,
            )
        if raw is None:
            return {}
        if not raw["samples"].get(name):
            raise EvaluationError(f"lmms-eval returned no answers for {name}; see {self._log(name)}")
        rows = {name: self.session.rows[name]} if name in self.session.rows else {}
        found = scores.score_answers(raw, rows, self.out)["tasks"][name]
        self._check_verdicts(name, raw, found)
        samples_page.keep(self.out, name, records.read_task_samples(self.out, name), task)
        about = {"sha256": self.hashes[name][1], **_about(task), "judge": _judge_of(name, self.key)}
        return {"score": found, "about": {**about, "seconds": round(time.perf_counter() - start, 3)}}

    def _check_verdicts(self, name: str, raw: dict[str, Any], found: dict[str, Any]) -> None:
        """Adds to a judged task how many answers got no verdict, which scorers count as wrong without a word."""
        if _judge_of(name, self.key) is None:
            return
        unjudged = BENCHMARKS.get(name).unjudged
        if unjudged is not None:
            number = sum(map(unjudged, raw["samples"][name]))
        else:  # HallusionBench: even takes the verdict on the answer before
            number = self._log(name).read_text(encoding="utf-8", errors="replace").count(NO_VERDICT)
        if number > MOST_UNJUDGED * found["n"]:
            raise EvaluationError(
                f"the judge gave no verdict on {number} of {found['n']} answers, which would count as wrong (see "
                f"{self._log(name)}); the answers are kept, so score again when it works"
            )
        found["unjudged"] = number

    def _log(self, name: str) -> Path:
        rank = self.session.rank
        return self.out / LOGS / (f"{name}.txt" if rank == 0 else f"{name}_rank{rank}.txt")

    def _failed(self, name: str, error: Exception) -> None:
        self.failed[name] = first_line(cause_of(error))
        with self._log(name).open("a", encoding="utf-8") as file:
            traceback.print_exception(cause_of(error), file=file)
        self.session.progress.say(f"{name}: FAILED, {self.failed[name]} (see {self._log(name)})")

    def _told(self) -> str:
        what = "; ".join(f"{name}: {message}" for name, message in self.failed.items())
        kept = len(self.hashes) - len(self.failed)
        rest = f"; the other {kept} are in {self.out / records.RESULTS_FILE}" if kept else ""
        return f"{self.shown}: {len(self.failed)} of {len(self.hashes)} tasks failed{rest}; {what}"

    def _results(self, tasks: dict[str, Any], adapter: Any, journal: resume.Journal) -> dict[str, Any]:
        if self.session.rank != 0:
            return {"tasks": {}}
        local = [name for name in tasks if name in LOCAL_TASKS]
        samples = [sample for name in local for sample in records.read_task_samples(self.out, name)]
        if self.settings.routing and not self.failed:
            self._merge_routing(tasks)
        results: dict[str, Any] = {
            "checkpoint": self.shown,
            **self.key,
            "data_sha256": {name: data for name, (data, _) in self.hashes.items()},
            "template": str(adapter.processor.template),
            "tasks": {name: task["score"] for name, task in tasks.items()},
            "about": {name: task["about"] for name, task in tasks.items()},
            "families": scores.family_scores(samples),
            "seeds": self.settings.seeds,
            "hardware": records.hardware(),
            "processes": self.session.world_size,
            "mirror": self.session.read_from,
            # of this rank, and of this command: answers of an interrupted run are taken from its journal
            "answers": {"asked": journal.answered, "from_journal": journal.reused, **adapter.counters()},
            "failed": self.failed,
        }
        results["arguments"] = {**self.key["arguments"], "tasks": list(self.hashes)}
        return results

    def _merge_routing(self, tasks: Mapping[str, Any]) -> None:
        from llava_moe.evaluation import routing_records

        samples = {name: records.read_task_samples(self.out, name) for name in tasks}
        routing_records.merge(self.out, {(name, one["doc_id"]) for name, found in samples.items() for one in found})

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        if self.session.rank == 0:
            records.write_json(self.out / name, content)


@contextlib.contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Without the bar that transformers draws while it reads weights: answers have the one line that is live."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _about(task: Any) -> dict[str, Any]:
    """What decided the prompts of a task, for the records."""
    given = task.lmms_eval_specific_kwargs or {}
    prompt = {name: value for name, value in given.items() if isinstance(value, str | int | float | None)}
    return {"prompt": prompt, "generation": task.config.generation_kwargs, "version": task.VERSION}


def _judge_of(name: str, key: Mapping[str, Any]) -> Any:
    return key["judge"] if name in BENCHMARKS and BENCHMARKS.get(name).judge != "none" else None
