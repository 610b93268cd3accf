"""How checkpoints get onto the disk: safetensors, in shards, and under their name only when they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llava_moe import convert
from llava_moe import grow as grow_program
from llava_moe import upcycle as upcycle_program
from llava_moe.cli import main
from llava_moe.model.assemble import load_model
from llava_moe.model.streaming import CheckpointReader, CheckpointWriter
from llava_moe.training import runner
from tests.model.formats.layouts import whole
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_moe, write_tiny_checkpoint
from tests.training.runs import ALL_PARTS, make_config

SMALL = 40_000  # bytes; the tiny models have about ten times as many


class CrashError(RuntimeError):
    """Stands for anything that ends a program in the middle."""


def train(folder: Path) -> Path:
    """Writes `folder/out/model`, from a fresh run each time."""
    parent = write_tiny_checkpoint(folder / "parent")
    data = write_llava_json(folder / "data", 4)
    config = make_config(folder, parent, data, stage={"name": "sft", "learning_rates": ALL_PARTS})
    return runner.train(config)


def upcycle(folder: Path) -> Path:
    parent = write_tiny_checkpoint(folder / "parent")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"upcycle": {"decoder": {"num_experts": 4}}}))
    main(["upcycle", "--from", str(parent), str(recipe), "--to", str(folder / "result")])
    return folder / "result"


def grow(folder: Path) -> Path:
    parent = write_tiny_checkpoint(folder / "parent")
    recipe = folder / "recipe.yaml"
    section = {"depth": {"name": "stack"}, "target": {"num_hidden_layers": 8}}
    recipe.write_text(yaml.safe_dump({"grow": section}))
    main(["grow", "--from", str(parent), str(recipe), "--to", str(folder / "result")])
    return folder / "result"


def bring_in(folder: Path, *more: str) -> Path:
    source = folder / "source"
    path = source / "checkpoint-5" if source.exists() else whole(source)[0]
    main(["import", str(path), "--to", str(folder / "result"), "--template", "v1", *more])
    return folder / "result"


def send_out(folder: Path, *more: str) -> Path:
    path = folder / "ours"
    if not path.exists():
        write_tiny_checkpoint(path, tiny_moe(layers=[0, 1, 2, 3]))
    main(["export", str(path), "--to", str(folder / "result"), *more])
    return folder / "result"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "train": train,
    "upcycle": upcycle,
    "grow": grow,
    "import": bring_in,
    "export": send_out,
}


def crash_after(monkeypatch: pytest.MonkeyPatch, writer: str) -> Callable[[], int]:
    """Lets the weights be written and then fails; how often that happened."""
    calls = [0]

    def crash(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        raise CrashError

    programs = {"train": runner, "upcycle": upcycle_program, "grow": grow_program}
    monkeypatch.setattr(programs.get(writer, convert), "write_card", crash)
    return lambda: calls[0]


def crash_in_the_weights(monkeypatch: pytest.MonkeyPatch, writer: str) -> Callable[[], int]:
    """Fails at the third tensor, or at the first file of a model that transformers writes."""
    calls = [0]
    if writer == "train":

        def save(*args: Any, **kwargs: Any) -> None:
            calls[0] += 1
            Path(args[1]).write_bytes(b"half")
            raise CrashError

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)
        return lambda: calls[0]
    put = CheckpointWriter._put

    def third(self: CheckpointWriter, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise CrashError
        put(self, *args)

    monkeypatch.setattr(CheckpointWriter, "_put", third)
    return lambda: calls[0]


@pytest.mark.parametrize("crash", [crash_in_the_weights, crash_after])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_crash_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, crash: Callable[..., Callable[[], int]]
) -> None:
    with monkeypatch.context() as patched:
        count = crash(patched, writer)
        with pytest.raises(CrashError):
            WRITERS[writer](tmp_path)
        assert count() > 0
    expected = tmp_path / ("out/model" if writer == "train" else "result")
    assert not expected.exists()
    partial = expected.with_name(f"{expected.name}.partial")
    assert not partial.exists() or writer == "train"  # a run that goes on later clears it away itself
    made = WRITERS[writer](tmp_path)
    assert made == expected
    assert not partial.exists()
    assert (made / "README.md").is_file()
    assert CheckpointReader(made).nbytes > SMALL
    assert [path.suffix for path in made.iterdir() if path.suffix in (".bin", ".pt", ".partial")] == []


@pytest.mark.parametrize("writer", ["import", "export"])
def test_a_crash_leaves_the_earlier_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    made = WRITERS[writer](tmp_path)
    (made / "model.safetensors").touch()
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    with monkeypatch.context() as patched:
        crash_in_the_weights(patched, writer)
        with pytest.raises(CrashError):
            WRITERS[writer](tmp_path)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


@pytest.mark.parametrize("writer", ["import", "export"])
def test_shards(tmp_path: Path, writer: str) -> None:
    one = WRITERS[writer](tmp_path)
    before = {name: CheckpointReader(one).read(name) for name in CheckpointReader(one).infos}
    made = WRITERS[writer](tmp_path, "--max-shard-size", "40KB")  # type: ignore[call-arg]
    check_shards(made, before)


def check_shards(made: Path, before: dict[str, torch.Tensor]) -> None:
    index = json.loads((made / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 4
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (made / "model.safetensors").exists()
    reader = CheckpointReader(made)
    assert reader.infos.keys() == before.keys()
    largest = max(info.nbytes for info in reader.infos.values())
    for file in files:
        assert (made / file).stat().st_size < max(SMALL, largest) + 10_000  # and a header
    for name, tensor in before.items():
        assert torch.equal(reader.read(name), tensor)


def test_a_trained_model_is_sharded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would put up to 50 GB into one file."""
    model = load_model(write_tiny_checkpoint(tmp_path / "parent", tiny_moe()))
    assert model.max_shard_size == "5GB"
    model.save_pretrained(tmp_path / "one", save_original_format=True)
    whole_file = CheckpointReader(tmp_path / "one")
    monkeypatch.setattr(type(model), "max_shard_size", SMALL)
    model.save_pretrained(tmp_path / "many", save_original_format=True)
    check_shards(tmp_path / "many", {name: whole_file.read(name) for name in whole_file.infos})
    again = load_model(tmp_path / "many").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_a_size_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path), "--to", str(tmp_path / "x"), "--max-shard-size", "much"])
    assert stopped.value.code == 2
    assert "'much' is no size; write it as 5GB, 500MB or 2GiB" in capsys.readouterr().err


def test_every_writer_is_here() -> None:
    assert len(WRITERS) == 5
