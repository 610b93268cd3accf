"""`llava-moe eval --list`: the suites, and what is known about each of their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.suites import BENCHMARKS, SUITES, Benchmark
from llava_moe.evaluation.tasks import LOCAL_TASKS
from llava_moe.registry import near_misses

JUDGES = {"none": "", "openai": "judge", "server": "judge"}
HEADINGS = ("task", "score", "judge", "data set", "note")


def listing(tasks: Sequence[str], mirror: Path | None) -> str:
    """Text about suites and tasks; with a mirror also whether it holds their data.

    Args:
        tasks: of the catalogue; empty for all.
        mirror: folder, or None.
    """
    lines = ["suites", ""]
    for name in SUITES.names():
        suite = SUITES.get(name)
        lines += [f"  {name}: {suite.summary}", f"    {', '.join(suite.tasks)}"]
    unknown = [name for name in tasks if name not in BENCHMARKS]
    if unknown:
        hint = near_misses(unknown[0], BENCHMARKS.names())
        raise EvaluationError(f"--list knows the tasks of the suites only, and not {unknown[0]!r}; {hint}")
    rows = [_row(BENCHMARKS.get(name), mirror) for name in tasks or BENCHMARKS.names()]
    headings = [*HEADINGS[:-1], *(["in the mirror"] if mirror is not None else []), HEADINGS[-1]]
    widths = [max(len(row[place]) for row in [headings, *rows]) for place in range(len(headings))]
    widths[-1] = 0  # the note is the last column, and may be long
    lines += ["", "tasks", ""]
    for row in [headings, *rows]:
        lines.append("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    lines += ["", "Any other task of lmms-eval can be named too; `lmms-eval --tasks list` shows them."]
    return "\n".join(lines)


def _row(benchmark: Benchmark, mirror: Path | None) -> list[str]:
    scale = "" if benchmark.scale in (1.0, 100.0) else f" of {benchmark.scale:g}"
    repos = list(dict.fromkeys(source.repo for source in benchmark.sources))
    row = [benchmark.name, f"{' + '.join(benchmark.metrics)}{scale}", JUDGES[benchmark.judge]]
    row.append(", ".join(repos) or "records in --data")
    if mirror is not None:
        from llava_moe.evaluation.mirror import holds

        there = "" if benchmark.name in LOCAL_TASKS else "yes" if holds(mirror, benchmark.name) else "no"
        row.append(there)
    limits = [f"a limit must be a multiple of {benchmark.group}"] * (benchmark.group > 1)
    limits += ["no limit"] * benchmark.whole
    notes = [*([benchmark.note] if benchmark.note and benchmark.sources else []), *limits]
    return [*row, "; ".join(notes)]
