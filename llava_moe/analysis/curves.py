"""Figures of runs whose horizontal axis is the step: lines of several runs, or of the layers of one.

Colours are told apart by people with any colour vision, and runs and layers also by the style of their lines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from llava_moe.analysis.numbers import terms
from llava_moe.analysis.records import Run
from llava_moe.evaluation.figures import GREY, MAX_POINTS, SERIES, STYLE, smooth, svg

PANEL = (3.6, 2.3)  # inches
MAX_LINES = 6  # more layers are drawn as a heat map
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_SMOOTHED = 40  # rows from which on a line is drawn smooth over its own noise
_SPEED = (
    ("seconds_per_step", "seconds per step", "s"),
    ("tokens_per_second", "tokens per second", "real tokens / s"),
    ("data_wait_share", "waiting for data", "% of the step"),
    ("useful_tokens", "useful tokens", "% of all places"),
    ("mfu", "model FLOPs utilisation", "% of the peak"),
    ("peak_memory_gib", "peak memory", "GiB"),
)
Line = tuple[str, Sequence[int], Sequence[float]]


def losses(runs: Sequence[Run]) -> list[str]:
    """Total, cross-entropy, each balance loss without its coefficient, and the norm of the gradient."""
    names = list(dict.fromkeys(name for run in runs for name in terms(run)))
    wanted = [("loss", "loss, as minimised"), ("cross_entropy", "cross-entropy"), *((n, f"{n} loss") for n in names)]
    panels = [(key, title, "nats per token" if key == "cross_entropy" else "") for key, title in wanted]
    panels.append(("grad_norm", "norm of the gradient", "before clipping"))
    return [figure for key, title, unit in panels if (figure := _of_runs(runs, key, title, unit))]


def rates(runs: Sequence[Run]) -> list[str]:
    """The learning rate of each part of the model; one panel for each run."""
    drawn = []
    for run in runs:
        parts = dict.fromkeys(p for row in run.rows if isinstance(r := row.get("learning_rate"), dict) for p in r)
        lines = [(part, *run.series("learning_rate", part)) for part in parts]
        whole = run.series("learning_rate")
        lines += [("largest part", *whole)] if whole[0] else []
        if lines:
            title = f"learning rate, {run.label}"
            drawn.append(panel(f"rate-{run.label}", title, "per step", lines, quiet=True))
    return drawn


def speed(runs: Sequence[Run]) -> list[str]:
    """Time, throughput, waiting and memory."""
    return [figure for key, title, unit in _SPEED if (figure := _of_runs(runs, key, title, unit))]


def scores(runs: Sequence[Run]) -> list[str]:
    """What was scored while the runs trained, one panel for each number."""
    found = dict.fromkeys(path for run in runs for row in run.rows for path in _paths(row.get("scores")))
    drawn = []
    for path in found:
        lines = [(run.label, *run.series("scores", *path)) for run in runs]
        name = " ".join(path).replace("_", " ")
        drawn.append(panel(f"score-{name}", name, "score", [line for line in lines if line[1]], marker="o"))
    return drawn


def layers(run: Run, key: str, title: str, unit: str, limits: tuple[float | None, float | None] = (0, None)) -> str:
    """A number of each layer over the steps, as lines; "" where the log does not have it. A slash in the key leads into
    a mapping: "losses/switch"."""
    found = [(site, *run.series("layers", site, *key.split("/"))) for site in run.sites]
    lines = [(site if "." in site else f"layer {site}", steps, values) for site, steps, values in found if steps]
    if not lines:
        return ""
    quiet = key == "num_dead"  # counts
    name = f"{key}-{run.label}"
    return panel(name, title, unit, lines, by_depth=True, quiet=quiet, limits=limits, marks=run.alarm_steps)


def panel(
    name: str,
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    by_depth: bool = False,
    quiet: bool = False,
    limits: tuple[float | None, float | None] | None = None,
    marks: Sequence[int] = (),
    marker: str = "",
) -> str:
    """One figure.

    Args:
        by_depth: the lines are layers, whose colours follow their order.
        quiet: the lines have no noise to smooth.
        marks: steps with a dotted upright line: alarms.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=PANEL, layout="constrained")
        axes = figure.subplots()
        colours = _depths(len(lines)) if by_depth else list(itertools.islice(itertools.cycle(SERIES), len(lines)))
        for index, (label, steps, values) in enumerate(lines):
            colour, dash = colours[index], _DASHES[index % len(_DASHES)]
            thin = max(1, math.ceil(len(steps) / MAX_POINTS))
            shown = values
            if len(steps) >= _SMOOTHED and not quiet:
                axes.plot(steps[::thin], values[::thin], color=colour, linewidth=0.6, alpha=0.3)
                shown = smooth(values)
            dot = marker or ("o" if len(steps) == 1 else "")
            axes.plot(
                steps[::thin], shown[::thin], color=colour, linestyle=dash, linewidth=1.4, label=label, marker=dot,
                markersize=3.5,
            )  # fmt: skip
        for step in marks:
            axes.axvline(step, color="#c8553d", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="optimiser step", ylabel=unit)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.margins(x=0.01)
        middle, spread = _middle([value for _, _, values in lines for value in values])
        if limits is not None:
            axes.set_ylim(*limits)
        elif spread < 1e-6 * abs(middle):  # a constant: an axis of rounding errors would show a mountain range
            axes.set_ylim(0.95 * middle, 1.05 * middle)
        if len(lines) > 1 or by_depth:
            figure.legend(loc="outside lower center", ncols=min(3, len(lines)), handlelength=2.6, columnspacing=1.2)
        ends = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, _, values in lines)
        return svg(figure, name, f"{title}: {ends}")


def _of_runs(runs: Sequence[Run], key: str, title: str, unit: str) -> str:
    factor = 100 if unit.startswith("%") else 1
    found = [(run.label, *run.series(key)) for run in runs]
    lines = [(label, steps, [factor * value for value in values]) for label, steps, values in found if steps]
    return panel(f"{key}-runs", title, unit, lines) if lines else ""


def _middle(values: Sequence[float]) -> tuple[float, float]:
    return (max(values) + min(values)) / 2, max(values) - min(values)


def _depths(count: int) -> list[Any]:
    """Colours in the order of the layers; the light end of the map would be lost on a white page."""
    return [mpl.colormaps["viridis"](0.85 * index / max(count - 1, 1)) for index in range(count)]


def _paths(value: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [path for key, inner in value.items() for path in _paths(inner, (*above, key))]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [above] if is_number and above else []
