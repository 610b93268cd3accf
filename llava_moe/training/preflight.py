"""What is known to go wrong before compute is spent: image folders that cannot be read, a disk that is too small."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from llava_moe.config import RecipeError, RunConfig
from llava_moe.data.mixture import load_mixture
from llava_moe.data.records import open_plain
from llava_moe.data.schema import DataError
from llava_moe.training.checkpoints import SaveError, free_bytes, last_whole_checkpoint
from llava_moe.training.stage import count_trainable

_GIB = 2**30
_MOMENTS = 2  # AdamW's; other optimisers keep less, and a full disk costs more than a wrong estimate


def check_image_folders(config: RunConfig) -> None:
    """Looks whether the image folder of every source is a folder that can be read.

    Raises:
        RecipeError: names the folder and the key of its source.
    """
    for key, source in _sources(config):
        folder = source.image_folder
        if folder is None:
            continue
        problem = _problem(Path(folder))
        if problem == "does not exist" and not _has_visuals(Path(source.path)):
            continue  # text alone, which needs no folder
        if problem is not None:
            raise RecipeError(f"{key}.image_folder: {folder} {problem}; it is what the images of {source.path} are in")


def _sources(config: RunConfig) -> list[tuple[str, Any]]:
    if config.data.index is not None:
        return []  # was checked where it was written
    if config.data.mixture is not None:
        listed = load_mixture(config.data.mixture, config.seed).sources
        return [(f"{config.data.mixture}: sources[{i}]", source) for i, source in enumerate(listed)]
    return [(f"data.sources[{i}]", source) for i, source in enumerate(config.data.sources)]


def _problem(folder: Path) -> str | None:
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is a file and no folder"
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if os.access(folder, os.X_OK) else "cannot be read (its files may not be opened)"


def _has_visuals(path: Path) -> bool:
    """Whether any record of a LLaVA file has an image or a video; True for kinds of files that are not read here.

    One record at a time is in memory, and the first one that has settles it.
    """
    if path.suffix not in (".json", ".jsonl"):
        return True
    readers, _ = open_plain([(path, Path())])
    try:
        records = (reader.read(locator).fields for reader in readers for locator in reader.scan())
        return any(record.get(key) not in (None, []) for record in records for key in ("image", "video"))
    except DataError:
        return False  # the check of the records says it better


def checkpoint_bytes(trainer: Any) -> int:
    """About how large a checkpoint will be: weights and optimiser state.

    DeepSpeed writes the weights twice (as transformers and as the engine wants them), and float32 master weights where
    it trains in another type.
    """
    model = trainer.model
    weights = model_bytes(trainer, saved=True)
    trainable = count_trainable(model)
    if not trainer.is_deepspeed_enabled:
        size = max((p.element_size() for p in model.parameters() if p.requires_grad), default=4)
        return weights + _MOMENTS * size * trainable
    engine = weights if not trainer.args.bf16 else weights // 2
    return weights + engine + (_MOMENTS + 1) * 4 * trainable


def model_bytes(trainer: Any, saved: bool = False) -> int:
    """Of the weights in memory, frozen ones too; with `saved` of those that a checkpoint holds, see `lora.py`."""
    names = trainer.model.saved_names() if saved and trainer.model.saved_names is not None else None
    return sum(
        int(getattr(p, "full_numel", getattr(p, "ds_numel", p.numel()))) * p.element_size()
        for name, p in trainer.model.named_parameters()
        if names is None or name in names
    )


def check_space(trainer: Any, out: Path) -> None:
    """Holds what a checkpoint and the final model need against the room on the disk.

    Raises:
        SaveError: not even one checkpoint and the model would fit.
    """
    saves = str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)) != "no"
    one = checkpoint_bytes(trainer) if saves else 0
    model, free = model_bytes(trainer), free_bytes(out)
    # A run that goes on has room for what it replaces only after the new one is written: nothing is taken off.
    if one + model > free:
        raise SaveError(
            f"output_dir: {out} has {free / _GIB:.2f} GiB free, but a checkpoint of this run takes about "
            f"{one / _GIB:.2f} GiB and the final model {model / _GIB:.2f}; make room, or choose another output_dir"
        )
    most = _num_checkpoints(trainer, out) if saves else 0
    if most * one + model > free:
        print(
            f"train: the disk of {out} may become full: {most} checkpoints of about {one / _GIB:.2f} GiB and the model "
            f"need {(most * one + model) / _GIB:.2f} GiB, and {free / _GIB:.2f} are free; train.save_total_limit=1 "
            "keeps one",
            flush=True,
        )


def _num_checkpoints(trainer: Any, out: Path) -> int:
    """The most that will lie there at a time from now on, the one that is being written included."""
    steps = trainer.args.max_steps if trainer.args.max_steps > 0 else math.inf
    every = trainer.args.save_steps if trainer.args.save_steps >= 1 else 1
    last = last_whole_checkpoint(out)
    done = 0 if last is None else json.loads((last / "trainer_state.json").read_text())["global_step"]
    planned = math.ceil((steps - done) / every) if steps < math.inf else 1
    kept = trainer.num_kept
    return max(1, planned if not kept else min(planned, kept + 1))
