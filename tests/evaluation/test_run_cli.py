"""`llava-moe eval` as a user meets it: suites, a mirror, tables of several checkpoints, and what is refused at once."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.cli import main as command_line
from llava_moe.evaluation import EvaluationError, lmms, prepared, run
from llava_moe.evaluation.session import DTYPES, Settings
from llava_moe.evaluation.vision_reuse import DEFAULT_MIB
from tests.evaluation import fakes

OWN = "pope_first_sentence"  # a task of ours on a data set of the Hub: lmms-eval's own index is not read for it


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mirror(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE, ten questions, in the layout of a snapshot."""
    folder = tmp_path_factory.mktemp("mirror")
    place = folder / "lmms-lab-encoder" / "POPE"
    (place / "data").mkdir(parents=True)
    cache = str(tmp_path_factory.mktemp("cache"))
    records = load_dataset("parquet", data_files=str(data / "pope.parquet"), split="train", cache_dir=cache)
    records.to_parquet(place / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return fakes.write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> fakes.FakeModel:
    fake = fakes.FakeModel()
    monkeypatch.setattr(lmms, "load_checkpoint", lambda pretrained, dtype: (fake, fakes.FakeProcessor()))
    return fake


def ask(*command: Any) -> int:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return run.main(parser.parse_args(list(map(str, command))))


@pytest.fixture(autouse=True)
def arrow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "arrow"))


