"""Figures of reports as inline SVG whose ink follows the page's text colour, so that they suit light and dark."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from llava_moe.evaluation import EvaluationError

INK = "#010203"  # stands for the page's text colour until the SVG is written
BLUE, ORANGE, GREEN, GREY = "#3b82c4", "#d98e04", "#2a9d76", "#8d949e"
SERIES = (BLUE, ORANGE, GREEN, "#b56aa0", "#c8553d", "#5f7d95")
PANEL = (3.1, 2.0)  # inches; the page lays the panels out in a grid that suits its width
MAX_POINTS = 400  # more are invisible at this size and make the page heavy

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """MoE, dense control, blind and majority of each question family, with intervals."""
    kinds = (("moe", "MoE", BLUE, "o"), ("dense", "dense control", ORANGE, "s"))
    baselines = (("blind", "blind", INK, "x"), ("majority", "majority", GREY, "d"))
    names = list(tasks)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 0.9 + 0.42 * len(names)), layout="constrained")
        axes = figure.subplots()
        for offset, (kind, label, colour, marker) in zip((-0.14, 0.14), kinds, strict=True):
            for row, name in enumerate(names):
                low, high = tasks[name][f"{kind}_ci"]
                axes.plot([100 * low, 100 * high], [row + offset] * 2, color=colour, linewidth=1.6)
            values = [100 * tasks[name][kind] for name in names]
            rows = [row + offset for row in range(len(names))]
            axes.plot(values, rows, marker, color=colour, markersize=5.5, label=label)
        for kind, label, colour, marker in baselines:
            values = [100 * tasks[name][kind] for name in names]
            axes.plot(values, range(len(names)), marker, color=colour, markersize=5, markeredgewidth=1.2, label=label)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set(xlim=(-2, 102), ylim=(len(names) - 0.5, -0.5), xlabel="score, %")
        axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        figure.legend(loc="outside upper center", ncols=4, handletextpad=0.3, columnspacing=1.2)
        summary = "; ".join(f"{n} MoE {100 * r['moe']:.0f}, dense {100 * r['dense']:.0f}" for n, r in tasks.items())
        return svg(figure, "scores", f"Scores in percent with 95 % intervals: {summary}")


def losses(stages: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """One figure for each training stage: its loss over the steps, and other losses that were logged beside it."""
    drawn: list[str] = []
    for stage, history in stages.items():
        points = [point for point in history if "loss" in point]
        if not points:
            raise EvaluationError(f"the log of stage {stage!r} holds no point with a loss")
        steps, values = [point["step"] for point in points], [point["loss"] for point in points]
        thin = max(1, math.ceil(len(points) / MAX_POINTS))
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=PANEL, layout="constrained")
            axes = figure.subplots()
            axes.plot(steps[::thin], values[::thin], color=BLUE, linewidth=0.7, alpha=0.45)
            axes.plot(steps[::thin], smooth(values)[::thin], color=BLUE, linewidth=1.5, label="loss")
            _other_losses(axes, points, thin)
            axes.set(title=stage, xlabel="step", ylim=(0, None))
            summary = f"Training loss of {stage}: from {values[0]:.2f} to {smooth(values)[-1]:.2f}"
            drawn.append(svg(figure, f"losses-{len(drawn)}", summary))
    return drawn


def expert_load(layers: Mapping[str, Sequence[float]]) -> list[str]:
    """One figure for each MoE layer: the share of the routed tokens of each expert; dashed: an even share."""
    top = 108 * max(max(shares) for shares in layers.values())
    drawn: list[str] = []
    for layer, shares in layers.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(PANEL[0], 1.5), layout="constrained")
            axes = figure.subplots()
            axes.bar(range(len(shares)), [100 * share for share in shares], color=BLUE, width=0.75)
            axes.axhline(100 / len(shares), color=INK, linewidth=1, linestyle="--")
            axes.set(title=layer, xticks=few(len(shares)), ylim=(0, top), ylabel="tokens, %")
            summary = ", ".join(f"{100 * share:.0f}" for share in shares)
            drawn.append(svg(figure, f"load-{len(drawn)}", f"Share of tokens per expert of {layer}, %: {summary}"))
    return drawn


def family_load(families: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A heat map: question families down, the experts of all layers across, share of the tokens as shade."""
    layers = list(next(iter(families.values())))
    widths = [len(next(iter(families.values()))[layer]) for layer in layers]
    rows = [[100 * share for layer in layers for share in load[layer]] for load in families.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 1.3 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        starts = [0, *itertools.accumulate(widths)]
        for start in starts[1:-1]:
            axes.axvline(start - 0.5, color="white", linewidth=2)
        centres = [start + (width - 1) / 2 for start, width in zip(starts, widths, strict=False)]
        axes.set_xticks(centres, layers, rotation=0 if len(layers) <= 4 else 45)
        axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in families])
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, label="tokens, %", fraction=0.04)
        return svg(figure, "families", "Share of tokens per expert (columns, by layer) and question family (rows)")


def seconds(stages: Mapping[str, float]) -> str:
    """Wall-clock time of each stage as bars."""
    names, values = list(stages), list(stages.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 0.6 + 0.27 * len(names)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(range(len(names)), values, color=GREEN, height=0.65)
        axes.bar_label(bars, [f"{value:.0f} s" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 1.15 * max([*values, 1e-9]))
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        return svg(figure, "seconds", "; ".join(f"{name}: {value:.0f} s" for name, value in stages.items()))


def _other_losses(axes: Any, points: Sequence[Mapping[str, float]], thin: int) -> None:
    """Draws whatever else is a loss (balance, z, ...) against an axis of its own at the right."""
    names = sorted({name for point in points for name in point if name != "loss" and "loss" in name})
    if not names:
        return
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    for colour, name in zip(itertools.cycle(SERIES[1:]), names):
        series = [(point["step"], point[name]) for point in points if name in point][::thin]
        right.plot(*zip(*series, strict=True), color=colour, linewidth=1.1, label=name.replace("_", " "))
    right.tick_params(labelsize=7)
    lines = [*axes.get_lines()[1:2], *right.get_lines()]
    right.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Mean of a window around each point, so that a trend shows through the batches' noise."""
    half = max(1, round(share * len(values) / 2))
    sums = [0.0, *itertools.accumulate(values)]
    windows = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def few(count: int) -> list[int]:
    """At most eight tick positions for as many columns."""
    return list(range(0, count, max(1, math.ceil(count / 8))))


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline SVG.

    Args:
        name: another for each figure of a page.
        description: for those who do not see it.
    """
    buffer = io.StringIO()
    # A salt of its own keeps the ids of several SVGs in one page apart, and the same from run to run.
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"llava_moe-{name}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    drawn = text[text.index("<svg") :].replace(INK, "currentColor")
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
