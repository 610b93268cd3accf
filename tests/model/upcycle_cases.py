"""What the upcycling tests share: recipes' sections with one part, samples that are read, and names on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_moe.calibration import calibration_batches
from llava_moe.config import NamedSection, PartSection, UpcycleSection
from llava_moe.model.streaming import CheckpointReader
from llava_moe.model.upcycling import upcycle
from tests.tiny_model import tiny_processor

DECODER = "model.language_model.layers.{}.mlp"


def section(parent: Path, part: str = "decoder", calibration: Any = None, seed: int = 0, **changes: Any) -> Any:
    """A section with one part."""
    for key in ("router", "experts", "upcycler"):
        if isinstance(changes.get(key), str):
            changes[key] = NamedSection(changes[key])
    made = UpcycleSection(parent=str(parent), seed=seed, calibration=calibration)
    setattr(made, part, PartSection(**changes))
    return made


def named(name: str, **args: Any) -> NamedSection:
    return NamedSection(name, args)


def run(made: UpcycleSection, out: Path, **options: Any) -> dict[str, Any]:
    """Upcycles with the samples of the section."""
    if made.calibration is not None:
        batches = calibration_batches(made.calibration, made.parent)
        options["samples"] = lambda: batches
    return upcycle(made, out, **options)


def on_disk(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in CheckpointReader(path).infos.items()}


def processor(folder: Path) -> None:
    """Adds the tiny processor to a checkpoint."""
    tiny_processor().save_pretrained(folder)