def test_a_benchmark_from_a_mirror_with_relative_paths(
    mirror: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    Path("m").symlink_to(mirror)
    ask("checkpoint", "--tasks", OWN, "--mirror", "m", "--out", "out")
    assert Path.cwd() == tmp_path
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    task = results["tasks"][OWN]
    assert task["official"] == {
        "pope_accuracy": 1.0,
        "pope_precision": 1.0,
        "pope_recall": 1.0,
        "pope_f1_score": 1.0,
        "pope_answer_yes_ratio": 0.5,
    }
    assert task["headline"] == {
        "metric": "pope_f1_score",
        "value": 1.0,
        "of": 1.0,
        "share": 1.0,
        "interval": None,  # of ten questions
    }
    assert results["about"][OWN]["prompt"]["post_prompt"] == "\nAnswer the question using a single word or phrase."
    assert results["mirror"] == [[OWN, "lmms-lab-encoder/POPE/test", 10, None]]
    assert results["checkpoint"] == "checkpoint"
    assert results["hardware"]
    samples = [json.loads(line) for line in (tmp_path / "out" / f"samples_{OWN}.jsonl").read_text().split("\n") if line]
    assert [sample["credit"] for sample in samples] == [1.0] * 10
    assert [sample["correct"] for sample in samples] == [None] * 10
    page = (tmp_path / "out" / "samples.html").read_text()
    assert page.count("data:image/jpeg") == 10
    before = len(model.prompts)
    ask("checkpoint", "--tasks", OWN, "--mirror", "m", "--out", "out")
    assert len(model.prompts) == before


def test_other_records_are_other_hashes(mirror: Path, tmp_path: Path) -> None:
    place = "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet"
    cache = str(tmp_path / "cache")
    records = load_dataset("parquet", data_files=str(mirror / place), split="train", cache_dir=cache)
    first = prepared.records_hash(records)
    assert first == prepared.records_hash(records.select(range(10)))  # the same content
    assert first != prepared.records_hash(records.select([1, 0, *range(2, 10)]))
    changed = records.map(lambda row: {"image": fakes.picture(7)} if row["id"] == "p3" else {})
    assert first != prepared.records_hash(changed)
    again = load_dataset("parquet", data_files=str(mirror / place), split="train", cache_dir=str(tmp_path / "other"))
    assert first == prepared.records_hash(again)


def test_definition_holds_the_functions_sources(mirror: Path, tmp_path: Path) -> None:
    from llava_moe.evaluation.mirror import offline

    with offline(mirror):
        built = prepared.build(OWN, [OWN], None, tmp_path / "cache")[OWN]
    about = prepared.definition_of(built.task)
    name, source = about["process_results"]
    assert name == "pope_process_results"
    assert len(source) == 64
    assert about["metric_list"][4]["aggregation"][0] == "answer_yes_ratio"
    assert str(mirror) not in json.dumps(about)
    built.task.config.generation_kwargs["max_new_tokens"] = 7
    assert prepared.definition_of(built.task) != about


def test_several_checkpoints_share_tables(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = fakes.write_checkpoint(tmp_path / "other")
    out = tmp_path / "out"
    common = ["--data", data, "--tasks", "local_gqa", "--limit", "5"]
    ask(checkpoint, other, *common, "--blind", other, "--out", out)
    printed = capsys.readouterr()
    assert str(out / "scores.md") in printed.out
    assert "local_gqa: 5 answers in 0:0" in printed.err
    head = (out / "scores.md").read_text().split("\n")[2]
    assert head == "| task | metric | n | checkpoint | other | blank |"
    content = json.loads((out / "scores.json").read_text())
    assert [row["value"] for row in content["scores"]] == [1.0, 1.0, 0.0]
    assert content["runs"]["blank"]["arguments"]["blank_images"] is True


def test_one_checkpoint_that_fails_leaves_the_other(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = fakes.write_checkpoint(tmp_path / "good")

    def load(pretrained: str, dtype: Any) -> Any:
        if Path(pretrained).name == "checkpoint":
            return fakes.FakeModel(fail=True), fakes.FakeProcessor()
        if Path(pretrained).name == "missing":
            raise OSError("weights cannot be read")
        return model, fakes.FakeProcessor()

    monkeypatch.setattr(lmms, "load_checkpoint", load)
    out = tmp_path / "out"
    missing = fakes.write_checkpoint(tmp_path / "missing")
    with pytest.raises(EvaluationError) as failed:
        ask(checkpoint, missing, good, "--data", data, "--tasks", "local_gqa", "--out", out)
    lines = str(failed.value).split("\n")
    assert "checkpoint: 1 of 1 tasks failed; local_gqa: RuntimeError: asked to fail" in lines[0]
    assert lines[1] == "OSError: weights cannot be read"
    assert (out / "good" / "results.json").is_file()
    assert "| good |" in (out / "scores.md").read_text()


def test_wrong_requests_are_one_line_and_exit_code_2(
    data: Path, mirror: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(lmms, "load_checkpoint", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(prepared, "index", lambda include_defaults: argparse.Namespace(all_tasks=["chartqa", "gqa"]))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    out = tmp_path / "out"

    def refused(match: str, *command: Any, own_out: bool = True) -> None:
        given = [*command, *(["--out", out] if own_out else [])]
        with pytest.raises(SystemExit) as left:
            command_line(["eval", *map(str, given)])
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert match in said
        assert said.startswith("error: ")
        assert "Traceback" not in said

    refused("unknown suite or task 'coer'; did you mean 'core'", checkpoint, "--tasks", "coer")
    refused("did you mean 'chartqa'?", checkpoint, "--tasks", "chartqaa")
    refused("unknown task 'local_gpa'; did you mean 'local_gqa'", checkpoint, "--tasks", "local_gpa", "--data", data)
    refused("give --data, the folder of their records", checkpoint)
    refused("limit 3 splits questions of task 'mme'", checkpoint, "--tasks", "gqa,mme", "--limit", "3")
    refused(f"mirror {tmp_path / 'no'} is not a folder", checkpoint, "--tasks", OWN, "--mirror", tmp_path / "no")
    refused("task 'gqa', lmms-lab-encoder/GQA", checkpoint, "--tasks", f"{OWN},gqa", "--mirror", mirror)
    refused("is not a directory", tmp_path / "no_checkpoint", "--tasks", "gqa")
    refused("a checkpoint is named twice", checkpoint, checkpoint, "--tasks", "gqa")
    refused("give at least one CHECKPOINT", "--tasks", "gqa")
    refused("give --out", checkpoint, "--tasks", "gqa", own_out=False)
    refused("OPENAI_API_KEY is not set", checkpoint, "--tasks", "judge")
    refused("none of the tasks (gqa) has a judge", checkpoint, "--tasks", "gqa", "--judge", "http://127.0.0.1:1/v1")
    refused("cannot be reached", checkpoint, "--tasks", "mmvet", "--judge", "http://127.0.0.1:1/v1")
    refused("unknown dtype 'fp8'; use one of float32", checkpoint, "--tasks", "gqa", "--dtype", "fp8")
    refused("batch_size must be 1 or more, not 0", checkpoint, "--tasks", "gqa", "--batch-size", "0")
    refused("seed must be 0 or more, not -1", checkpoint, "--tasks", "gqa", "--seed", "-1")
    monkeypatch.setenv("NUM_IMAGE", "2")
    refused("NUM_IMAGE=2 is set", checkpoint, "--tasks", "gqa")
    assert not out.exists()


def test_a_folder_of_another_checkpoint_is_refused(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path
) -> None:
    out, common = tmp_path / "out", ["--data", data, "--tasks", "local_gqa", "--limit", "2"]
    ask(checkpoint, *common, "--out", out)
    other = fakes.write_checkpoint(tmp_path / "other")
    ask(other, *common, "--out", out)  # the same content in another place
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    ask(checkpoint, *common, "--out", out)  # the same place, trained on
    with pytest.raises(EvaluationError, match=r"holds the scores of another checkpoint, .*checkpoint; choose another"):
        ask(other, *common, "--out", out)
    blank = fakes.write_checkpoint(tmp_path / "blank")
    with pytest.raises(EvaluationError, match=r"/blank, which is the folder of a checkpoint; rename it"):
        ask(checkpoint, blank, *common, "--blind", other, "--out", tmp_path / "two")


@pytest.mark.parametrize("arguments", [[], ["core"]])
def test_script_says_how_it_is_used(arguments: list[str]) -> None:
    script = Path(__file__).parents[2] / "scripts" / "eval" / "suite.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: usage: bash scripts/eval/suite.sh SUITE|TASKS CHECKPOINT")


def test_defaults_are_those_of_the_adapter() -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert Settings().vision_cache_mib == parser.get_default("vision_cache_mib") == DEFAULT_MIB
    assert Settings().batch_size == run.DEFAULT_BATCH_SIZE
    assert tuple(lmms.DTYPES) == DTYPES
    given = parser.parse_args(["--dtype", "bfloat16", "a", "b", "--out", "o", "--tasks", "core"])  # as in slurm.sbatch
    assert given.checkpoints == [Path("a"), Path("b")]


def test_list_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    ask("--list", "--tasks", "core")
    printed = capsys.readouterr().out
    assert "libmoe12" in printed
    assert "lmms-lab-encoder/GQA" in printed
    assert "mathvista_testmini_format   " not in printed
