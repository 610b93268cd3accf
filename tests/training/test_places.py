"""Data that a recipe names and this machine does not have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from llava_moe.config import RecipeError, load_recipe
from llava_moe.training import places, runner
from llava_moe.training.places import dry_lines, missing_places
from tests.tiny import write_llava_json
from tests.training.runs import REPO, make_config


def test_a_missing_file_is_one_line_with_its_key_and_the_mend(dense_checkpoint: Path, tmp_path: Path) -> None:
    path, images = write_llava_json(tmp_path / "data", 2)
    sources = [
        {"path": str(path), "image_folder": str(images)},
        {"path": str(tmp_path / "CuMo/jsons/cumo_pft_allava.json"), "image_folder": str(images)},
        {"path": str(tmp_path / "shards/*.tar"), "image_folder": None},
    ]
    config = make_config(tmp_path, dense_checkpoint, (path, images), data={"sources": sources})
    with pytest.raises(RecipeError) as caught:
        runner.train(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        r"data\.sources\[1\]\.path: \S+allava\.json: no such data file; docs/data\.md, .*CuMo.*", lines[0]
    )
    assert re.fullmatch(r"data\.sources\[2\]\.path: \S+\*\.tar: no such data file; docs/data\.md .*", lines[1])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").touch()
    assert [line[:15] for line in missing_places(config)] == ["data.sources[1]"]


def test_mixtures_and_indexes_are_looked_for_too(dense_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 2)
    gone = {"sources": [], "mixture": str(tmp_path / "m.yaml")}
    config = make_config(tmp_path / "a", dense_checkpoint, data, data=gone)
    assert missing_places(config) == [f"data.mixture: {tmp_path}/m.yaml: no such file; {places.WHERE}"]
    listed = {"sources": [{"path": str(data[0]), "image_folder": str(tmp_path / "none")}]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(listed))
    found = missing_places(config)
    assert [line.split(": ")[1] for line in found] == ["sources[0].image_folder"]
    assert missing_places(config, folders=False) == []
    index = {"sources": [], "index": str(tmp_path / "index")}
    config = make_config(tmp_path / "b", dense_checkpoint, data, data=index)
    with pytest.raises(RecipeError, match=r"data\.index: .*llava-moe check-data writes one"):
        runner.train(config)


def test_every_recipe_names_data_that_the_documentation_knows() -> None:
    """Read as text: to load some fifty recipes takes seconds."""
    headings = {line.lstrip("# ") for line in (REPO / "docs/data.md").read_text().splitlines() if line.startswith("#")}
    named = set()
    for path in sorted((REPO / "scripts/recipes").glob("*/*.yaml")):
        text = re.sub(r"\$\{oc\.env:(DATA|QUICKSTART_DIR),([^}]*)\}", r"\2", path.read_text())
        named |= set(re.findall(r"(?:- path|image_folder): *(\S+)", text))
    assert len(named) > 15
    for place in named:
        said = places.where(f"/absent/{place}")
        assert said != places.WHERE, place
        section = re.search(r"section '(.*?)'", said)
        assert section is None or section[1] in headings
    config = load_recipe(REPO / "scripts/recipes/cumo_mistral_7b/prefinetune.yaml", ["data.max_length=64"])
    lines = dry_lines(config)
    assert [line.split(":")[1].strip() for line in lines] == ["data.sources[0].path", "data.sources[0].image_folder"]
    assert all(line.startswith("# not on this machine: ") and "'CuMo'" in line for line in lines)
