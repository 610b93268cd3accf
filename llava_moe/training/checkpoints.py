"""Training checkpoints: written whole or not at all, and recognised as whole.

A checkpoint is written into `<output_dir>/checkpoint.partial`, and takes its name `checkpoint-N` by one rename when
every rank has written its files, they have reached the disk, and `complete.json` lists them with their sizes. So a kill
at any moment leaves the checkpoints that were there; older ones are deleted after that rename, never before. The list
also finds what a power loss, a full disk or a careless copy has cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_moe.config import RecipeError, RunConfig
from llava_moe.training import distributed

MANIFEST = "complete.json"
PARTIAL = "checkpoint.partial"
_DISCARDED = "checkpoint.deleted"
_TRAINER_STATE = "trainer_state.json"
_BATCH_KEYS = {"train.per_device_train_batch_size", "train.gradient_accumulation_steps"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What writers that hide the errno say: safetensors (Rust), torch's zip writer.
_FULL_WORDS = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter failed", "inline_container")


class SaveError(ValueError):
    """Something could not be written; the message names it and what is still there."""


@dataclass(frozen=True)
class Layout:
    """How a step was divided when a checkpoint was written.

    Attributes:
        world_size: ranks.
        batch: samples of a micro-batch on a rank.
        accumulation: micro-batches of a step on a rank.
        sharded: whether ZeRO has divided the optimiser's state among the ranks.
    """

    world_size: int
    batch: int
    accumulation: int
    sharded: bool

    @property
    def samples(self) -> int:
        """Samples of one step on all ranks."""
        return self.world_size * self.batch * self.accumulation

    def __str__(self) -> str:
        parts = f"{self.batch} x {self.accumulation} x {self.world_size}"
        return f"{self.samples} = {parts} (per device x accumulation x ranks)"


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """That of a run which is about to start."""
    batch = config.train.get("per_device_train_batch_size", 8)  # transformers' default
    return Layout(world_size, batch, config.train.get("gradient_accumulation_steps", 1), zero_stage(config) > 0)


def zero_stage(config: RunConfig) -> int:
    """0 without DeepSpeed."""
    if config.deepspeed is None:
        return 0
    return int(json.loads(Path(config.deepspeed).read_text()).get("zero_optimization", {}).get("stage", 0))


def recorded_layout(checkpoint: Path) -> Layout | None:
    """That of a checkpoint; None if an earlier version of this program wrote it."""
    manifest = _read(checkpoint / MANIFEST)
    return None if manifest is None else Layout(**manifest["layout"])


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that belongs to the checkpoint is there in its full size.

    Earlier versions wrote no list; of theirs trainer_state.json is the last file to be written.
    """
    if not (checkpoint / MANIFEST).exists():
        return _read(checkpoint / _TRAINER_STATE) is not None
    manifest = _read(checkpoint / MANIFEST)
    if manifest is None or _read(checkpoint / _TRAINER_STATE) is None:
        return False
    for name, size in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            return False
    return True


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def last_whole_checkpoint(out: Path) -> Path | None:
    """The newest `checkpoint-N` that was written to its end."""
    named = [path for path in out.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdecimal()]
    return next((path for path in sorted(named, key=step_of, reverse=True) if is_whole(path)), None)


def commit(partial: Path, final: Path, layout: Layout) -> None:
    """Gives a checkpoint its name; one rank calls it after all have written theirs.

    What callbacks have put under that name at the end of this step moves along.

    Raises:
        OSError: it could not be written to its end.
    """
    for path in final.iterdir() if final.is_dir() else ():
        if path.is_file() and not (partial / path.name).exists():
            path.rename(partial / path.name)
    (partial / MANIFEST).unlink(missing_ok=True)  # it does not list itself
    files = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)}
    manifest = {"layout": dataclasses.asdict(layout), "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    flush(partial)
    if final.exists():
        discard(final)  # what is whole is never written twice, so this one is not
    partial.rename(final)
    _flush_folder(final.parent)
    with contextlib.suppress(OSError):
        partial.parent.rmdir()


def flush(folder: Path) -> None:
    """Returns when the files of a folder have reached the disk; otherwise a power loss could leave empty ones."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it for folders
    finally:
        os.close(descriptor)


def keep_newest(out: Path, number: int | None) -> None:
    """Deletes all but the newest whole checkpoints; None or 0 keeps all. A cut one never counts."""
    if not number:
        return
    whole = sorted((path for path in out.glob("checkpoint-*") if is_whole(path)), key=step_of)
    for path in whole[:-number]:
        discard(path)


def discard(checkpoint: Path) -> None:
    """Deletes one; it loses its name first, so that a kill leaves nothing that could be taken for whole."""
    grave = checkpoint.with_name(_DISCARDED)
    shutil.rmtree(grave, ignore_errors=True)
    checkpoint.rename(grave)
    shutil.rmtree(grave)


def clear(out: Path, everything: bool = False) -> None:
    """Deletes what a kill left half written or half deleted; with `everything` the whole checkpoints too."""
    for name in (PARTIAL, _DISCARDED):
        shutil.rmtree(out / name, ignore_errors=True)
    if everything:
        for path in out.glob("checkpoint-*"):
            shutil.rmtree(path)


@contextlib.contextmanager
def writing(what: str, out: Path, *partial: Path) -> Iterator[None]:
    """Within it a failure to write removes the half-written folders and becomes one line.

    Raises:
        SaveError: the disk is full, or a quota or limit of the file system is reached.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)
        raise SaveError(
            f"{what} could not be written: {_last_line(error)} ({free_bytes(out) / 2**30:.2f} GiB free in {out}); "
            f"{describe_last(out)}; make room and start the run again"
        ) from error


def describe_last(out: Path) -> str:
    """Where a stopped run stands, in words."""
    last = last_whole_checkpoint(out)
    return "there is no checkpoint yet" if last is None else f"the last whole checkpoint is {last}"


def disk_is_full(error: BaseException) -> bool:
    """Whether this error, or one that caused it, says that nothing more can be written."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(words in str(seen) for words in _FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_layout(checkpoint: Path, now: Layout) -> None:
    """Whether a run with this layout can go on from a checkpoint.

    The order of the samples depends on the samples of a step alone, not on how they are divided, so the number of
    ranks may change as long as those stay.

    Raises:
        RecipeError: a step would have other samples.
    """
    then = recorded_layout(checkpoint)
    if then is None or then.samples == now.samples:
        return
    fitting = then.samples // (now.batch * now.world_size)
    mend = ""
    if fitting * now.batch * now.world_size == then.samples:
        mend = f"train.gradient_accumulation_steps={fitting}, or "
    raise RecipeError(
        f"{checkpoint} was written with steps of {then} samples, and this run would have {now}: it would meet other "
        f"samples; set {mend}NPROC={then.world_size}, or delete {checkpoint.parent} to start anew"
    )


def is_only_divided_otherwise(config: RunConfig, differing: list[str]) -> bool:
    """Whether a recipe differs from that of the run in its folder by nothing but the division of the same steps."""
    last = last_whole_checkpoint(Path(config.output_dir))
    if last is None or not set(differing) <= _BATCH_KEYS:
        return False
    then = recorded_layout(last)
    return then is not None and then.samples == layout_of(config, distributed.world_size()).samples


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where it is missing or cut."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
