"""`llava-moe check-data` as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llava_moe.cli import main
from llava_moe.data.index import RecordIndex
from tests.tiny import write_llava_json


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["check-data", *map(str, arguments)])
    return int(stopped.value.code or 0)


def test_a_clean_file(dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, images = write_llava_json(tmp_path, 4)
    index = tmp_path / "index"
    options = ["--image-folder", images, "--processor", dense_checkpoint, "--max-length", 99, "--index", index]
    assert run(path, *options) == 0
    said = capsys.readouterr().out
    assert "checked 4 records and 4 images: 4 can be used" in said
    assert "tokens: " in said
    assert "data.index=" in said
    assert json.loads((index / "report.json").read_text())["kept"] == 4
    assert RecordIndex(index).measure.max_length == 99


def test_problems_set_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, images = write_llava_json(tmp_path, 3)
    (images / "1.png").unlink()
    mixture = tmp_path / "m.yaml"
    mixture.write_text(yaml.safe_dump({"sources": [{"path": str(path), "image_folder": str(images)}]}))
    bench = ["--benchmark", f"pope={images}"]
    assert run(mixture, *bench) == 1
    said = capsys.readouterr().out
    assert "missing_image: 1 problem(s)" in said
    assert "left out: 1 missing_image" in said
    assert "pope (2 images): 2 uses of the same file (SHA-1)" in said


def test_a_recipe_brings_its_own_settings(
    dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, images = write_llava_json(tmp_path, 3)
    recipe = {
        "output_dir": str(tmp_path / "out"),
        "stage": {"name": "sft"},
        "model": {"checkpoint": str(dense_checkpoint)},
        "data": {"sources": [{"path": str(path), "image_folder": str(images)}], "max_length": 10},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert run(tmp_path / "r.yaml") == 1
    assert "overlong: 3 problem(s)" in capsys.readouterr().out
    assert run(tmp_path / "r.yaml", "--max-length", 99, "--index", tmp_path / "index") == 0
    assert len(RecordIndex(tmp_path / "index")) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.json"], "gone.json: no such data file"),
        (["gone.yaml"], "gone.yaml: no such mixture"),
        (["data.json", "--max-length", "9"], "max_length counts tokens: name the checkpoint"),
        (["data.json", "--benchmark", "pope"], "write NAME=PLACE"),
        (["m.yaml", "--image-folder", "x"], "--image-folder belongs to a single data file"),
        (["data.csv"], "what kind of data is this"),
    ],
)
def test_mistakes_end_with_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_llava_json(tmp_path, 1)
    for name in ("data.csv", "m.yaml"):
        (tmp_path / name).write_text("sources: []")
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
