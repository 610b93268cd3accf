"""Sources larger than memory: what is resident does not follow the size of the data."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_moe.data.checking import Limits, check_mixture
from llava_moe.data.indexed import IndexedDataset
from llava_moe.data.mixture import Mixture, SourceSpec
from tests.data.test_sources import png, turns, write_tar
from tests.tiny import tiny_siglip_processor

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
SCHEMA = [("id", pa.string()), ("image", pa.struct([("bytes", pa.binary())])), ("conversations", pa.list_(TURN))]
PROCESSOR = tiny_siglip_processor()


def resident() -> float:
    """MB of this process that are not pages of a file."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("reads /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def big_png() -> bytes:
    """A small picture in a file of 400 kB: what lies behind its end costs memory, and no time to decode."""
    return png(0) + np.random.default_rng(0).bytes(400_000)


def tar_of(path: Path, n: int) -> Path:
    data, members = big_png(), {}
    for index in range(n):
        members[f"{index:04}.json"] = json.dumps({"conversations": turns(f"answer {index}")}).encode()
        members[f"{index:04}.png"] = data
    return write_tar(path, members)


def parquet_of(path: Path, n: int) -> Path:
    """In row groups of two rows; written one by one, or the writer itself would hold them all."""
    data = big_png()
    with pq.ParquetWriter(path, pa.schema(SCHEMA), use_dictionary=False, compression="none") as writer:
        for start in range(0, n, 2):
            cells = [
                {"id": str(i), "image": {"bytes": data}, "conversations": turns(f"answer {i}")}
                for i in range(start, start + 2)
            ]
            writer.write_table(pa.Table.from_pylist(cells, schema=pa.schema(SCHEMA)))
    return path


class Peak(threading.Thread):
    """The most that is resident while something runs, above what was before, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self.over = resident(), 0.0, threading.Event()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(0.003):
            self.most = max(self.most, resident() - self.before)


@pytest.mark.parametrize(("make", "suffix"), [(tar_of, "tar"), (parquet_of, "parquet")])
def test_memory_does_not_follow_the_size(
    make: Callable[[Path, int], Path], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 MB are checked, and read in random order."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for size in (4, 400):  # the first one imports and allocates what every run does
        index = tmp_path / f"index-{size}"
        source = make(tmp_path / f"{size}.{suffix}", size)
        with Peak() as checking:
            mixture = Mixture((SourceSpec(str(source)),))
            report = check_mixture(mixture, processor=PROCESSOR, limits=Limits(64), index=index, workers=0)
        with Peak() as reading:
            data = IndexedDataset(index, PROCESSOR, 64)
            for place in np.random.default_rng(0).permutation(size):
                assert "pixel_values" in data[int(place)]
        assert (report.kept, report.images) == (size, size)
    assert source.stat().st_size > 150e6
    assert checking.most < 48
    assert reading.most < 48
