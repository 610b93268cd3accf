"""The report of `check_mixture`, as text for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_moe.data.checking import MixtureReport

_BINS = 12
_BAR = 40
_MAX_MATCHES = 10
_PERCENTILES = (50, 90, 95, 99)


def histogram(lengths: np.ndarray, bins: int = _BINS) -> list[tuple[int, int, int]]:
    """(first, last, how many) of ranges of equal width, in tokens; their widths are round numbers."""
    if not len(lengths):
        return []
    longest = int(lengths.max())
    width = max(1, -(-longest // bins))
    unit = 2 ** max(0, width.bit_length() - 3)
    width = -(-width // unit) * unit
    counts = np.bincount((lengths - 1) // width)
    return [(place * width + 1, (place + 1) * width, int(count)) for place, count in enumerate(counts)]


def as_json(report: MixtureReport) -> dict[str, Any]:
    """Everything in plain values."""
    return {
        "sources": [vars(source) for source in report.sources],
        "records": report.records,
        "kept": report.kept,
        "truncated": report.truncated,
        "left_out": report.left_out,
        "images": report.images,
        "decoded": report.decoded,
        "seconds": round(report.seconds, 1),
        "problems": {
            kind: {"count": count, "examples": report.examples[kind]} for kind, count in report.counts.items()
        },
        "tokens": None if not len(report.lengths) else _tokens(report.lengths),
        "benchmarks": report.benchmarks,
        "benchmark_images": [
            {"record": where, "benchmark": match.benchmark, "item": match.item, "dhash_distance": match.distance}
            for where, match in report.matches
        ],
    }


def _tokens(lengths: np.ndarray) -> dict[str, Any]:
    return {
        "total": int(lengths.sum(dtype=np.int64)),
        "mean": round(float(lengths.mean()), 1),
        "longest": int(lengths.max()),
        **{f"p{p}": int(np.percentile(lengths, p)) for p in _PERCENTILES},
        "histogram": histogram(lengths),
    }


def as_text(report: MixtureReport) -> str:
    """What the terminal shows."""
    lines = ["sources"]
    lines += [f"  {s.path}: {s.records:,} records, {s.drawn:,} in an epoch" for s in report.sources]
    cut = f", {report.truncated:,} of them cut to the maximal length" if report.truncated else ""
    images = f"{report.images:,} images" + ("" if report.decoded else " (looked for, not decoded)")
    lines.append(f"checked {report.records:,} records and {images}: {report.kept:,} can be used{cut}")
    if report.images and report.seconds:
        lines.append(f"took {report.seconds:,.1f} s, {report.images / report.seconds:,.0f} images a second")
    if report.left_out:
        said = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.left_out.items(), key=lambda i: -i[1]))
        lines.append(f"left out: {said}")
    for kind, count in report.counts.most_common():
        lines.append(f"{kind}: {count:,} problem(s)")
        lines += [f"  - {message}" for message in report.examples[kind]]
        if count > len(report.examples[kind]):
            lines.append(f"  ... and {count - len(report.examples[kind]):,} more")
    lines += _benchmark_lines(report)
    if len(report.lengths):
        tokens = _tokens(report.lengths)
        said = ", ".join(f"{p} % up to {tokens[f'p{p}']:,}" for p in _PERCENTILES)
        lines.append(f"tokens: {tokens['total']:,}, mean {tokens['mean']:,}, {said}, longest {tokens['longest']:,}")
        most = max(count for *_, count in tokens["histogram"])
        for first, last, count in tokens["histogram"]:
            lines.append(f"  {first:>6} - {last:<6} {'#' * -(-_BAR * count // most):<{_BAR}} {count:,}")
    else:
        lines.append("tokens: not counted (name a checkpoint with --processor)")
    return "\n".join(lines)


def _benchmark_lines(report: MixtureReport) -> list[str]:
    if not report.benchmarks:
        return []
    sizes = ", ".join(f"{name} ({count:,} images)" for name, count in report.benchmarks.items())
    exact = sum(match.distance is None for _, match in report.matches)
    lines = [
        f"images of {sizes}: {exact:,} uses of the same file (SHA-1), {len(report.matches) - exact:,} of images that "
        "look the same (dHash)"
    ]
    lines += [f"  - {where} is in {match}" for where, match in report.matches[:_MAX_MATCHES]]
    if len(report.matches) > _MAX_MATCHES:
        lines.append(f"  ... and {len(report.matches) - _MAX_MATCHES:,} more")
    return lines
