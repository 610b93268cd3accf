"""The shipped recipes of stages with tiles, several images and videos, on tiny data and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llava_moe.cli import main
from llava_moe.config import load_recipe
from llava_moe.data.index import RecordIndex
from llava_moe.training import runner
from tests.tiny_families import write_family_checkpoint, write_mixed_json
from tests.training.runs import REPO, losses

RECIPES = {
    "llava_next_qwen2_7b/sft": "llava_next",
    "llava_onevision_qwen2_7b/single_image": "llava_onevision",
    "llava_onevision_qwen2_7b/onevision": "llava_onevision",
}


def with_videos(path: Path) -> Path:
    """Two more records, each a video as the list of its frames."""
    records = json.loads(path.read_text())
    for number, frames in enumerate((["0.png", "1.png", "2.png"], ["3.png"] * 40)):
        turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "a circle"}]
        records.append({"id": f"video-{number}", "video": frames, "conversations": turns})
    path.write_text(json.dumps(records))
    return path


def tiny(folder: Path, name: str) -> Path:
    """The recipe with another start point, other data and what a CPU can run; everything else is its own."""
    path, images = write_mixed_json(folder, 9)
    if name.endswith("/onevision"):
        with_videos(path)
    raw = {
        "base": str(REPO / f"scripts/recipes/{name}.yaml"),
        "output_dir": str(folder / "out"),
        "model": {"checkpoint": str(write_family_checkpoint(folder / "start", RECIPES[name])), "dtype": "float32"},
        "data": {"sources": [{"path": str(path), "image_folder": str(images)}]},
        "deepspeed": None,
        "train": {"bf16": False, "max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        | {"dataloader_num_workers": 0, "logging_steps": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("name", RECIPES)
def test_check_data_takes_the_recipe_as_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny(tmp_path, name)
    with pytest.raises(SystemExit) as stopped:
        main(["check-data", str(recipe), "--index", str(tmp_path / "index")])
    said = capsys.readouterr().out
    assert stopped.value.code == 0, said
    records = 11 if name.endswith("/onevision") else 9
    assert f"checked {records} records" in said
    index = RecordIndex(tmp_path / "index")
    assert (index.measure.max_length, index.measure.overlong) == (32768, "truncate")
    assert index.lengths is not None
    assert len(set(index.lengths.tolist())) > 3  # tiles of images of different sizes


def test_the_stage_with_videos_trains_on_them(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "llava_onevision_qwen2_7b/onevision")
    config = load_recipe(recipe)
    assert (config.data.num_frames, config.data.group_by_modality) == (32, True)
    runner.train(config)
    done = json.loads((tmp_path / "out/done.json").read_text())
    assert done["data"]["used"] == 11
    assert list(losses(tmp_path / "out")) == [1, 2]
