"""Logs of runs that never were: what a run writes into its folder, made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ALARM: dict[str, Any] = {
    "alarm": "imbalance", "site": "2", "what": "largest violation", "value": 0.9, "limit": 0.85, "lines": 5,
    "advice": "raise balance.losses.switch (now 0.01)", "collapse": True,
}  # fmt: skip


def layer(step: int, site: int, experts: int, steps: int) -> dict[str, Any]:
    """A layer whose first expert is drawn to pictures, and whose last one dies in the second half."""
    tilt = step / steps
    weights = [1 + 0.3 * math.sin(e + step / 40 + site) for e in range(experts)]
    weights[-1] *= 0.02 if tilt > 0.5 and site == 2 else 1.0
    load = [w / sum(weights) for w in weights]
    dead = [e for e, f in enumerate(load) if f < 0.1 / experts]
    images = [min(0.95, 0.5 + 0.4 * tilt) if e == 0 else 0.5 - 0.3 * tilt * (e % 2) for e in range(experts)]
    return {
        "load": [round(f, 5) for f in load],
        "max_violation": round(max(load) * experts - 1, 5),
        "load_cv": 0.3,
        "num_dead": len(dead),
        "num_unused": 0,
        **({"dead": dead} if dead else {}),
        "experts_per_token": 2.0,
        "entropy": round(math.log(experts) * (1 - 0.5 * tilt), 5),
        "entropy_share": round(1 - 0.5 * tilt, 5),
        "confidence": round(0.5 + 0.3 * tilt, 5),
        "drop_rate": round(0.1 * (1 - tilt), 5),
        "image_tokens": 0.55,
        "image_share": images,
        "losses": {"switch": 1 + 0.01 * site, "z": 0.5},
    }


def rows(
    steps: int = 400, every: int = 10, sites: tuple[int, ...] = (0, 2, 4), experts: int = 4
) -> list[dict[str, Any]]:
    """As `metrics.jsonl` has them; without sites, of a dense run."""
    found = []
    for step in range(every, steps + 1, every):
        noise = 0.1 * math.sin(7.3 * step)
        row: dict[str, Any] = {
            "step": step,
            "epoch": step / steps,
            "loss": 3 * math.exp(-step / 100) + 0.5 + noise,
            "cross_entropy": 3 * math.exp(-step / 100) + 0.49 + noise,
            **({"switch": 1.02, "z": 0.5} if sites else {}),
            "grad_norm": 1 + noise,
            "learning_rate": {"projector": 1e-3 * (1 - step / steps), "experts": 2e-4 * (1 - step / steps)},
            "seconds_per_step": 0.5 + 0.05 * noise,
            "pause": 0.0,
            "tokens_per_second": 2500 + 100 * noise,
            "useful_tokens": 0.95,
            "label_tokens": 500,
            "samples": 16 * step,
            "tokens": 1200 * step,
            "data_wait": 0.01,
            "data_wait_share": 0.02,
            "tflops": None,
            "mfu": None,
            "peak_memory_gib": 3.2,
        }
        if step % 100 == 0:
            row["scores"] = {"local_gqa": {"accuracy": 0.3 + step / 1000}}
        if sites:
            row["layers"] = {str(site): layer(step, site, experts, steps) for site in sites}
        found.append(row)
    return found


def old(row: dict[str, Any]) -> dict[str, Any]:
    """The same row as versions before 0.2 wrote it."""
    kept = {key: row[key] for key in ("step", "loss", "grad_norm", "seconds_per_step", "cross_entropy")}
    kept["learning_rate"] = row["learning_rate"]["projector"]
    if "layers" in row:
        keys = ("load", "max_violation", "entropy")
        kept["layers"] = {site: {key: found[key] for key in keys} for site, found in row["layers"].items()}
        kept["switch"] = row["switch"]
    return kept


def write_run(
    folder: Path, log: list[dict[str, Any]], *, name: str = "metrics.jsonl", finished: bool = True, steps: int = 400
) -> Path:
    """A run's folder with these rows."""
    folder.mkdir(parents=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "recipe.yaml").write_text(f"stage: {{name: {folder.name}-stage}}\ntrain: {{max_steps: {steps}}}\n")
    if finished:
        (folder / "done.json").write_text(json.dumps({"stage": f"{folder.name}-stage", "steps": steps}))
    return folder
