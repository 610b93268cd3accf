"""Figures of a comparison: scores and differences with intervals, score against cost, curves with a band of seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from llava_moe.compare.stats import Difference, Score
from llava_moe.evaluation.figures import BLUE, GREY, INK, MAX_POINTS, ORANGE, SERIES, STYLE, smooth, svg

WIDE = 5.6  # inches
_MARKERS = "osD^vPX"  # as many as do not divide by the number of colours
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_SMOOTHED = 40  # points from which on a curve is drawn smooth
Curve = Sequence[tuple[float, float]]


def scores(found: Mapping[str, Score]) -> str:
    """Each method's score with its interval, and its seeds as dots."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 0.9 + 0.3 * len(found)), layout="constrained")
        axes = figure.subplots()
        for row, score in enumerate(found.values()):
            axes.plot([100 * bound for bound in score.interval], [row, row], color=BLUE, linewidth=1.8)
            seeds = [100 * value for value in score.by_seed.values()]
            axes.plot(seeds, [row + 0.24] * len(seeds), "o", color=GREY, markersize=3, alpha=0.9)
        axes.plot([100 * score.value for score in found.values()], range(len(found)), "o", color=BLUE, markersize=5.5)
        _rows(axes, list(found), "score, %; bar: 95 % interval, grey: single seeds")
        text = "; ".join(f"{name} {100 * score.value:.1f}" for name, score in found.items())
        return svg(figure, "scores", f"Scores in percent with 95 % intervals: {text}")


def differences(found: Sequence[Difference], control: str, name: str) -> str:
    """Each method against a control; filled where shown, and shaded what could not have been seen reliably."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 0.9 + 0.3 * len(found)), layout="constrained")
        axes = figure.subplots()
        for row, one in enumerate(found):
            unseen = 100 * one.detectable
            axes.barh(row, 2 * unseen, left=-unseen, height=0.7, color=GREY, alpha=0.18, linewidth=0)
            colour = BLUE if one.shown else INK
            axes.plot([100 * bound for bound in one.interval], [row, row], color=colour, linewidth=1.6)
            fill = colour if one.shown else "none"
            axes.plot([100 * one.value], [row], "o", color=colour, markerfacecolor=fill, markersize=6)
        axes.axvline(0, color=INK, linewidth=0.8)
        reach = 1.1 * 100 * max(max(map(abs, one.interval)) for one in found)
        axes.set_xlim(-reach, reach)
        _rows(
            axes,
            [one.a for one in found],
            f"points above {control}; filled: shown after Holm; shaded: too small to see",
        )
        text = "; ".join(f"{one.a} {100 * one.value:+.1f}{', shown' * one.shown}" for one in found)
        return svg(figure, name, f"Differences from {control} in points: {text}")


def pareto(found: Mapping[str, Score], cost: Mapping[str, float], label: str, name: str) -> str:
    """Score against a cost; dashed: those that no other method beats in both by its mean.

    Methods of (nearly) the same cost are drawn side by side.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 3.4), layout="constrained")
        axes = figure.subplots()
        # in the order of the matrix, as in the curves: a method has one colour on the page
        points = [(x, 100 * found[method].value, method) for method, x in cost.items() if method in found]
        shifts = _side_by_side([x for x, _, _ in points])
        for index, (x, y, method) in enumerate(points):
            low, high = (100 * bound for bound in found[method].interval)
            colour, marker = SERIES[index % len(SERIES)], _MARKERS[index % len(_MARKERS)]
            place = offset_copy(axes.transData, figure, x=shifts[index], units="points")
            axes.plot([x, x], [low, high], color=colour, linewidth=1.1, alpha=0.7, transform=place)
            axes.plot([x], [y], marker, color=colour, markersize=6, label=method, transform=place)
        axes.update_datalim([(x, 100 * bound) for x, _, method in points for bound in found[method].interval])
        front = _front([(x, y) for x, y, _ in points])
        axes.plot(*zip(*front, strict=True), color=INK, linewidth=0.9, linestyle=(0, (4, 2)), alpha=0.7, zorder=0)
        axes.set(xlabel=label, ylabel="score, %")
        axes.margins(x=0.08, y=0.08)
        axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=min(4, len(points)), handletextpad=0.2, columnspacing=1.2)
        text = "; ".join(f"{method} {y:.1f} at {x:.4g}" for x, y, method in points)
        return svg(figure, name, f"Score in percent against {label}: {text}")


