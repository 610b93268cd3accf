"""The mirror: what is refused before compute, and that reading from it leaves no trace."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest

from llava_moe.evaluation import EvaluationError, mirror
from llava_moe.evaluation.mirror import File, Recorded
from llava_moe.evaluation.suites import Source
from tests.evaluation.imitations import gqa, mme, pope
from tests.evaluation.imitations_files import write

GQA = "lmms-lab-encoder/GQA"
IMAGES = "testdev_balanced_images"
IMAGE_FILE = f"{IMAGES}/testdev-00000-of-00001.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for imitation in (gqa(), mme(), pope()):
        write(tmp_path / "mirror", imitation)
    return tmp_path / "mirror"


def recorded(folder: Path, rows: int = 4, size: int | None = None) -> Recorded:
    real = (folder / GQA / IMAGE_FILE).stat().st_size
    files = {IMAGE_FILE: File(real if size is None else size, "0" * 64)}
    record = Recorded("a" * 40, "hub", "mit", "2026-01-01T00:00:00+00:00", files, {IMAGES: {"testdev": rows}})
    mirror.write_manifest(folder, {GQA: record})
    return record


def test_a_mirror_made_by_hand_serves_what_it_holds(folder: Path) -> None:
    found = mirror.check(folder, ["gqa", "pope", "pope_first_sentence", "local_gqa"])
    assert [(one.task, str(one.source), one.rows, one.revision) for one in found] == [
        ("gqa", f"{GQA}/testdev_balanced_instructions/testdev", 6, None),
        ("gqa", f"{GQA}/{IMAGES}/testdev", 4, None),
        ("pope", "lmms-lab-encoder/POPE/test", 8, None),
        ("pope_first_sentence", "lmms-lab-encoder/POPE/test", 8, None),
    ]
    assert mirror.holds(folder, "gqa")
    assert not mirror.holds(folder, "ai2d")
    assert mirror.holds(folder, "local_gqa")


def test_the_record_is_written_read_and_compared(folder: Path) -> None:
    record = recorded(folder)
    assert mirror.read_manifest(folder) == {GQA: record}
    assert [one.revision for one in mirror.check(folder, ["gqa"])] == ["a" * 40] * 2
    recorded(folder, rows=5)
    with pytest.raises(EvaluationError, match=rf"'gqa', {GQA}/{IMAGES}/testdev: the split has 4 rows, .* says 5"):
        mirror.check(folder, ["gqa"])
    recorded(folder, size=7)
    with pytest.raises(EvaluationError, match=r"testdev-00000-of-00001.parquet has \d+ bytes, mirror.json says 7"):
        mirror.check(folder, ["gqa"])


def test_all_that_is_missing_is_said_at_once_with_the_command(folder: Path) -> None:
    with pytest.raises(EvaluationError) as error:
        mirror.check(folder, ["gqa", "ai2d", "textvqa_val", "textvqa_val_ocr"])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("task 'ai2d', lmms-lab-encoder/ai2d/test: ")
    assert lines[2].startswith("task 'textvqa_val', lmms-lab-encoder/textvqa/validation: ")
    tasks = "ai2d textvqa_val textvqa_val_ocr"
    assert lines[3] == f"bash scripts/prepare_benchmarks.sh {tasks} --mirror {folder}"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"is not a folder; make it: bash .*sh gqa mme --mirror '.*/no such'"):
        mirror.check(tmp_path / "no such", ["gqa", "mme"])


def test_the_former_name_of_the_organisation_is_told(folder: Path) -> None:
    (folder / "lmms-lab-encoder").rename(folder / "lmms-lab")
    with pytest.raises(EvaluationError, match=r"only lmms-lab/MME is there; `ln -s lmms-lab .*/lmms-lab-encoder`"):
        mirror.check(folder, ["mme"])
    (folder / "lmms-lab-encoder").symlink_to("lmms-lab")
    assert mirror.check(folder, ["mme"])[0].rows == 8


def edit_card(place: Path, old: str, new: str) -> None:
    card = place / "README.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda place: (place / IMAGE_FILE).write_bytes(b"PAR1 cut"), "cannot be read as parquet"),
        (lambda place: (place / IMAGE_FILE).unlink(), "files that its README.md names are missing"),
        (lambda place: (place / "README.md").unlink(), "cannot be read: .*testdev_balanced"),
        (lambda place: edit_card(place, "testdev\n", "other\n"), "has no split 'testdev' .it has: other"),
        (lambda place: edit_card(place, "num_examples: 4", "num_examples: 5"), "has 4 rows, README.md states 5"),
        (lambda place: edit_card(place, "name: testdev\n", "name: x\n"), "states the splits x, but has testdev"),
        (lambda place: shutil.rmtree(place / IMAGES), "cannot be read"),
    ],
)
def test_a_broken_snapshot_is_named(folder: Path, break_it: object, message: str) -> None:
    assert callable(break_it)
    break_it(folder / GQA)
    with pytest.raises(EvaluationError, match=message) as error:
        mirror.check(folder, ["gqa"])
    assert "task 'gqa', lmms-lab-encoder/GQA/testdev_balanced_" in str(error.value)


@pytest.mark.parametrize("content", ["{", '{"version": 2, "datasets": {}}', '{"version": 1}', "[]"])
def test_a_broken_record_is_named(folder: Path, content: str) -> None:
    (folder / "mirror.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"mirror.json cannot be read .*; delete it"):
        mirror.check(folder, ["mme"])


def test_tasks_outside_the_catalogue_are_found_in_their_files() -> None:
    assert mirror.sources_of("chartqa") == (Source("lmms-lab-encoder/ChartQA", None, "test"),)
    assert mirror.sources_of("local_pope") == ()
    with pytest.raises(EvaluationError, match="'chartqaa' reads is not known"):
        mirror.sources_of("chartqaa")


def state() -> tuple[object, ...]:
    constants = (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", mirror.CACHE_VARIABLE)
    return Path.cwd(), constants, datasets.config.HF_DATASETS_CACHE, [os.environ.get(name) for name in names]


def test_reading_from_it_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    before = state()
    with mirror.offline(folder, cache=tmp_path / "arrow"):
        assert state() == (
            folder,
            (True, True),
            tmp_path / "arrow",
            ["1", "1", str(tmp_path / "arrow")],
        )
    assert state() == before
    with pytest.raises(FileNotFoundError), mirror.offline(folder):
        Path("no such file").read_text()
    assert state() == before


def test_the_cache_of_the_user_holds_for_every_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(mirror.CACHE_VARIABLE, str(tmp_path / "mine"))
    with mirror.offline(folder):
        assert state()[2] == tmp_path / "mine"
    assert os.environ[mirror.CACHE_VARIABLE] == str(tmp_path / "mine")


def test_a_relative_name_is_read_from_the_mirror_without_token(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with mirror.offline(folder, cache=tmp_path / "arrow"):
        rows = datasets.load_dataset("lmms-lab-encoder/MME", token=True)["test"]
        with pytest.raises((ConnectionError, FileNotFoundError)):
            datasets.load_dataset("lmms-lab-encoder/ai2d", token=True)
    assert len(rows) == 8
    assert rows.features["image"] == datasets.Image()
