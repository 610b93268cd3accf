"""Figures of the routing of one run: heat maps over the steps, and what each expert had at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from llava_moe.analysis.numbers import final, final_list
from llava_moe.analysis.records import Run
from llava_moe.evaluation.figures import BLUE, INK, ORANGE, STYLE, few, svg

WIDTH = 3.6  # inches
_COLUMNS = 240  # more steps than the eye can tell apart are averaged
_LEAST = -3.0  # log2 of a load over an even one that the colours still tell from none


def load(run: Run, site: str) -> str:
    """Experts down, steps across; the shade is the load over an even one."""
    steps, loads = run.lists("layers", site, "load")
    relative_ES = _pooled(np.array(loads, dtype=float).T) * len(loads[0])
    log_ES = np.log2(np.maximum(relative_ES, 2**_LEAST))
    # At least from a half to twice, so that a nearly even load does not look wild.
    top = float(min(max(1.0, math.ceil(2 * np.abs(log_ES).max()) / 2), -_LEAST))
    ticks = [tick for tick in range(-3, 4) if abs(tick) <= top]
    names = ["even" if tick == 0 else f"{2**tick} x" if tick > 0 else f"1/{2**-tick} x" for tick in ticks]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, _height(len(relative_ES))), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            log_ES, aspect="auto", cmap="PuOr_r", vmin=-top, vmax=top, interpolation="nearest",
            extent=(*_ends(steps), len(relative_ES) - 0.5, -0.5),
        )  # fmt: skip
        axes.set(title=f"load, {_name(site)}", xlabel="optimiser step", ylabel="expert", yticks=few(len(relative_ES)))
        bar = figure.colorbar(image, ax=axes, fraction=0.05)
        bar.set_ticks(ticks, labels=names)
        least, most = relative_ES[:, -1].min(), relative_ES[:, -1].max()
        text = f"Load of the experts of {_name(site)} over the steps; at the end {least:.2f} to {most:.2f} times even"
        return svg(figure, f"load-{run.label}-{site}", text)


def layers(run: Run, key: str, title: str, top: float | None = None) -> str:
    """Layers down, steps across, the shade is the number; "" where the log does not have it."""
    found = {site: run.series("layers", site, *key.split("/")) for site in run.sites}
    sites = [site for site, (steps, _) in found.items() if steps]
    steps = sorted({step for site in sites for step in found[site][0]})
    if not sites:
        return ""
    place = {step: column for column, step in enumerate(steps)}
    values_LS = np.full((len(sites), len(steps)), np.nan)
    for row, site in enumerate(sites):
        for step, value in zip(*found[site], strict=True):
            values_LS[row, place[step]] = value
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, _height(len(sites))), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            _pooled(values_LS), aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest",
            extent=(*_ends(steps), len(sites) - 0.5, -0.5),
        )  # fmt: skip
        for step in run.alarm_steps:
            axes.axvline(step, color="white", linewidth=0.9, linestyle=":")
        shown = few(len(sites))
        axes.set_yticks(shown, [sites[i] for i in shown])
        axes.set(title=title, xlabel="optimiser step", ylabel="layer")
        figure.colorbar(image, ax=axes, fraction=0.05)
        ends = ", ".join(f"{site} {found[site][1][-1]:.3g}" for site in sites)
        return svg(figure, f"{key}-map-{run.label}", f"{title} by layer over the steps; at the end: {ends}")


def modality(run: Run, site: str) -> str:
    """For each expert at the end its slots over an even share, those of text and of images on one another; "" where
    the log does not tell images from text."""
    load_E, share_E = final_list(run, "layers", site, "load"), final_list(run, "layers", site, "image_share")
    overall = final(run, "layers", site, "image_tokens")
    if load_E is None or share_E is None or overall is None:
        return ""
    total = [100 * (value or 0.0) for value in load_E]
    image = [t * (share or 0.0) for t, share in zip(total, share_E, strict=True)]
    count = len(total)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, 1))
        hatched: Any = {"hatch": "////", "edgecolor": "white", "lw": 0}
        text = [t - i for t, i in zip(total, image, strict=True)]
        above.bar(range(count), image, color=ORANGE, width=0.8, label="image tokens", **hatched)
        above.bar(range(count), text, bottom=image, color=BLUE, width=0.8, label="text tokens")
        above.axhline(100 / count, color=INK, linewidth=0.9, linestyle="--", label="even load")
        above.set(title=f"{_name(site)}, at the end", ylabel="slots, %")
        shares = [(e, 100 * share) for e, share in enumerate(share_E) if share is not None]
        below.plot(*zip(*shares, strict=True), "o", color=ORANGE, markersize=4 if count <= 32 else 2.5)
        below.axhline(100 * overall, color=INK, linewidth=0.9, linestyle=":", label="all tokens")
        below.set(xlabel="expert", ylabel="images, %", ylim=(-4, 104), xticks=few(count), xlim=(-0.6, count - 0.4))
        figure.legend(loc="outside lower center", ncols=4, handlelength=1.5, columnspacing=0.9, fontsize=7)
        each = ", ".join(f"{e}: {share:.0f}" for e, share in shares)
        title = f"Slots of each expert of {_name(site)} and the share of image tokens in them, %"
        return svg(figure, f"modality-{run.label}-{site}", f"{title}: {each}; of all tokens {100 * overall:.0f}")


def _pooled(values: np.ndarray) -> np.ndarray:
    """Columns averaged in groups where there are too many."""
    size = max(1, math.ceil(values.shape[1] / _COLUMNS))
    starts = range(0, values.shape[1], size)
    return np.stack([_mean(values[:, start : start + size]) for start in starts], axis=1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the columns; NaN where a row has no value at all."""
    counts = (~np.isnan(values)).sum(axis=1)
    return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)


def _ends(steps: Sequence[int]) -> tuple[float, float]:
    """Left and right end of the axis: a row of the log stands for the steps since the one before."""
    gap = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) or 1
    return max(steps[0] - gap, 0.0), float(steps[-1])


def _height(rows: int) -> float:
    return min(4.5, max(1.7, 1.2 + 0.09 * rows))


def _name(site: str) -> str:
    return site if "." in site else f"layer {site}"
