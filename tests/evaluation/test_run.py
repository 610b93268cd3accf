"""The wrapper and the adapter through the real lmms-eval: known scores, loud failures, resuming, the blind baseline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.evaluation import EvaluationError, lmms, prepared, records, run, summarize
from llava_moe.evaluation.tasks import LOCAL_TASKS
from tests.evaluation import fakes

TASKS = ["local_gqa", "local_pope", "local_mmbench"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return fakes.write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> fakes.FakeModel:
    fake = fakes.FakeModel()
    monkeypatch.setattr(lmms, "load_checkpoint", lambda pretrained, dtype: (fake, fakes.FakeProcessor()))
    return fake


def test_local_tasks_and_their_yaml_files_agree() -> None:
    from llava_moe.evaluation.tasks import TASKS_FOLDER

    assert LOCAL_TASKS.names() == TASKS
    assert sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml")) == sorted(TASKS)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_oracle_gets_the_known_scores(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path, batch_size: int
) -> None:
    out = tmp_path / "out"
    results = run.evaluate(checkpoint, data, TASKS, out, batch_size=batch_size)
    assert {name: score["score"] for name, score in results["tasks"].items()} == {
        "local_gqa": 0.9,  # one answer is "purple", which no picture shows
        "local_pope": 1.0,
        "local_mmbench": 1.0,
    }
    assert results["tasks"]["local_mmbench"]["official"]["gpt_eval_score"] == 100.0
    assert {name: score["n"] for name, score in results["families"].items()} == {
        "shapes_open": 6,
        "emoji_kind": 4,
        "shapes_yesno": 5,
        "presence": 5,
        "choice": 10,
    }
    assert results["families"]["emoji_kind"]["accuracy"] == 0.75
    assert results["families"]["presence"]["balanced_accuracy"] == 1.0
    assert "balanced_accuracy" not in results["families"]["shapes_open"]
    assert results["template"] == "chatml"
    assert results["versions"]["lmms-eval"]
    assert json.loads((out / "results.json").read_text()) == results
    lines = [json.loads(line) for line in (out / "samples_local_gqa.jsonl").read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(10))
    assert lines[9] == {
        "doc_id": 9,
        "id": "g9",
        "family": "emoji_kind",
        "question": "What color is the square?",
        "prompt": "What color is the square?\nAnswer the question using a single word or phrase.",
        "target": "purple",
        "answer": "WHITE",
        "correct": False,
        "credit": 0.0,
    }
    assert all(prompt.startswith("<image>\n") for prompt in model.prompts)


def test_same_scores_again_are_skipped_and_changes_are_not(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(**changes: Any) -> int:
        before = len(model.prompts)
        arguments = {"tasks": ["local_gqa"], "limit": 3} | changes
        run.evaluate(checkpoint, data, out=tmp_path / "out", **arguments)
        return len(model.prompts) - before

    assert score() == 3
    capsys.readouterr()
    assert score() == 0
    assert "skipped" in capsys.readouterr().err
    assert score(limit=4) == 1  # three are in the journal
    assert "skipped" not in capsys.readouterr().err
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    assert score(limit=2) == 2
    assert score(limit=2) == 0
    (checkpoint / "processor_config.json").write_text('{"template": "v1"}')
    assert score(limit=2) == 2
    samples = tmp_path / "out" / "samples_local_gqa.jsonl"
    before = samples.read_text()
    samples.unlink()
    assert score(limit=2) == 0
    assert samples.read_text() == before  # scored again from the journal


def test_blank_images_reach_the_model(data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path) -> None:
    results = run.evaluate(checkpoint, data, TASKS, tmp_path / "out", blank_images=True)
    pixels = [value for call in model.calls for value in call["pixel_values"].unique().tolist()]
    assert set(pixels) == {128.0}
    assert results["families"]["presence"]["balanced_accuracy"] == 0.5  # "No" to everything
    assert results["tasks"]["local_gqa"]["score"] == 0


def test_a_failing_model_fails_the_run_and_leaves_no_result(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path
) -> None:
    run.evaluate(checkpoint, data, ["local_pope"], tmp_path / "out", limit=1)
    model.fail = True
    with pytest.raises(EvaluationError, match="1 of 1 tasks failed; local_pope: RuntimeError: asked to fail"):
        run.evaluate(checkpoint, data, ["local_pope"], tmp_path / "out", limit=2)
    assert not (tmp_path / "out" / "results.json").exists()


def test_bad_requests_are_refused_before_the_model_is_loaded(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmms, "load_checkpoint", lambda *_, **__: pytest.fail("the model was loaded"))
    out = tmp_path / "out"

    def refused(match: str, **changes: Any) -> None:
        arguments = {"checkpoint": checkpoint, "data": data, "tasks": ["local_gqa"], "out": out} | changes
        with pytest.raises(EvaluationError, match=match):
            run.evaluate(**arguments)

    refused("did you mean 'local_pope'", tasks=["local_poep"])
    refused("named twice", tasks=["local_gqa", "local_gqa"])
    refused("no task given", tasks=[])
    refused("limit must be", limit=0)
    refused("is not a directory", checkpoint=tmp_path / "nowhere")
    refused(r"has no config\.json", checkpoint=tmp_path)
    refused(r"needs .*gqa\.parquet, which does not exist.*did you mean --data", data=data.parent)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("which does not exist; build it", data=empty)
    (empty / "gqa.parquet").write_bytes(b"no parquet")
    refused("cannot be read as parquet", data=empty)


def test_bad_records_are_named(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    from datasets import Dataset, load_dataset

    def refused(match: str, task: str, change: Any) -> None:
        file = LOCAL_TASKS.get(task).file
        dataset = load_dataset("parquet", data_files=str(data / file), split="train", cache_dir=str(tmp_path / "hf"))
        changed: Dataset = change(dataset)
        changed.to_parquet(tmp_path / file)
        with pytest.raises(EvaluationError, match=match):
            run.evaluate(checkpoint, tmp_path, [task], tmp_path / "out")

    def with_column(name: str, values: list[Any]) -> Any:
        return lambda dataset: dataset.remove_columns(name).add_column(name, values)

    refused("missing columns family", "local_gqa", lambda d: d.remove_columns("family"))
    refused("id 'x' occurs twice", "local_gqa", with_column("id", ["x"] * 10))
    refused("record 'p0' has the answer 'Yes'; allowed: no, yes", "local_pope", with_column("answer", ["Yes"] * 10))
    refused("index 7 occurs twice", "local_mmbench", with_column("index", [7] * 10))
    refused("whole index", "local_mmbench", with_column("index", [10**6 + i for i in range(10)]))
    refused("holds no records", "local_gqa", lambda d: d.select([]))
    refused(r"datasets\.Image", "local_gqa", with_column("image", ["0.png"] * 10))


def test_unknown_official_task_has_near_misses(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = argparse.Namespace(all_tasks=["gqa", "mmbench_en_dev_static"])  # the real index takes ten seconds
    monkeypatch.setattr(prepared, "index", lambda include_defaults: manager)
    with pytest.raises(EvaluationError, match="did you mean 'mmbench_en_dev_static'"):
        run.evaluate(checkpoint, data, ["mmbench_en_dev_statik"], tmp_path / "out")


def test_a_scorer_that_disagrees_is_noticed(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    monkeypatch.setattr(MMBench_Evaluator, "calculate_hit_rates", lambda self, data: (0.3, {}, {}))
    with pytest.raises(EvaluationError, match="10 of 10 answers were judged correct"):
        run.evaluate(checkpoint, data, ["local_mmbench"], tmp_path / "out")


def test_command_scores_several_checkpoints_and_the_summary_reads_them(
    data: Path, checkpoint: Path, model: fakes.FakeModel, tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    other = fakes.write_checkpoint(tmp_path / "other")
    common = ["--data", str(data), "--tasks", ",".join(TASKS), "--batch-size", "8"]
    both = [str(checkpoint), str(other), *common, "--blind", str(other), "--out", str(tmp_path / "runs")]
    assert run.main(parser.parse_args(both)) == 0
    assert (tmp_path / "runs" / "other" / "results.json").is_file()
    assert run.main(parser.parse_args([str(other), *common, "--out", str(tmp_path / "one"), "--blank-images"])) == 0
    for folder in (tmp_path / "runs" / "blank", tmp_path / "one"):
        assert json.loads((folder / "results.json").read_text())["arguments"]["blank_images"] is True

    results = summarize.summarize(
        tmp_path / "runs" / "checkpoint",
        tmp_path / "runs" / "other",
        tmp_path / "runs" / "blank",
        data / "priors.json",
        tmp_path / "summary",
        seconds={"score": 1.0},
        upcycle={"max_abs_logit_error": 0.0},
        versions={"torch": "2"},
    )
    names = ["shapes_open", "emoji_kind", "shapes_yesno", "presence", "choice", "all_yesno"]
    assert list(results["tasks"]) == names
    assert results["tasks"]["all_yesno"]["n"] == 10
    assert results["tasks"]["all_yesno"]["blind"] == 0.5
    assert results["tasks"]["shapes_open"]["moe"] == 1.0
    assert results["tasks"]["shapes_open"]["blind"] == pytest.approx(2 / 6)  # red, by the training prior


def test_out_folders_tell_checkpoints_apart() -> None:
    out = Path("o")
    assert run.out_folders([Path("/r/moe/last")], out) == [out]
    assert run.out_folders([Path("/r/moe"), Path("/r/dense")], out) == [out / "moe", out / "dense"]
    assert run.out_folders([Path("/r/moe/last"), Path("/r/dense/last")], out) == [
        out / "moe__last",
        out / "dense__last",
    ]
    with pytest.raises(EvaluationError, match="twice"):
        run.out_folders([Path("/r/moe"), Path("/r/../r/moe")], out)


def test_read_samples_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist"):
        records.read_samples(tmp_path)
    (tmp_path / "results.json").write_text('{"tasks": {"local_gqa": {}}}')
    with pytest.raises(EvaluationError, match=r"samples_local_gqa\.jsonl is missing"):
        records.read_samples(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(EvaluationError, match="is not JSON"):
        records.read_samples(tmp_path)
