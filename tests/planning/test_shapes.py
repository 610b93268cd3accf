"""The shape of a run's model: of a checkpoint, of parts, and of a chain of recipes; and what a header says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_moe.config import RecipeError, load_recipe
from llava_moe.planning import Library, count, model_on_meta, read_header, shape_of
from llava_moe.planning.shapes import ConfigNotFoundError
from llava_moe.training.stage import part_of
from tests.tiny_model import tiny_config, tiny_text_config, tiny_vision_config

TRAIN = {"data": {"sources": [{"path": "a.json", "image_folder": "images"}]}}


def stage(name: str, out: Path, **sections: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "stage": {"name": name, "learning_rates": {"projector": 1e-3}},
        **TRAIN,
        **sections,
    }


def write(path: Path, raw: dict[str, Any], header: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + yaml.safe_dump(raw))
    return path


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """pretrain -> sft -> moe in one folder, and the configs of the parts in another."""
    runs, folder = tmp_path / "runs", tmp_path / "recipes"
    configs = folder / "configs"
    configs.mkdir(parents=True)
    text = tiny_text_config()
    for hub_id, config, more in (
        ("maker/tower", tiny_vision_config(), {}),
        ("maker/lm", text, {"tokenizer_length": text.vocab_size}),
    ):
        facts = {"hub_id": hub_id, "source": "this test", **more, "config": json.loads(config.to_json_string())}
        (configs / f"{hub_id.split('/')[1]}.json").write_text(json.dumps(facts))
    parts = {
        "vision_tower": "maker/tower",
        "vision_feature_select_strategy": "full",
        "language_model": "maker/lm",
    }
    write(folder / "family/pretrain.yaml", stage("pretrain", runs / "pretrain", model=parts))
    write(folder / "family/sft.yaml", stage("sft", runs / "sft", model={"checkpoint": str(runs / "pretrain/model")}))
    upcycle = {"parent": str(runs / "sft/model"), "decoder": {"layers": [0, 2], "num_experts": 4}}
    model = {"checkpoint": str(runs / "moe/upcycled")}
    write(folder / "family/moe.yaml", stage("moe", runs / "moe", model=model, upcycle=upcycle))
    return folder


def shape(path: Path) -> Any:
    return shape_of(load_recipe(path), Library(path))


def test_a_chain_of_recipes_without_any_checkpoint(recipes: Path) -> None:
    dense = shape(recipes / "family/pretrain.yaml")
    assert dense.image_seq_length == 4
    assert dense.text_config.vocab_size % 64 == 0  # the image token needs another row
    assert dense.text_config.vocab_size > tiny_text_config().vocab_size
    assert shape(recipes / "family/sft.yaml").to_dict() == dense.to_dict()
    sparse = shape(recipes / "family/moe.yaml")
    assert sparse.moe["decoder"]["layers"] == [0, 2]
    assert {**sparse.to_dict(), "moe": None} == dense.to_dict()
    assert count(model_on_meta(sparse), part_of).total > count(model_on_meta(dense), part_of).total


def test_the_shape_is_that_of_the_real_start(recipes: Path, dense_checkpoint: Path, moe_checkpoint: Path) -> None:
    for checkpoint, moe in ((dense_checkpoint, False), (moe_checkpoint, True)):
        path = write(recipes / "own/run.yaml", stage("x", recipes / "out", model={"checkpoint": str(checkpoint)}))
        found = shape(path)
        assert (found.moe is not None) == moe
        assert found.text_config.vocab_size == tiny_config().text_config.vocab_size


def test_a_checkpoint_on_disk_comes_before_the_recipe_that_makes_it(recipes: Path, moe_checkpoint: Path) -> None:
    target = Path(load_recipe(recipes / "family/pretrain.yaml").output_dir) / "model"
    target.parent.mkdir(parents=True)
    target.symlink_to(moe_checkpoint)
    assert shape(recipes / "family/sft.yaml").moe is not None
    with pytest.raises(RecipeError, match="already a mixture of experts"):
        shape(recipes / "family/moe.yaml")


def test_circles_and_absent_parts(recipes: Path) -> None:
    runs = recipes.parent / "runs"
    for one, other in (("a", "b"), ("b", "a")):
        write(
            recipes / f"circle/{one}.yaml",
            stage(one, runs / one, model={"checkpoint": str(runs / other / "model")}),
        )
    with pytest.raises(RecipeError, match="made from itself"):
        shape(recipes / "circle/a.yaml")
    unknown = {"vision_tower": "maker/tower", "language_model": "maker/nothing"}
    path = write(recipes / "other/pretrain.yaml", stage("pretrain", runs / "c", model=unknown))
    with pytest.raises(ConfigNotFoundError):
        shape(path)
    path = write(recipes / "other/sft.yaml", stage("sft", runs / "d", model={"checkpoint": str(runs / "e/model")}))
    with pytest.raises(ConfigNotFoundError):
        shape(path)


def test_a_recipe_that_does_not_fit_is_refused_and_not_unknown(recipes: Path) -> None:
    path = recipes / "family/pretrain.yaml"
    with pytest.raises(ValueError, match="vision_feature_select_strategy=default drops"):
        shape_of(load_recipe(path, ["model.vision_feature_select_strategy=default"]), Library(path))
    with pytest.raises(ValueError, match=r"upcycle\.decoder\.layers=\[9\]: there are layers 0\.\.3"):
        shape_of(load_recipe(recipes / "family/moe.yaml", ["upcycle.decoder.layers=[9]"]), Library(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("{}", "config, hub_id, source is missing"), ("[]", "is missing")],
)
def test_a_broken_config_file_is_named(recipes: Path, content: str, message: str) -> None:
    (recipes / "configs/broken.json").write_text(content)
    with pytest.raises(RecipeError, match=rf"broken\.json: .*{message}"):
        Library(recipes / "family/pretrain.yaml").known_config("maker/lm")


def test_a_config_file_without_a_model_type(recipes: Path) -> None:
    (recipes / "configs/broken.json").write_text(json.dumps({"hub_id": "a", "source": "b", "config": {}}))
    with pytest.raises(RecipeError, match=r"broken\.json: config\.model_type is missing"):
        Library(recipes / "family/pretrain.yaml").known_config("maker/lm")


def test_headers(tmp_path: Path) -> None:
    header = "# Purpose:  a long\n#           text: in two lines\n#Control: a/b.yaml, the same\n# Hardware: 16 x H100\n"
    path = write(tmp_path / "a.yaml", {"seed": 1}, header)
    path.write_text(path.read_text() + "# Paper: not a part of the header\n")
    found = read_header(path)
    assert found.fields == {
        "Purpose": "a long text: in two lines",
        "Control": "a/b.yaml, the same",
        "Hardware": "16 x H100",
    }
    assert (found.devices, found.control) == (16, "a/b.yaml")
    bare = read_header(write(tmp_path / "b.yaml", {"seed": 1}))
    assert (bare.devices, bare.control, bare.fields) == (1, None, {})
    laptop = read_header(write(tmp_path / "c.yaml", {"seed": 1}, "# Hardware:  2 CPU cores, about 4 minutes\n"))
    assert laptop.devices == 1
