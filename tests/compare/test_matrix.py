"""A matrix file: the controls that are always there, what methods share and differ in, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llava_moe.compare import cells, costs, parent, questions
from llava_moe.compare.matrix import DENSE, RANDOM, Matrix
from llava_moe.compare.outline import describe, plan
from llava_moe.config import RecipeError, dump_resolved, load_recipe
from llava_moe.evaluation import records
from tests.compare.matrices import METHODS, make_matrix, write_matrix
from tests.tiny_model import HIDDEN, NUM_LAYERS, write_tiny_checkpoint

REPO = Path(__file__).parents[2]
ROUTER = {"name": "xmoe", "args": {"k": 2}}


def config(matrix: Matrix, method: str, seed: int = 1) -> Any:
    return matrix.cell_config(matrix.cell(method, seed))


def test_both_controls_are_there_unnamed(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path)
    assert list(matrix.methods) == [DENSE, RANDOM, "top_k", "sigmoid"]
    dense, random = config(matrix, DENSE), config(matrix, RANDOM)
    assert dense.upcycle is None
    assert dense.model.checkpoint == str(tmp_path / "parent")
    part = random.upcycle.decoder
    assert (part.router.name, part.router.args) == ("random", {"k": 2})
    assert random.balance.losses == {}
    assert "router" not in random.stage.learning_rates
    assert "experts" in random.stage.learning_rates


def test_naming_a_control_keeps_it_and_its_place(tmp_path: Path) -> None:
    named = {"top_k": {}, "random": {"about": "no router at all"}, "dense": {"about": "control"}}
    matrix = make_matrix(tmp_path, methods=named)
    assert list(matrix.methods) == [DENSE, RANDOM, "top_k"]
    assert matrix.methods[RANDOM].about == "no router at all"
    assert config(matrix, RANDOM).upcycle.decoder.router.name == "random"


def test_cells_of_a_seed_share_data_steps_and_order(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path)
    for seed in (1, 2):
        configs = [dataclasses.asdict(config(matrix, name, seed)) for name in matrix.methods]
        for key in ("train", "seed", "deepspeed"):
            assert all(one[key] == configs[0][key] for one in configs), key
        assert all(one["data"] == configs[0]["data"] for one in configs)
        assert configs[0]["seed"] == seed
        assert not {"seed", "data_seed"} & configs[0]["train"].keys()
    assert config(matrix, "top_k", 2).upcycle.seed == 2


def test_a_seed_in_the_recipe_does_not_stay(tmp_path: Path) -> None:
    train = {"data_seed": 5, "per_device_train_batch_size": 2, "max_steps": 4}
    path = write_matrix(tmp_path, overrides=["train.data_seed=5"])
    assert "data_seed" not in config(Matrix(path), DENSE).train
    assert train["max_steps"] == config(Matrix(path), DENSE).train["max_steps"]


def test_a_method_replaces_components_whole_and_merges_the_rest(tmp_path: Path) -> None:
    method = {"upcycle": {"decoder": {"router": ROUTER}}, "stage": {"learning_rates": {"router": 0.5}}}
    matrix = make_matrix(tmp_path, methods={"x": method, **METHODS})
    found = config(matrix, "x")
    assert found.upcycle.decoder.router.args == {"k": 2}  # nothing of top_k's convention
    assert found.upcycle.decoder.num_experts == 4
    assert found.balance.losses == {"switch": 0.01}
    assert found.stage.learning_rates == {"projector": 0.01, "decoder": 0.01, "experts": 0.01, "router": 0.5}
    bias = config(matrix, "sigmoid").balance
    assert bias.losses == {}
    assert bias.controllers == {"loss_free_bias": {"rate": 0.01}}
    assert config(matrix, "top_k").balance.losses == {"switch": 0.01}  # the others are not touched


def test_a_rate_of_null_takes_a_part_out(tmp_path: Path) -> None:
    hashed = {
        "upcycle": {"decoder": {"router": {"name": "hash", "args": {}}}},
        "stage": {"learning_rates": {"router": None}},
    }
    assert "router" not in config(make_matrix(tmp_path, methods={"hash": hashed}), "hash").stage.learning_rates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "names nothing to compare"),
        ({"methods": {"dense": {}}}, "names nothing to compare"),
        ({"methods": {"a": {"train": {"max_steps": 3}}}}, "methods.a.train: methods differ in upcycle, balance, stage"),
        ({"methods": {"a": {"upcycel": {}}}}, "unknown key upcycel; did you mean"),
        ({"methods": {"a": {"upcycle": {"parent": "x"}}}}, "upcycle.parent: is common to all methods"),
        ({"methods": {"a": {"upcycle": {"decoder": {"rooter": 1}}}}}, "methods.a: unknown key upcycle.decoder.rooter"),
        ({"methods": {"a/b": {}}}, "methods.a/b: a name is made of"),
        ({"methods": {"a": {}, "dense": {"balance": {}}}}, "the dense control has no balance"),
        (
            {"methods": {"a": {}, "random": {"upcycle": {"decoder": {"router": ROUTER}}}}},
            "the control's router is `random`",
        ),
        ({"methods": {"a": {}, "random": {"balance": {"losses": {"z": 0.5}}}}}, "random.balance: random routing has"),
        ({"methods": {"a": {}, "random": {"stage": {"learning_rates": {"router": 1.0}}}}}, "does not learn; leave it"),
        ({"methods": {"a": {}, "random": {"upcycle": {"projector": {}}}}}, "the recipe upcycles decoder only"),
        ({"methods": {"a": {}, "random": {"upcycle": {"decoder": 3}}}}, "upcycle.decoder: must be a mapping"),
        (
            {"methods": {"a": {}, "random": {"upcycle": {"decoder": {"router": {"args": {"k": 2, "fresh": True}}}}}}},
            "args.fresh: of the random control only k",
        ),
        ({"base": {"stage": {"weight_decay": 0.3}}}, "differ in stage.weight_decay of decoder: 0.3 and 0.0"),
        ({"base": {"stage": {"learning_rates": {"decoder": 0.5}}}}, "differ in stage.learning_rates of decoder: 0.5"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "at least one seed"),
        ({"jobs": 0}, "jobs=0"),
        ({"jobs": 2, "devices": ["0"]}, "devices names 1 for jobs=2 with devices_per_job=1; name 2"),
        ({"devices_per_job": 2, "devices": ["0"]}, "name 2"),
        ({"devices_per_job": 0}, "devices_per_job=0"),
        ({"brittleness": {"limits": 3}}, "unknown key brittleness.limits; did you mean 'limit'"),
        (
            {"scoring": {"data": "x", "tasks": ["local_gqa"], "limit": 3}, "brittleness": {"limit": 4}},
            "brittleness.limit=4 asks for more",
        ),
        ({"jbos": 2}, "unknown key jbos; did you mean"),
        ({"scoring": {"data": "x", "taks": []}}, "unknown key scoring.taks"),
        ({"scoring": {"data": "x", "tasks": []}}, "scoring.tasks is empty"),
        ({"scoring": {"data": "x", "tasks": ["local_gqa"], "limit": 0}}, "scoring.limit=0"),
        ({"active_tolerance": 0.0}, "active_tolerance=0"),
        ({"seeds": "many"}, "seeds"),
        ({"recipe": "control.yaml"}, "has a section upcycle"),
        ({"control": "moe.yaml"}, "has no section upcycle"),
        ({"recipe": "nothing.yaml"}, "no such recipe"),
    ],
)
def test_a_wrong_matrix_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_matrix(tmp_path, **changes)
    assert message in str(error.value)


def test_a_layer_with_one_expert_has_nobody_to_take_over(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "parent")
    part = {"num_experts": 1, "router": {"name": "top_k", "args": {"k": 1}}}
    methods = {"top_k": {}, "one": {"upcycle": {"decoder": part}}}
    with pytest.raises(RecipeError, match=r"methods\.one: upcycle\.decoder has a layer with a single expert"):
        plan(make_matrix(tmp_path, methods=methods, allow_unequal_active=True))
    passed = make_matrix(tmp_path, methods=methods, allow_unequal_active=True, brittleness=None)
    assert "one" in plan(passed)


def test_answers_without_the_top_expert_are_of_the_plan_or_none(tmp_path: Path) -> None:
    cell = make_matrix(tmp_path).cell("top_k", 1)
    rows = {cells.SCORES: (1.0, 1.0, 0.0), cells.WITHOUT_TOP: (0.0, 1.0)}
    for name, credits in rows.items():
        (cell.folder / name).mkdir(parents=True)
        (cell.folder / name / records.RESULTS_FILE).write_text('{"tasks": {"local_gqa": {}}}')
        samples = [json.dumps({"id": n, "credit": credit}) + "\n" for n, credit in enumerate(credits)]
        records.samples_path(cell.folder / name, "local_gqa").write_text("".join(samples))

    def found(without: Any, key: str, dropped: bool) -> tuple[float, float] | None:
        (cell.folder / cells.PLAN).write_text(json.dumps({"key": "now", "without_top": without}))
        marker = {"key": key, "dropped": dropped}
        (cell.folder / cells.WITHOUT_TOP / cells.DROPPED).write_text(json.dumps(marker))
        return costs.without_top_of(cell)

    assert found({"tasks": []}, "now", True) == (1.0, 0.5)
    assert found({"tasks": []}, "before", True) is None
    assert found({"tasks": []}, "now", False) is None
    assert found(None, "now", True) is None


def test_the_time_that_is_left_goes_by_whole_cells(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "parent")
    matrix = make_matrix(tmp_path, jobs=2)
    plans, done = plan(matrix), matrix.cells[:2]
    for cell, whole, seconds in zip(done, (True, False), (120.0, 1.0), strict=True):
        cell.folder.mkdir(parents=True)
        (cell.folder / cells.DONE).write_text(json.dumps({"key": "", "whole": whole, "seconds": {"train": seconds}}))
    text = describe(matrix, plans, done)
    assert "2 done" in text
    assert "about 6 min, by 1 cells" in text  # six cells of two minutes, two at a time
    assert "0 done" in describe(matrix, plans)  # what was done for another plan does not count
    assert "none, but for the report" in describe(matrix, plans, matrix.cells)


def test_a_control_with_other_data_or_steps_is_refused(tmp_path: Path) -> None:
    path = write_matrix(tmp_path, base={"train": {"max_steps": 9}})
    with pytest.raises(RecipeError, match=r"differ in train\.max_steps"):
        Matrix(path)
    overrides = "overrides=[train.max_steps=3]"
    assert config(Matrix(path, [overrides]), DENSE).train["max_steps"] == 3  # set for both


def test_a_random_control_needs_a_k(tmp_path: Path) -> None:
    part = {"num_experts": 4, "router": {"name": "top_p", "args": {"p": 0.4}}}
    base = {"upcycle": {"parent": "unused", "decoder": part}}
    with pytest.raises(RecipeError, match="names no k"):
        make_matrix(tmp_path, base=base)
    router = {"name": "random", "args": {"k": 1}}
    methods = {"top_p": {}, "random": {"upcycle": {"decoder": {"router": router}}}}
    assert config(make_matrix(tmp_path, base=base, methods=methods), RANDOM).upcycle.decoder.router.args == {"k": 1}


def test_a_folder_of_another_recipe_is_refused_before_compute(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path)
    cell = matrix.cell("top_k", 1)
    begun = matrix.cell_config(cell)
    dump_resolved(begun, cell.run / "recipe.yaml")
    cells.check_recipe(cell, begun)
    dump_resolved(dataclasses.replace(begun, seed=7), cell.run / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"another recipe \(different: seed\)"):
        cells.check_recipe(cell, begun)


def test_the_key_follows_what_decides_the_answers(tmp_path: Path) -> None:
    def key(matrix: Matrix, parent: str = "p", training: str = "t", data: str = "d") -> str:
        shared = cells.Shared(parent, training, {"local_gqa": data})
        return cells.plan_of(matrix, matrix.cell("top_k", 1), shared).key

    matrix = make_matrix(tmp_path)
    first = key(matrix)
    assert key(make_matrix(tmp_path, jobs=2)) == first  # how it is run changes nothing
    assert key(make_matrix(tmp_path, title="other", seeds=[3, 1])) == first
    assert key(make_matrix(tmp_path, overrides=["speed.fused_loss=off"])) == first
    assert key(make_matrix(tmp_path, stability={"every": 2})) == first
    others = [key(matrix, parent="q"), key(matrix, training="u"), key(matrix, data="e")]
    others += [key(make_matrix(tmp_path, brittleness=None)), key(make_matrix(tmp_path, brittleness={"limit": 2}))]
    others += [key(make_matrix(tmp_path, devices_per_job=2))]
    scoring = {"data": str(tmp_path / "records"), "tasks": ["local_gqa"], "batch_size": 4, "limit": 3}
    others.append(key(make_matrix(tmp_path, scoring=scoring)))
    assert len({first, *others}) == 8


def test_parameters_are_counted_and_printed(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "parent")
    matrix = make_matrix(tmp_path)
    plans = plan(matrix)
    assert plans["top_k"].active - plans[RANDOM].active == NUM_LAYERS * 4 * HIDDEN  # its routers
    assert plans[DENSE].total == plans[DENSE].active < plans[RANDOM].active < plans[RANDOM].total
    text = describe(matrix, plans)
    assert f"{plans['sigmoid'].active:,}" in text
    assert "8 cells" in text
    assert "0 done" in text


def test_unequal_active_parameters_are_refused_or_marked(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "parent")
    wide = {"upcycle": {"decoder": {"router": {"name": "top_k", "args": {"k": 3}}}}}
    methods = {"top_k": {}, "three": wide}
    with pytest.raises(RecipeError, match=r"three by \+\d+\.\d %.*allow_unequal_active: true"):
        plan(make_matrix(tmp_path, methods=methods))
    passed = make_matrix(tmp_path, methods=methods, allow_unequal_active=True)
    assert describe(passed, plan(passed)).count("UNMATCHED") == 1


def test_a_method_that_would_be_refused_is_named(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "parent")
    bad = {"upcycle": {"decoder": {"router": {"name": "top_kk", "args": {}}}}}
    with pytest.raises(RecipeError, match=r"methods\.bad: .*top_kk"):
        plan(make_matrix(tmp_path, methods={"bad": bad}))
    absent = {"checkpoint": str(tmp_path / "unused/model"), "recipes": ["control.yaml"]}  # nothing to count yet
    with pytest.raises(RecipeError, match=r"methods\.bad: .*top_kk"):
        plan(make_matrix(tmp_path, methods={"bad": bad}, parent=absent))


@pytest.mark.parametrize("path", sorted((REPO / "scripts/recipes/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_matrices_of_the_project_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUICKSTART_DIR", str(tmp_path))
    matrix = Matrix(path)
    assert len(matrix.methods) >= 6
    assert len(matrix.seeds) >= 3
    assert matrix.out.parent == tmp_path
    assert all(method.about for method in matrix.methods.values())
    assert "unknown until" in describe(matrix, plan(matrix))


def test_a_plan_is_written_and_a_begun_training_is_held_to_it(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path)
    cell = matrix.cell("top_k", 1)
    plan_now = cells.plan_of(matrix, cell, cells.Shared("p", "t", {"local_gqa": "d"}))
    cells.write_plan(cell, plan_now)
    assert load_recipe(cell.folder / cells.RECIPE) == plan_now.config
    (cell.folder / cells.BEGUN).write_text(f'{{"trained": "{plan_now.trained}"}}')
    other_questions = cells.Shared("p", "t", {"local_gqa": "e"})
    assert cells.plan_of(matrix, cell, other_questions).trained == plan_now.trained
    for other in (cells.Shared("q", "t", {}), cells.Shared("p", "u", {})):
        with pytest.raises(RecipeError, match="began from another parent, on other data"):
            cells.plan_of(matrix, cell, other)


def test_training_data_are_told_apart_by_content(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path)
    (tmp_path / "data.json").write_text("[1]")
    first = cells.mark_of(matrix.checked)
    assert cells.mark_of(matrix.checked) == first
    (tmp_path / "data.json").write_text("[2]")
    assert cells.mark_of(matrix.checked) != first


def test_the_parent_gets_the_devices_of_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "visible", lambda: ["0", "1", "2", "3"])
    number, environment = parent.processes(make_matrix(tmp_path, devices=["1", "3"], jobs=2))
    assert (number, environment["CUDA_VISIBLE_DEVICES"]) == (2, "1,3")
    number, environment = parent.processes(make_matrix(tmp_path))
    assert (number, environment["CUDA_VISIBLE_DEVICES"]) == (4, "0,1,2,3")
    monkeypatch.setattr(parent, "visible", list)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    number, environment = parent.processes(make_matrix(tmp_path))
    assert (number, environment["OMP_NUM_THREADS"]) == (1, "7")
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_deepspeed_is_kept_where_a_cell_has_several_devices(tmp_path: Path) -> None:
    several = ["deepspeed=scripts/deepspeed/zero1.json"]
    assert config(make_matrix(tmp_path, overrides=several), "top_k").deepspeed is None
    kept = make_matrix(tmp_path, overrides=several, devices_per_job=2)
    assert config(kept, "top_k").deepspeed == config(kept, DENSE).deepspeed == "scripts/deepspeed/zero1.json"


def test_the_time_is_told_by_the_steps_of_the_parent(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "made/model")
    matrix = make_matrix(tmp_path, parent={"checkpoint": str(tmp_path / "made/model")})
    plans = plan(matrix)
    assert "at 20 GFLOP/s" in describe(matrix, plans)
    dump_resolved(dataclasses.replace(matrix.checked, output_dir=str(tmp_path / "made")), tmp_path / "made/recipe.yaml")
    (tmp_path / "made/metrics.jsonl").write_text('{"step": 1, "seconds_per_step": 30.0}\n')
    # 2 seeds of 4 steps of 30 s for the dense control, and more for the three methods with experts
    minutes = 4.0 * (1 + sum(plans[name].flops / plans[DENSE].flops for name in plans if name != DENSE))
    assert f"about {minutes:.0f} min of training, by the parent's step of 30.00 s" in describe(matrix, plans)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring": {"tasks": ["mmvet"]}}, "'mmvet' is not scored question by question without a judge"),
        ({"scoring": {"tasks": ["gqaa"]}}, "'gqaa' is not scored question by question"),
        (
            {"scoring": {"tasks": ["gqa", "local_gqa"]}},
            "scoring.data must name the folder with the records of local_g",
        ),
        ({"brittleness": {"tasks": ["local_pope"]}}, "brittleness.tasks: 'local_pope' is not among scoring.tasks"),
        ({"scoring": {"tasks": ["mme"], "limit": 3}}, "limit 3 splits questions of task 'mme'"),
        ({"scoring": {"tasks": ["gqa"]}, "stability": {"every": 2}}, "stability.tasks: name local tasks"),
        ({"stability": {"every": 2, "tasks": ["gqa"]}}, "'gqa' is no local task"),
    ],
)
def test_tasks_that_cannot_be_compared_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_tiny_checkpoint(tmp_path / "parent")
    with pytest.raises(RecipeError) as error:
        plan(make_matrix(tmp_path, **changes))
    assert message in str(error.value)


def test_a_suite_is_taken_apart_into_its_tasks(tmp_path: Path) -> None:
    whole = make_matrix(tmp_path, scoring={"data": "x", "tasks": ["quickstart"]}, brittleness={"tasks": ["local_pope"]})
    assert questions.of_scoring(whole).tasks == ("local_gqa", "local_pope", "local_mmbench")
    dropped = questions.of_brittleness(whole)
    assert dropped is not None
    assert dropped.tasks == ("local_pope",)
    questions.check(whole)
    public = make_matrix(tmp_path, scoring={"tasks": ["gqa", "pope"], "mirror": "m", "limit": 6})
    assert questions.of_scoring(public).as_json() == {
        **{"tasks": ["gqa", "pope"], "data": None, "mirror": "m", "limit": 6, "batch_size": 16, "dtype": "float32"}
    }
    questions.check(public)
