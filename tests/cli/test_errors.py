"""Bad input ends with one line that names the culprit, exit code 2, and nothing computed."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_moe.cli import main
from llava_moe.training import runner
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.tiny import write_llava_json
from tests.tiny_model import TINY_MOE
from tests.training.runs import write_recipe


class Case:
    """A valid recipe in its own folder, to be spoilt."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.data, self.images = write_llava_json(folder / "data", 3)
        self.recipe = write_recipe(folder, checkpoint, (self.data, self.images))

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        raw = yaml.safe_load(self.recipe.read_text())
        change(raw)
        self.recipe.write_text(yaml.safe_dump(raw))

    def edit_records(self, change: Callable[[list[dict[str, Any]]], None]) -> None:
        records = json.loads(self.data.read_text())
        change(records)
        self.data.write_text(json.dumps(records))


@pytest.fixture
def case(tmp_path: Path, dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(LlavaMoeTrainer, "train", lambda *args, **kwargs: pytest.fail("compute was spent"))
    return Case(tmp_path, dense_checkpoint)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must be refused and returns what it says."""
    monkeypatch.delenv("LLAVA_MOE_TRACEBACK", raising=False)

    def run(*argv: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in argv])
        said = capsys.readouterr().err
        assert stopped.value.code == 2, said
        message = said[said.index("error: ") :]
        assert "Traceback" not in said
        assert message.endswith("(LLAVA_MOE_TRACEBACK=1 shows the traceback)\n")
        return message

    return run


def test_a_missing_image(case: Case, refusal: Callable[..., str]) -> None:
    (case.images / "1.png").unlink()
    said = refusal("train", case.recipe)
    assert "record 'sample-1'" in said
    assert str(case.images / "1.png") in said
    assert "does not exist" in said


def test_a_corrupt_image(case: Case, refusal: Callable[..., str]) -> None:
    (case.images / "2.png").write_bytes((case.images / "2.png").read_bytes()[:60])
    said = refusal("train", case.recipe)
    assert "sample-2" in said
    assert str(case.images / "2.png") in said


def test_wrong_json(case: Case, refusal: Callable[..., str]) -> None:
    case.data.write_text(case.data.read_text()[:-20])
    said = refusal("train", case.recipe)
    assert str(case.data) in said
    assert "line 1" in said


def test_a_placeholder_too_many(case: Case, refusal: Callable[..., str]) -> None:
    def double(records: list[dict[str, Any]]) -> None:
        records[1]["conversations"][0]["value"] = "<image>\n<image>\nWhat is this?"

    case.edit_records(double)
    said = refusal("train", case.recipe)
    assert "sample-1" in said
    assert "2" in said
    assert "1" in said


def test_a_missing_data_file(case: Case, refusal: Callable[..., str]) -> None:
    case.data.unlink()
    assert str(case.data) in refusal("train", case.recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage.naem=x", ["stage.naem", "did you mean 'name'"]),
        ("train.max_step=3", ["train.max_step", "max_steps"]),
        ("train.max_steps=many", ["train.max_steps='many'", "number"]),
        ("train.gradient_accumulation_steps=0", ["gradient_accumulation_steps=0", "at least 1"]),
        ("train.optim=adamm", ["train:", "adamm"]),
        ("train.lr_scheduler_type=cosin", ["train:", "cosin"]),
        ("train.bf16=fasle", ["train.bf16='fasle'"]),
        ("train.learning_rate=1e-4", ["train.learning_rate", "stage.learning_rates"]),
        ("train.label_smoothing_factor=0.1", ["train.label_smoothing_factor"]),
        ("train.train_sampling_strategy=grouped", ["train_sampling_strategy='grouped'", "group_by_length"]),
        ("train.activation_checkpointing_kwargs.use_reentrant=true", ["use_reentrant", "balance loss"]),
        ("train.gradient_checkpointing_kwargs.use_reentrant=true", ["use_reentrant", "balance loss"]),
        ("stage.learning_rates.projektor=1e-3", ["projektor", "projector"]),
        ("stage.learning_rates.experts=1e-3", ["experts", "does not have"]),
        ("balance.losses.switch=0.01", ["switch", "dense"]),
        ("balance.losses.swich=0.01", ["balance.losses", "swich", "switch"]),
        ("data.template=chatlm", ["chatlm", "chatml"]),
        ("data.image_mode=squared", ["squared", "square"]),
        ("data.overlong=drop", ["drop", "truncate"]),
        ("data.max_length=8", ["sample-0", "max_length 8"]),
        ("data.sources=[]", ["data.sources is empty"]),
        ("model.dtype=float33", ["model.dtype=float33", "bfloat16"]),
        ("model.attn_implementation=flush", ["flush"]),
        ("model.checkpoint=/nonexistent/model", ["/nonexistent/model", "no such checkpoint"]),
        ("model.checkpoint=null", ["vision_tower", "language_model"]),
        ("deepspeed=scripts/deepspeed/zero2.json", ["launcher", "scripts/train"]),
        ("seed", ["'seed'", "key.key=value"]),
    ],
)
def test_a_wrong_value_is_named(override: str, words: list[str], case: Case, refusal: Callable[..., str]) -> None:
    said = refusal("train", case.recipe, override)
    for word in words:
        assert word in said, said
    assert not (case.folder / "out" / "model").exists()


def test_an_unknown_section_of_the_recipe_file(case: Case, refusal: Callable[..., str]) -> None:
    case.edit(lambda raw: raw.update(balence={"losses": {}}))
    said = refusal("train", case.recipe)
    assert str(case.recipe) in said
    assert "unknown key balence; did you mean 'balance'" in said


def test_no_such_recipe(refusal: Callable[..., str]) -> None:
    assert "nowhere.yaml: no such recipe" in refusal("train", "nowhere.yaml")


def test_a_dense_checkpoint_under_a_moe_config(case: Case, dense_checkpoint: Path, refusal: Callable[..., str]) -> None:
    broken = case.folder / "broken"
    broken.mkdir()
    for path in dense_checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "moe": TINY_MOE}))
    said = refusal("train", case.recipe, f"model.checkpoint={broken}")
    assert str(broken) in said
    assert ".mlp." in said
    assert "llava-moe upcycle" in said


def test_the_directory_above_a_checkpoint(case: Case, dense_checkpoint: Path, refusal: Callable[..., str]) -> None:
    said = refusal("train", case.recipe, f"model.checkpoint={dense_checkpoint.parent}")
    assert "no config.json" in said
    assert "checkpoint" in said


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"router": {"name": "topk"}}, ["unknown router 'topk'", "top_k"]),
        ({"router": {"name": "top_k", "args": {"kk": 2}}}, ["no option 'kk'", "'k'"]),
        ({"router": {"name": "top_k", "args": {"k": 9}}}, ["k=9"]),
        ({"upcycler": {"name": "coppy"}}, ["coppy", "copy"]),
        ({"upcycler": {"name": "copy", "args": {"noise": 1}}}, ["noise"]),
        ({"layers": [0, 99]}, ["99", "0..3"]),
        ({"layers": "odd"}, ["odd", "alternate"]),
        ({"experts": {"name": "stacked", "args": {"kernel": "groped"}}}, ["groped", "grouped"]),
        ({"num_experts": 0}, ["num_experts"]),
        ({"num_experts": [4]}, ["num_experts", "for 2 layers"]),
    ],
)
def test_a_wrong_upcycling_is_refused(
    section: dict[str, Any], words: list[str], case: Case, dense_checkpoint: Path, refusal: Callable[..., str]
) -> None:
    case.edit(lambda raw: raw.update(upcycle={"parent": str(dense_checkpoint), "decoder": section}))
    said = refusal("upcycle", case.recipe)
    for word in words:
        assert word in said, said
    assert not (case.folder / "out" / "upcycled").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"parent": "/nonexistent", "decoder": {}}, ["/nonexistent"]),
        ({}, ["decoder", "vision", "projector"]),
        ({"vision": {"layers": [2]}}, ["moe.vision.layers", "behind the selected feature layer"]),
        ({"projector": {"num_experts": [2, 3]}}, ["moe.projector.num_experts"]),
    ],
)
def test_a_wrong_choice_of_parts_is_refused(
    section: dict[str, Any], words: list[str], case: Case, dense_checkpoint: Path, refusal: Callable[..., str]
) -> None:
    case.edit(lambda raw: raw.update(upcycle={"parent": str(dense_checkpoint), **section}))
    said = refusal("upcycle", case.recipe)
    for word in words:
        assert word in said, said
    assert not (case.folder / "out" / "upcycled").exists()


def test_upcycling_a_mixture_of_experts(case: Case, moe_checkpoint: Path, refusal: Callable[..., str]) -> None:
    case.edit(lambda raw: raw.update(upcycle={"parent": str(moe_checkpoint), "decoder": {}}))
    said = refusal("upcycle", case.recipe)
    assert str(moe_checkpoint) in said
    assert "already a mixture of experts" in said


def test_upcycling_without_a_section(case: Case, refusal: Callable[..., str]) -> None:
    assert "has no section `upcycle`" in refusal("upcycle", case.recipe)


def test_upcycling_is_done_once(
    case: Case, dense_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.edit(lambda raw: raw.update(upcycle={"parent": str(dense_checkpoint), "decoder": {}}))
    main(["upcycle", str(case.recipe)])
    assert (case.folder / "out" / "upcycled" / "model.safetensors").is_file()
    monkeypatch.setattr("llava_moe.upcycle.upcycle", lambda *args: pytest.fail("upcycled again"))
    capsys.readouterr()
    main(["upcycle", str(case.recipe)])
    assert "is there already" in capsys.readouterr().out


def test_the_traceback_can_be_asked_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_MOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such recipe"):
        main(["train", "nowhere.yaml"])


def test_several_gpus_in_one_process_are_refused(
    case: Case, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runner.training_arguments

    def with_gpus(config: Any) -> Any:
        arguments = made(config)
        arguments._n_gpu = 4
        return arguments

    monkeypatch.setattr(runner, "training_arguments", with_gpus)
    assert "4 GPUs" in refusal("train", case.recipe)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["llava_moe.train", "llava_moe.upcycle"])
def test_a_module_without_a_recipe_says_how_it_is_used(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == 2
    assert f"python -m {module} RECIPE" in capsys.readouterr().err


class TestDryRun:
    """DRY_RUN=1: the resolved recipe and the counts, nothing else."""

    @pytest.fixture(autouse=True)
    def _dry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRY_RUN", "1")

    def test_a_checkpoint(self, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
        main(["train", str(case.recipe), "train.max_steps=7", "train.gradient_accumulation_steps=3"])
        said = capsys.readouterr().out
        assert "max_steps: 7" in said
        assert "samples per step and device: 6" in said
        assert "total" in said
        assert "trainable in stage test" in said
        assert yaml.safe_load(said)["stage"]["name"] == "test"
        assert not (case.folder / "out").exists()

    def test_an_upcycling(self, case: Case, dense_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        section = {"parent": str(dense_checkpoint), "decoder": {"num_experts": 4}}
        case.edit(lambda raw: raw.update(upcycle=section, stage={"name": "moe", "learning_rates": {"experts": 1e-3}}))
        main(["train", str(case.recipe)])
        said = capsys.readouterr().out
        counts = said.split("# parameters: ")[1].replace(",", "").split()
        total, active, trainable = int(counts[0]), int(counts[2]), int(counts[6])
        expert = 3 * 32 * 48
        assert trainable == 2 * 4 * expert
        assert total - active == 2 * 2 * expert

    def test_parts_that_are_not_here(self, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
        case.edit(lambda raw: raw.update(model={"vision_tower": "/nowhere/tower", "language_model": "/nowhere/lm"}))
        main(["train", str(case.recipe)])
        assert "parameters: unknown here" in capsys.readouterr().out

    def test_a_wrong_recipe_is_still_refused(self, case: Case, refusal: Callable[..., str]) -> None:
        assert "train.max_step" in refusal("train", case.recipe, "train.max_step=3")
        assert "unknown balance loss" in refusal("train", case.recipe, "balance.losses.swich=1")
        assert "nowhere.json: no such file" in refusal("train", case.recipe, "deepspeed=nowhere.json")
