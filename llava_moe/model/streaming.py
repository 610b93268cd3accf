"""Checkpoints tensor by tensor: a reader and a writer of safetensors that hold one tensor in memory at a time.

The library's own writer takes all tensors of a file at once, and its reader maps whole files, whose pages count as
memory of the process once they were touched. A program that makes a checkpoint of 90 GB on a machine of 16 GB needs
other ones. The format of a file: 8 bytes, the length of the header, little-endian; the header, a JSON mapping of names
to dtype, shape and place; the bytes of the tensors.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llava_moe.model.modeling import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_CHUNK = 8 << 20
_ALIGNMENT = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor besides its place."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor) -> TensorInfo:
        """That of a tensor, which may be on the meta device."""
        return TensorInfo(tensor.dtype, tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU; of a copy where it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's model, as transformers chooses them; other safetensors may lie beside them.

    Raises:
        CheckpointError: there are none.
    """
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    index = path / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


class CheckpointReader:
    """The tensors of a checkpoint directory by their names on disk, in the order of its files; nothing is kept.

    Raises:
        CheckpointError: a file is missing or damaged, or holds a dtype that is not known here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.infos: dict[str, TensorInfo] = {}
        self.file_sizes: list[int] = []
        self._places: dict[str, _Place] = {}
        for file in weight_files(self.path):
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        try:
            size = file.stat().st_size
            with file.open("rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > size:
                    raise ValueError("the header is longer than the file")
                header: dict[str, Any] = json.loads(handle.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{file}: damaged or missing ({error}); copy or write it again") from error
        self.file_sizes.append(size)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"{file}: {name} is of the dtype {entry['dtype']}, which is not supported")
            start, end = entry["data_offsets"]
            info = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if end - start != info.nbytes or 8 + length + end > size:
                raise CheckpointError(f"{file}: {name} does not fit into the file, which is cut short or damaged")
            self.infos[name] = info
            self._places[name] = _Place(file, 8 + length + start)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def float32_bytes(self) -> int:
        """What they take in memory as float32."""
        return sum(4 * math.prod(info.shape) for info in self.infos.values())

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        info, place = self.infos[name], self._places[name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        with place.file.open("rb") as handle:
            handle.seek(place.offset)
            if handle.readinto(buffer.numpy().data) != info.nbytes:
                raise CheckpointError(f"{place.file}: {name} is cut short; copy or write the file again")
        return buffer.view(info.dtype).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, a few MiB at a time."""
        left, place = self.infos[name].nbytes, self._places[name]
        with place.file.open("rb") as handle:
            handle.seek(place.offset)
            while left:
                chunk = handle.read(min(_CHUNK, left))
                if not chunk:
                    raise CheckpointError(f"{place.file}: {name} is cut short; copy or write the file again")
                left -= len(chunk)
                yield chunk


@dataclass
class _Shard:
    """One file to write: where each tensor goes, and which are still to come."""

    file: Path
    header: bytes
    offsets: dict[str, int]
    pending: set[str]
    handle: BinaryIO | None = None


class CheckpointWriter:
    """Writes a checkpoint of known names, dtypes and shapes, tensor after tensor in any order.

    Args:
        folder: exists already.
        infos: everything that will be written; tensors that follow each other come into the same file.
        max_shard_bytes: a file is at most this large, unless a single tensor is larger.

    Attributes:
        nbytes: of all tensors.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.infos = dict(infos)
        self.nbytes = sum(info.nbytes for info in self.infos.values())
        self._shards: dict[str, _Shard] = {}
        groups = _split(self.infos, max_shard_bytes)
        for number, names in enumerate(groups, start=1):
            single = len(groups) == 1
            file = folder / (SINGLE_FILE if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors")
            header, offsets = _header({name: self.infos[name] for name in names})
            shard = _Shard(file, header, offsets, set(names))
            self._shards.update(dict.fromkeys(names, shard))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing flushes; where writing has failed already, a second failure must not hide the first.
        with suppress(OSError) if kind is not None else nullcontext():
            for shard in self._files():
                if shard.handle is not None:
                    shard.handle.close()
        if kind is None:
            self._finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor.

        Raises:
            ValueError: it was written before, or is not what was announced.
            CheckpointError: the disk is full.
        """
        if TensorInfo.of(tensor) != self.infos[name]:
            raise ValueError(f"{name} is {TensorInfo.of(tensor)}, but {self.infos[name]} was announced")
        raw = bytes_of(tensor.cpu())
        self._put(name, (raw[start : start + _CHUNK] for start in range(0, len(raw), _CHUNK)))

    def copy(self, name: str, reader: CheckpointReader, source: str | None = None) -> None:
        """Copies the bytes of a tensor of another checkpoint, there under the name `source`."""
        source = name if source is None else source
        if reader.infos[source] != self.infos[name]:
            raise ValueError(f"{name}: {source} is {reader.infos[source]}, but {self.infos[name]} was announced")
        self._put(name, reader.chunks(source))

    def _put(self, name: str, chunks: Iterator[bytes | memoryview]) -> None:
        shard = self._shards[name]
        if name not in shard.pending:
            raise ValueError(f"{name} was written twice")
        with clear_when_full(self.folder, self.nbytes):
            if shard.handle is None:
                shard.handle = shard.file.open("wb")
                shard.handle.write(shard.header)
            shard.handle.seek(shard.offsets[name])
            for chunk in chunks:
                shard.handle.write(chunk)
            shard.pending.remove(name)
            if not shard.pending:
                shard.handle.close()

    def _files(self) -> list[_Shard]:
        return list({id(shard): shard for shard in self._shards.values()}.values())

    def _finish(self) -> None:
        pending = [name for shard in self._files() for name in sorted(shard.pending)]
        if pending:
            raise ValueError(f"{len(pending)} tensors were announced and not written: {pending[:4]}")
        if len(self._files()) == 1:
            return
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(info.shape) for info in self.infos.values()),
                "total_size": self.nbytes,
            },
            "weight_map": {name: self._shards[name].file.name for name in sorted(self.infos)},
        }
        with clear_when_full(self.folder, self.nbytes):
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _split(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names in groups of at most `max_bytes`, in their order."""
    groups: list[list[str]] = []
    size = 0
    for name, info in infos.items():
        if not groups or size + info.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += info.nbytes
    return groups


def _header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where each tensor begins in it."""
    # Wide dtypes first: the library refuses a tensor that does not begin at a multiple of its item size.
    ordered = sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name, info in ordered:
        offsets[name] = position
        position += info.nbytes
        entries[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[name], position],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in offsets.items()}


@contextmanager
def clear_when_full(folder: Path, needed: int) -> Iterator[None]:
    """Turns a full disk into one line.

    Raises:
        CheckpointError: the disk, or the quota, was full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{folder.parent}: the disk is full; the checkpoint takes {needed / 1e9:.1f} GB. Nothing was left behind"
        ) from error


def check_space(target: Path, needed: int) -> None:
    """Looks for room before anything is written.

    Raises:
        CheckpointError: the disk of `target` has less than `needed` bytes left.
    """
    existing = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{target}: the checkpoint takes {needed / 1e9:.1f} GB and only {free / 1e9:.1f} GB are free there"
        )
