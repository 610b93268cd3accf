"""The numbers of runs for summary.json and summary.md. "At the end" is the mean over the last tenth of the rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llava_moe.analysis.records import Run
from llava_moe.moe import BALANCE_LOSSES

_FINAL = ("loss", "cross_entropy", "grad_norm")
_TYPICAL = ("seconds_per_step", "tokens_per_second", "useful_tokens", "data_wait_share", "mfu")
_LAYER = (
    "max_violation", "load_cv", "entropy_share", "entropy", "confidence", "num_dead", "experts_per_token",
    "without_expert", "drop_rate", "image_tokens",
)  # fmt: skip


def terms(run: Run) -> list[str]:
    """The balance losses in its log."""
    return [name for name in BALANCE_LOSSES if run.series(name)[0]]


def summarise(run: Run) -> dict[str, Any]:
    """One run as numbers."""
    steps = run.series("loss")[0]
    return {
        "label": run.label,
        "folder": str(run.path),
        "stage": run.stage,
        "status": run.status,
        "last_step": run.rows[-1]["step"],
        "planned_steps": run.planned_steps,
        "rows": len(run.rows),
        "first_loss": run.series("loss")[1][0] if steps else None,
        "at_the_end": {key: value for key in (*_FINAL, *terms(run)) if (value := final(run, key)) is not None},
        "median": {key: statistics.median(v) for key in _TYPICAL if (v := run.series(key)[1])},
        "peak_memory_gib": max(run.series("peak_memory_gib")[1], default=None),
        "layers": {site: _layer(run, site) for site in run.sites},
        "alarms": alarms(run),
    }


def final(run: Run, *keys: str) -> float | None:
    """The mean of a number at the end; None where the log has it nowhere."""
    values = run.series(*keys)[1]
    if not values:
        return None
    tail = values[-max(1, math.ceil(len(values) / 10)) :]
    return sum(tail) / len(tail)


def final_list(run: Run, *keys: str) -> list[float | None] | None:
    """The same for a list of numbers; an entry that is null in all these rows stays so."""
    lists = run.lists(*keys)[1]
    if not lists:
        return None
    tail = lists[-max(1, math.ceil(len(lists) / 10)) :]
    columns = [[v for v in column if v is not None] for column in zip(*tail, strict=True)]
    return [sum(column) / len(column) if column else None for column in columns]


def _layer(run: Run, site: str) -> dict[str, Any]:
    found: dict[str, Any] = {key: value for key in _LAYER if (value := final(run, "layers", site, key)) is not None}
    for key in ("load", "image_share"):
        values = final_list(run, "layers", site, key)
        if values is not None:
            found[key] = values
    found["dead_in_last_row"] = run.rows[-1].get("layers", {}).get(site, {}).get("dead", [])
    return found


def alarms(run: Run) -> list[dict[str, Any]]:
    """Of each kind and site: the record as it was last, first and last step, and how often it began."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in run.alarms:
        key = (record["alarm"], record.get("site"), record.get("loss"))
        known = found.setdefault(key, {"first_step": record["step"], "times": 0})
        known |= {**{k: v for k, v in record.items() if k != "step"}, "last_step": record["step"]}
        known["times"] += 1
    return list(found.values())


def as_markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A short text for people."""
    lines = ["# Training runs", ""]
    keys = list(dict.fromkeys(key for s in summaries for key in s["at_the_end"]))
    speed = list(dict.fromkeys(key for s in summaries for key in s["median"]))
    titles = ["run", "stage", "status", *(f"{key.replace('_', ' ')} (end)" for key in keys)]
    titles += [f"{key.replace('_', ' ')} (median)" for key in speed]
    cells = [
        [s["label"], s["stage"], s["status"], *(_cell(s["at_the_end"].get(k)) for k in keys)]
        + [_cell(s["median"].get(k)) for k in speed]
        for s in summaries
    ]
    lines += _table(titles, cells)
    for summary in summaries:
        lines += ["", f"## {summary['label']}", "", *_alarm_lines(summary["alarms"])]
        if summary["layers"]:
            columns = [key for key in _LAYER if any(key in layer for layer in summary["layers"].values())]
            rows = [
                [site, *(_cell(layer.get(key)) for key in columns), ", ".join(map(str, layer["dead_in_last_row"]))]
                for site, layer in summary["layers"].items()
            ]
            lines += ["", "Routing at the end, by layer:", ""]
            lines += _table(["layer", *(key.replace("_", " ") for key in columns), "dead experts"], rows)
    return "\n".join(lines) + "\n"


def _alarm_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return ["No alarm."]
    return ["Alarms:", "", *(f"- {in_words(record)}" for record in found)]


def in_words(record: Mapping[str, Any]) -> str:
    """One alarm as a sentence."""
    where = f" in layer {record['site']}" if record.get("site") is not None else ""
    where += f", experts {', '.join(map(str, record['experts']))}" if record.get("experts") else ""
    where += f" of balance.losses.{record['loss']}" if record.get("loss") else ""
    times = f", {record['times']} times up to step {record['last_step']}" if record["times"] > 1 else ""
    return (
        f"{record['alarm'].replace('_', ' ')}{where}: {record['what']} {_cell(record['value'])} "
        f"(limit {_cell(record['limit'])}) at step {record['first_step']}{times}. Advice: {record['advice']}"
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" if _is_numbers(column) else "---" for column in list(zip(*rows, strict=True))[1:])]
    return [f"| {' | '.join(row)} |" for row in (titles, rule, *rows)]


def _is_numbers(column: Sequence[str]) -> bool:
    return all(not cell or cell[0].isdigit() or cell[0] == "-" for cell in column)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