def curves(found: Mapping[str, Mapping[int, Curve]], title: str, unit: str, name: str, marker: str = "") -> str:
    """One line for each method, the mean over its seeds, in a band from the lowest to the highest seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 3.1), layout="constrained")
        axes = figure.subplots()
        ends = []
        for index, ((method, by_seed), colour) in enumerate(zip(found.items(), itertools.cycle(SERIES))):
            steps, values_SN = _aligned(by_seed)
            mean = values_SN.mean(axis=0)
            if len(by_seed) > 1:
                band = values_SN.min(axis=0), values_SN.max(axis=0)
                axes.fill_between(steps, *band, color=colour, alpha=0.15, linewidth=0)
            dash = _DASHES[index // len(SERIES) % len(_DASHES)]
            axes.plot(
                steps, mean, color=colour, linestyle=dash, linewidth=1.4, label=method, marker=marker, markersize=3.5
            )
            ends.append(f"{method} from {mean[0]:.3g} to {mean[-1]:.3g}")
        axes.set(title=title, xlabel="optimiser step", ylabel=unit)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.margins(x=0.01)
        figure.legend(loc="outside lower center", ncols=min(4, len(found)), handlelength=2.4, columnspacing=1.2)
        return svg(figure, name, f"{title}: {'; '.join(ends)}")


def bars(found: Mapping[str, float], title: str, unit: str, name: str) -> str:
    """A number of each method."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 0.8 + 0.26 * len(found)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.barh(range(len(found)), list(found.values()), color=ORANGE, height=0.6)
        axes.bar_label(drawn, [f"{value:.2f}" for value in found.values()], padding=3, fontsize=8)
        axes.set_xlim(0, 1.15 * max([*found.values(), 1e-9]))
        axes.set_title(title)
        _rows(axes, list(found), unit)
        return svg(figure, name, f"{title}: " + "; ".join(f"{method} {value:.2f}" for method, value in found.items()))


def _rows(axes: Any, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those with no other that costs no more and scores no less, in the order of cost."""
    best, front = -math.inf, []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            best = y
            front.append((x, y))
    return front


def _side_by_side(values: Sequence[float], near: float = 0.015, apart: float = 7.0) -> list[float]:
    """For each value a shift, in printer's points, that parts those nearer than a share of the whole range."""
    shifts = [0.0] * len(values)
    room = near * (max(values) - min(values))
    group: list[int] = []
    for index in [*sorted(range(len(values)), key=lambda i: values[i]), None]:
        if index is not None and (not group or values[index] - values[group[0]] <= room):
            group.append(index)
            continue
        for place, member in enumerate(group):
            shifts[member] = apart * (place - (len(group) - 1) / 2)
        group = [] if index is None else [index]
    return shifts


def _aligned(by_seed: Mapping[int, Curve]) -> tuple[list[float], np.ndarray]:
    """The steps that all seeds have, and their values (S, N)."""
    common = set.intersection(*(({step for step, _ in curve}) for curve in by_seed.values()))
    steps = sorted(common)
    rows = [[dict(curve)[step] for step in steps] for curve in by_seed.values()]
    if len(steps) >= _SMOOTHED:
        rows = [smooth(row) for row in rows]
    thin = max(1, math.ceil(len(steps) / MAX_POINTS))
    return steps[::thin], np.array(rows)[:, ::thin]
