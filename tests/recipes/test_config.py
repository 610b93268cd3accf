"""Recipes: strict keys and types at every depth, one base, and the way to TrainingArguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_moe.config import RecipeError, RunConfig, dump_resolved, load_recipe
from llava_moe.training.arguments import training_arguments

MINIMAL: dict[str, Any] = {
    "output_dir": "out",
    "stage": {"name": "sft", "learning_rates": {"projector": 1e-3}},
    "model": {"checkpoint": "somewhere"},
    "data": {"sources": [{"path": "a.json", "image_folder": "images"}]},
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes MINIMAL with the given sections merged over it."""

    def _write(name: str = "recipe.yaml", raw: dict[str, Any] | None = None, **changes: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**MINIMAL, **changes} if raw is None else raw))
        return path

    return _write


def test_defaults_and_values(write: Any) -> None:
    config = load_recipe(write(seed=7))
    assert isinstance(config, RunConfig)
    assert (config.output_dir, config.seed, config.stage.name) == ("out", 7, "sft")
    assert config.stage.learning_rates == {"projector": 1e-3}
    assert config.data.sources[0].path == "a.json"
    assert config.upcycle is None
    assert config.model.projector == "mlp2x_gelu"


def test_exponents_without_a_dot_are_numbers(tmp_path: Path, write: Any) -> None:
    path = write()
    path.write_text(path.read_text() + "train: {max_grad_norm: 1e-1}\n")
    assert load_recipe(path).train == {"max_grad_norm": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeed": 1}, r"recipe\.yaml: unknown key seeed; did you mean 'seed'"),
        ({"model": {"checkpoit": "x"}}, r"unknown key model\.checkpoit; did you mean 'checkpoint'"),
        (
            {"data": {"sources": [{"path": "a", "image_folder": "b"}, {"path": "a", "image_foldr": "b"}]}},
            r"unknown key data\.sources\[1\]\.image_foldr; did you mean 'image_folder'",
        ),
        (
            {"upcycle": {"parent": "p", "decoder": {"num_expert": 4}}},
            r"unknown key upcycle\.decoder\.num_expert; did you mean 'num_experts'",
        ),
        (
            {"upcycle": {"parent": "p", "decoder": {"router": {"name": "top_k", "arg": {}}}}},
            r"unknown key upcycle\.decoder\.router\.arg; did you mean 'args'",
        ),
        ({"zzz": 1}, r"unknown key zzz; known: .*output_dir"),
    ],
)
def test_unknown_key_in_a_recipe(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(**changes))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.nam=x", r"override 'stage\.nam=x': unknown key stage\.nam; did you mean 'name'"),
        ("modle.checkpoint=x", r"unknown key modle; did you mean 'model'"),
        ("upcycle.decoder.routr.name=x", r"unknown key upcycle\.decoder\.routr; did you mean 'router'"),
        ("seed", r"override 'seed' is not of the form key\.key=value"),
        ("--seed=3", r"override '--seed=3' is not of the form"),
        ("data.max_length=many", r"override 'data\.max_length=many': data\.max_length: .*many"),
        ("stage.weight_decay=much", r"stage\.weight_decay: "),
    ],
)
def test_wrong_override(write: Any, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(), [override])


def test_overrides_win_and_later_ones_over_earlier(write: Any) -> None:
    config = load_recipe(
        write(),
        [
            "seed=1",
            "seed=2",
            "stage.learning_rates.router=1e-4",
            "train.max_steps=5",
            "upcycle.parent=p",
            "upcycle.decoder.layers=all",
            "data.template=null",
        ],
    )
    assert config.seed == 2
    assert config.stage.learning_rates == {"projector": 1e-3, "router": 1e-4}
    assert config.train == {"max_steps": 5}
    assert config.upcycle is not None
    assert config.upcycle.parent == "p"
    assert config.upcycle.decoder is not None
    assert (config.upcycle.decoder.layers, config.upcycle.decoder.router.name) == ("all", "top_k")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": "soon"}, "seed"),
        ({"data": {"sources": [], "max_length": "long"}}, "data.max_length"),
        ({"stage": {"name": "sft", "learning_rates": {"projector": "fast"}}}, "stage.learning_rates.projector"),
        ({"data": {"sources": "a.json"}}, "data.sources"),
        ({"data": {"check_images": "perhaps"}}, "data.check_images"),
    ],
)
def test_wrong_type_names_file_and_key(write: Any, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(**changes))
    assert "recipe.yaml" in str(caught.value)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("missing", "key"), [("output_dir", "output_dir"), ("stage", "stage.name")])
