"""`llava-moe upcycle` and `llava-moe grow` as they are called: arguments, reports, refusals, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_moe.cli import main, making_parser
from llava_moe.model.assemble import load_model
from tests.tiny import write_llava_json
from tests.tiny_model import TINY_MOE

Recipe = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Writes sections as a recipe and returns its path."""

    def write(**sections: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must be refused with one line, and returns it."""
    monkeypatch.delenv("LLAVA_MOE_TRACEBACK", raising=False)

    def run(*argv: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in argv])
        said = capsys.readouterr().err
        assert stopped.value.code == 2, said
        assert "Traceback" not in said
        return said[said.index("error: ") :]

    return run


class TestUpcycle:
    """Dense to sparse."""

    def test_from_and_to(
        self, recipe: Recipe, dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = recipe(upcycle={"parent": "/nowhere", "decoder": {"num_experts": 3}})
        out = tmp_path / "a place" / "moe"
        main(["upcycle", "--from", str(dense_checkpoint), str(path), "upcycle.seed=4", "--to", str(out)])
        said = capsys.readouterr().out
        assert f"{dense_checkpoint} -> {out}" in said
        assert "decoder layers [0, 2]: 3 experts, router top_k, copy" in said
        assert "largest logit difference to the dense parent" in said
        assert "100.0% of" in said
        facts = json.loads((out / "upcycle.json").read_text())
        assert facts["parent"] == str(dense_checkpoint)
        assert facts["seed"] == 4
        assert load_model(out).config.moe["decoder"]["num_experts"] == 3

    def test_all_from_the_recipe_and_only_once(
        self, recipe: Recipe, dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        sections = {"output_dir": str(tmp_path / "run"), "upcycle": {"parent": str(dense_checkpoint), "projector": {}}}
        main(["upcycle", str(recipe(**sections)), "upcycle.projector.num_experts=2"])
        assert (tmp_path / "run" / "upcycled" / "model.safetensors").is_file()
        capsys.readouterr()
        monkeypatch.setattr("llava_moe.upcycle.upcycle", lambda *args: pytest.fail("upcycled again"))
        main(["upcycle", str(recipe(**sections)), "upcycle.projector.num_experts=2"])
        assert "is there already" in capsys.readouterr().out

    def test_another_section_replaces_what_is_there(
        self, recipe: Recipe, dense_checkpoint: Path, tmp_path: Path
    ) -> None:
        path = recipe(output_dir=str(tmp_path / "run"), upcycle={"parent": str(dense_checkpoint), "decoder": {}})
        for number in (2, 3):
            main(["upcycle", str(path), f"upcycle.decoder.num_experts={number}"])
            config = json.loads((tmp_path / "run" / "upcycled" / "config.json").read_text())
            assert config["moe"]["decoder"]["num_experts"] == number

    def test_calibration_samples(self, recipe: Recipe, dense_checkpoint: Path, tmp_path: Path) -> None:
        data, images = write_llava_json(tmp_path / "data", 6, text_only_every=3)
        calibration = {"path": str(data), "image_folder": str(images), "num_samples": 6}
        decoder = {"num_experts": 2, "upcycler": {"name": "partition_gradient"}}
        path = recipe(upcycle={"decoder": decoder, "calibration": calibration})
        main(["upcycle", "--from", str(dense_checkpoint), "--to", str(tmp_path / "out"), str(path)])
        facts = json.loads((tmp_path / "out" / "upcycle.json").read_text())
        assert facts["measured_on"] == "calibration"
        assert facts["contract"] == {"decoder": "exact_sum_of_all"}

    @pytest.mark.parametrize(
        ("section", "words"),
        [
            ({"decoder": {"router": {"name": "topk"}}}, ["unknown router 'topk'", "top_k"]),
            ({"decoder": {"router": {"name": "top_k", "args": {"kk": 2}}}}, ["no option 'kk'", "'k'"]),
            ({"decoder": {"layers": [0, 99]}}, ["upcycle.decoder.layers", "99", "0..3"]),
            ({"decoder": {"layer": [0]}}, ["unknown key upcycle.decoder.layer", "did you mean 'layers'"]),
            ({"tower": {}}, ["unknown key upcycle.tower", "did you mean"]),
            ({"parent": "/nonexistent", "decoder": {}}, ["/nonexistent: no such checkpoint directory"]),
            ({}, ["names no part of the model"]),
            ({"decoder": {"upcycler": {"name": "partition_coactivation"}}}, ["upcycle.calibration is missing"]),
            (
                {"decoder": {}, "calibration": {"path": "/nowhere.json", "image_folder": "."}},
                ["/nowhere.json"],
            ),
            ({"decoder": {}, "calibration": {"paths": "x"}}, ["upcycle.calibration.paths", "did you mean 'path'"]),
        ],
    )
    def test_refusals(
        self, section: dict[str, Any], words: list[str], recipe: Recipe, dense_checkpoint: Path, tmp_path: Path,
        refusal: Callable[..., str],
    ) -> None:  # fmt: skip
        path = recipe(upcycle={"parent": str(dense_checkpoint), **section})
        said = refusal("upcycle", path, "--to", tmp_path / "out")
        for word in words:
            assert word in said, said
        assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]

    def test_more_samples_than_there_are(
        self, recipe: Recipe, dense_checkpoint: Path, tmp_path: Path, refusal: Callable[..., str]
    ) -> None:
        data, images = write_llava_json(tmp_path / "data", 2)
        calibration = {"path": str(data), "image_folder": str(images)}
        path = recipe(upcycle={"parent": str(dense_checkpoint), "decoder": {}, "calibration": calibration})
        said = refusal("upcycle", path, "--to", tmp_path / "out")
        assert f"calibration.num_samples=32: {data} has 2 usable records" in said
        said = refusal("upcycle", path, "--to", tmp_path / "out", "upcycle.calibration.num_samples=0")
        assert "num_samples=0 must be at least 1" in said

    def test_a_recipe_without_the_section(self, recipe: Recipe, tmp_path: Path, refusal: Callable[..., str]) -> None:
        path = recipe(output_dir=str(tmp_path))
        assert "has no section `upcycle`" in refusal("upcycle", path)
        assert "has no section `grow`" in refusal("grow", path)

    def test_over_its_own_parent(self, recipe: Recipe, dense_checkpoint: Path, refusal: Callable[..., str]) -> None:
        path = recipe(upcycle={"decoder": {}})
        said = refusal("upcycle", path, "--from", dense_checkpoint, "--to", dense_checkpoint)
        assert "would replace its own parent" in said
        assert load_model(dense_checkpoint).config.moe is None


class TestGrow:
    """Small to large."""

    def test_from_and_to_and_then_upcycled(
        self, recipe: Recipe, dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sections = {
            "grow": {"width": {"name": "fpi"}, "target": {"hidden_size": 64, "intermediate_size": 96}},
            "upcycle": {"decoder": {"num_experts": 2}},
        }
        path, large, sparse = recipe(**sections), tmp_path / "large", tmp_path / "sparse"
        main(["grow", str(path), "--from", str(dense_checkpoint), "--to", str(large)])
        said = capsys.readouterr().out
        assert "hidden 32 -> 64, intermediate 48 -> 96" in said
        assert "exact: largest logit difference" in said
        main(["grow", str(path), "--from", str(dense_checkpoint), "--to", str(large)])
        assert "is there already" in capsys.readouterr().out
        main(["upcycle", str(path), "--from", str(large), "--to", str(sparse)])
        assert load_model(sparse).config.text_config.hidden_size == 64

    def test_the_output_directory_of_the_recipe(self, recipe: Recipe, dense_checkpoint: Path, tmp_path: Path) -> None:
        grow = {"parent": str(dense_checkpoint), "depth": {"name": "stack"}, "target": {"num_hidden_layers": 6}}
        main(["grow", str(recipe(output_dir=str(tmp_path / "run"), grow=grow))])
        facts = json.loads((tmp_path / "run" / "grown" / "grow.json").read_text())
        assert facts["exact"] is False
        assert facts["target"]["layers"] == 6

    @pytest.mark.parametrize(
        ("grow", "words"),
        [
            ({"target": {"hidden": 64}}, ["grow.target has no key 'hidden'", "hidden_size"]),
            ({"target": {"hidden_size": 64}}, ["grow.width is missing"]),
            ({"targets": {}}, ["unknown key grow.targets", "did you mean 'target'"]),
            ({"width": {"nam": "fpi"}}, ["unknown key grow.width.nam", "did you mean 'name'"]),
            ({"parent": "/nonexistent", "target": {}}, ["/nonexistent: no such checkpoint directory"]),
        ],
    )
    def test_refusals(
        self, grow: dict[str, Any], words: list[str], recipe: Recipe, dense_checkpoint: Path, tmp_path: Path,
        refusal: Callable[..., str],
    ) -> None:  # fmt: skip
        path = recipe(grow={"parent": str(dense_checkpoint), **grow})
        said = refusal("grow", path, "--to", tmp_path / "out")
        for word in words:
            assert word in said, said
        assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


class TestHelp:
    """What `--help` says."""

    @pytest.mark.parametrize("name", ["upcycle", "grow"])
    def test_of_a_program(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        for word in (
            "--from CHECKPOINT",
            "--to DIRECTORY",
            "key=value",
            f"{name}.json",
            f"`{name}` section",
            "<output_dir>",
        ):
            assert word in said, said

    def test_of_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        said = capsys.readouterr().out
        assert "upcycle" in said
        assert "grow" in said

    def test_options_may_stand_anywhere(self) -> None:
        found = making_parser("grow").parse_intermixed_args(["r.yaml", "--to", "x", "a=1", "--from", "y", "b=2"])
        assert (found.recipe, found.overrides, found.parent, found.to) == ("r.yaml", ["a=1", "b=2"], "y", "x")


_SLOW = """
import sys, time
from llava_moe.model import upcycling
real = upcycling.make_layer
def slow(block, *args):
    print("at", block.site, flush=True)
    time.sleep(60 if block.index else 0)
    return real(block, *args)
upcycling.make_layer = slow
from llava_moe.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(recipe: Recipe, dense_checkpoint: Path, tmp_path: Path) -> None:
    path = recipe(upcycle={"parent": str(dense_checkpoint), "decoder": {}})
    command = [sys.executable, "-c", _SLOW, "upcycle", str(path), "--to", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("at decoder.2" in line for line in process.stdout)
        assert (tmp_path / "out.partial" / "model.safetensors").is_file()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_sparse_parent(recipe: Recipe, moe_checkpoint: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = recipe(upcycle=TINY_MOE | {"parent": str(moe_checkpoint), "decoder": {}})
    assert "already a mixture of experts" in refusal("upcycle", path, "--to", tmp_path / "out")
