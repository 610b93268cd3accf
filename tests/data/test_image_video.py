import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_moe.data.image_video import frame_indices, load_frames
from llava_moe.data.schema import DataError


def frame_files(folder: Path, number: int) -> list[Path]:
    files = [folder / f"{index:03}.png" for index in range(number)]
    for index, file in enumerate(files):
        Image.new("RGB", (2, 2), (index, 0, 0)).save(file)
    return files


@pytest.mark.parametrize("total", [1, 2, 3, 7, 31, 32, 33, 100, 1001])
@pytest.mark.parametrize("wanted", [1, 2, 3, 8, 32])
def test_frames_are_taken_at_equal_distances(total: int, wanted: int):
    found = frame_indices(total, wanted)
    if total <= wanted:
        assert found == list(range(total))
    elif wanted > 1:
        # a quotient that is whole may come out of floating point as a hair less, and lose its last frame
        assert found == np.floor(np.linspace(0, total - 1, wanted) + 1e-9).astype(int).tolist()
        assert (found[0], found[-1]) == (0, total - 1)
    else:
        assert found == [0]


def test_frame_files_are_sampled_in_their_order(tmp_path: Path):
    files = frame_files(tmp_path, 7)
    assert [frame.getpixel((0, 0))[0] for frame in load_frames(files, 3, "r1")] == [0, 3, 6]
    assert [frame.getpixel((0, 0))[0] for frame in load_frames(files[::-1], 8, "r1")] == [6, 5, 4, 3, 2, 1, 0]


def test_what_cannot_be_shown_names_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match=r"'r1'.*no frame files"):
        load_frames([], 3, "r1")
    with pytest.raises(DataError, match=r"'r1'.*gone.png does not exist"):
        load_frames([tmp_path / "gone.png"], 3, "r1")
    with pytest.raises(DataError, match=r"'r1'.*gone.mp4 does not exist"):
        load_frames(tmp_path / "gone.mp4", 3, "r1")
    for total, wanted in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"{wanted} frame.* of {total}"):
            frame_indices(total, wanted)
    (tmp_path / "film.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"'r1'.*film.mp4 is a video file.*needs PyAV.*pip install av"):
        load_frames(tmp_path / "film.mp4", 3, "r1")


def test_video_files_are_decoded_where_pyav_is_installed(tmp_path: Path):
    av = pytest.importorskip("av")
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for index in range(9):
            frame = av.VideoFrame.from_image(Image.new("RGB", (16, 16), (20 * index, 0, 0)))
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    assert [frame.getpixel((3, 3)) for frame in load_frames(path, 3, "r1")] == [(0, 0, 0), (80, 0, 0), (160, 0, 0)]
    assert len(load_frames(path, 20, "r1")) == 9
    path.write_bytes(b"no film")
    with pytest.raises(DataError, match=r"'r1'.*film.mkv cannot be decoded"):
        load_frames(path, 3, "r1")