def test_missing_required_value(write: Any, missing: str, key: str) -> None:
    raw = {name: value for name, value in MINIMAL.items() if name != missing}
    with pytest.raises(RecipeError, match=f"{key} must be set"):
        load_recipe(write(raw=raw))


def test_missing_required_value_in_a_list(write: Any) -> None:
    with pytest.raises(RecipeError, match="image_folder must be set"):
        load_recipe(write(data={"sources": [{"path": "a.json"}]}))


@pytest.mark.parametrize("text", ["a: [1, 2", "- one\n- two\n", "just words", "\tseed: 1", "a: 1\na: 2"])
def test_not_a_yaml_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_base_is_read_first(write: Any, tmp_path: Path) -> None:
    write("base.yaml", train={"max_steps": 10, "warmup_steps": 2}, seed=5)
    child = write("child.yaml", raw={"base": "base.yaml", "output_dir": "other", "train": {"max_steps": 3}})
    config = load_recipe(child)
    assert (config.output_dir, config.seed) == ("other", 5)
    assert config.train == {"max_steps": 3, "warmup_steps": 2}


def test_base_of_a_base_is_refused(write: Any) -> None:
    write("root.yaml")
    write("middle.yaml", raw={"base": "root.yaml"})
    with pytest.raises(RecipeError, match=r"middle\.yaml: a base recipe may not have a base itself"):
        load_recipe(write("child.yaml", raw={"base": "middle.yaml"}))


def test_missing_base_and_wrong_key_in_base_name_the_base(write: Any) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: no such recipe"):
        load_recipe(write("child.yaml", raw={"base": "gone.yaml"}))
    write("base.yaml", sead=1)
    with pytest.raises(RecipeError, match=r"base\.yaml: unknown key sead"):
        load_recipe(write("child.yaml", raw={"base": "base.yaml"}))


def test_dump_resolved_round_trip(write: Any, tmp_path: Path) -> None:
    config = load_recipe(
        write(upcycle={"parent": "p", "decoder": {"layers": [0, 2]}}, balance={"losses": {"switch": 0.01}}),
        ["train.lr_scheduler_kwargs={a: 1}"],
    )
    target = tmp_path / "new" / "resolved.yaml"
    dump_resolved(config, target)
    assert load_recipe(target) == config
    assert dataclasses.asdict(load_recipe(target)) == dataclasses.asdict(config)


def arguments(write: Any, tmp_path: Path, *overrides: str) -> Any:
    return training_arguments(load_recipe(write(), [f"output_dir={tmp_path / 'out'}", *overrides]))


def test_training_arguments_carry_the_recipe(write: Any, tmp_path: Path) -> None:
    found = arguments(
        write, tmp_path, "seed=9", "train.max_steps=4", "stage.learning_rates.router=2e-3", "train.use_cpu=true"
    )
    assert (found.seed, found.max_steps, found.output_dir) == (9, 4, str(tmp_path / "out"))
    assert found.learning_rate == pytest.approx(2e-3)  # the largest; the groups have their own
    assert found.remove_unused_columns is False
    assert found.average_tokens_across_devices is True
    assert found.report_to == ["tensorboard"]
    assert found.run_name == "out"
    assert found.use_cpu


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_step=4", "train.max_step is no field of TrainingArguments; did you mean 'max_steps'"),
        ("train.learning_rate=1e-3", "train.learning_rate cannot be set; set stage.learning_rates"),
        ("train.weight_decay=0.1", "train.weight_decay cannot be set; set stage.weight_decay"),
        ("train.output_dir=x", "train.output_dir cannot be set; set output_dir"),
        ("train.seed=1", "train.seed cannot be set; set seed"),
        ("train.deepspeed=x", "train.deepspeed cannot be set; set deepspeed"),
        ("train.remove_unused_columns=true", "train.remove_unused_columns cannot be set; the trainer fixes it"),
        ("train.average_tokens_across_devices=false", "cannot be set; the trainer fixes it"),
        ("train.gradient_checkpointing_kwargs.use_reentrant=true", "loses the balance loss's gradient"),
        ("train.activation_checkpointing_kwargs.use_reentrant=true", "loses the balance loss's gradient"),
        ("deepspeed=nowhere.json", "deepspeed: nowhere.json: no such file"),
    ],
)
def test_training_arguments_refuse(write: Any, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        arguments(write, tmp_path, override)
