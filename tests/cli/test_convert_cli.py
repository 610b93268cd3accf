"""`llava-moe import` and `llava-moe export` as they are called: what they say, and what they refuse in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llava_moe.cli import main
from tests.model.formats.layouts import stage_one, whole
from tests.tiny_model import tiny_text_config


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a command that works prints."""
    main([str(argument) for argument in argv])
    return " ".join(capsys.readouterr().out.split())


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a command that does not."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    return said[0]


def test_out_and_in(dense_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "export", dense_checkpoint, "--to", tmp_path / "stock")
    assert "llava with a llama decoder" in said
    assert "largest logit difference" in said
    said = run(capsys, "import", tmp_path / "stock", "--to", tmp_path / "back", "--template", "chatml")
    assert "template chatml, image mode square, 0 rows added" in said
    assert (tmp_path / "back" / "import.json").is_file()


@pytest.mark.parametrize("command", ["import", "export"])
def test_help_is_enough_to_begin(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("--to DIRECTORY", f"llava-moe {command}", "--max-shard-size SIZE", "Example"):
        assert words in said, words
    if command == "import":
        for words in ("MoE-LLaVA", "CuMo", "the language model that a projector or LoRA belongs to", "Layouts:"):
            assert words in said, words


Source = Callable[[Path], Path]


def cut_short(folder: Path) -> Path:
    path = whole(folder)[0]
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    return path


def missing_shard(folder: Path) -> Path:
    path = whole(folder)[0]
    (path / "model.safetensors").rename(path / "model-00001-of-00003.safetensors")
    places = {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def foreign(folder: Path) -> Path:
    """A language model, and no more."""
    model: Any = AutoModelForCausalLM.from_config(tiny_text_config())
    model.save_pretrained(folder / "lm")
    return folder / "lm"


def detection_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "detr", "architectures": ["DetrForObjectDetection"]}))
    save_file({"class_labels_classifier.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    return folder


def broken_config(folder: Path) -> Path:
    path = whole(folder)[0]
    (path / "config.json").write_text("{")
    return path


def no_weights(folder: Path) -> Path:
    path = whole(folder)[0]
    (path / "model.safetensors").unlink()
    return path


def a_file(folder: Path) -> Path:
    return whole(folder)[0] / "model.safetensors"


def no_tokenizer(folder: Path) -> Path:
    path = whole(folder)[0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    return path


def nothing(folder: Path) -> Path:
    return folder / "nowhere"


WRONG: dict[str, tuple[Source, list[str]]] = {
    "no such path": (nothing, ["nowhere: no such checkpoint directory"]),
    "a file": (a_file, ["model.safetensors: is a file; name the directory that it is in"]),
    "cut short": (cut_short, ["model.safetensors", "cut short or damaged"]),
    "a shard is missing": (missing_shard, ["model-00002-of-00003.safetensors is missing (1 of 2 shards)"]),
    "a language model": (foreign, ["no layout that can be imported", "model_type is 'llama'", "Known: LLaVA 1.5"]),
    "another architecture": (detection_model, ["model_type is 'detr'", "class_labels_classifier.weight"]),
    "config.json": (broken_config, ["config.json: not valid JSON"]),
    "no weights": (no_weights, ["no weights there (model.safetensors"]),
    "no tokenizer": (no_tokenizer, ["no tokenizer that can be loaded"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_source_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = WRONG[name]
    path = make(tmp_path / "source")
    said = refused(capsys, "import", path, "--to", tmp_path / "out", "--template", "v1")
    for word in words:
        assert word in said, said
    assert not (tmp_path / "out").exists()


def test_a_name_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "import", "liuhaotian/llava-v1.5-7b", "--to", tmp_path / "out")
    assert "no such checkpoint directory; a model of the hub is fetched first: hf download liuhaotian/" in said


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, base, *_ = stage_one(tmp_path)
    to = ("--to", tmp_path / "out")
    assert "name the language model with --base" in refused(capsys, "import", path, *to, "--template", "plain")
    wrong = tmp_path / "wrong"
    assert "no such directory" in refused(capsys, "import", path, *to, "--base", wrong)
    assert "--template" in refused(capsys, "import", path, *to, "--base", base)
    tower = ("--vision-tower", base, "--template", "plain")
    assert "this is no tower that LLaVA uses" in refused(capsys, "import", path, *to, "--base", base, *tower)
    said = run(capsys, "import", path, *to, "--base", base, "--template", "plain")
    assert "LLaVA stage 1" in said
    assert "holds something else" in refused(capsys, "import", path, "--to", base, "--base", base)


@pytest.mark.parametrize("name", ["no such path", "cut short", "a language model", "another architecture"])
def test_exports_of_no_checkpoint_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = WRONG[name][0](tmp_path / "source")
    said = refused(capsys, "export", path, "--to", tmp_path / "out")
    assert str(path) in said
    assert not (tmp_path / "out").exists()


def test_how_many_wrong_sources() -> None:
    assert len(WRONG) == 9
