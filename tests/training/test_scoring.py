"""Scores while a run trains: those of the saved model, and nothing else of the run changes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.evaluation.live import LiveScorer
from llava_moe.evaluation.run import evaluate
from llava_moe.training import runner, scoring
from llava_moe.training.dry_run import describe
from llava_moe.training.metrics import FILE, read_metrics
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.evaluation.fakes import write_records
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_moe, write_tiny_checkpoint
from tests.training.runs import MOE_PARTS, losses, make_config, stopping_trainer, write_recipe

QUESTION = "What color is the square?\nAnswer the question using a single word or phrase."
STEPS, EVERY, LIMIT = 6, 3, 6
RIGHT = 2 / LIMIT  # of the first six records, the first and the sixth are red, which is all that the data below teach


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint whose routers draw noise in training: a random state that was moved shows in the losses."""
    moe = tiny_moe(router={"name": "noisy_top_k", "args": {"k": 2}})
    return write_tiny_checkpoint(tmp_path_factory.mktemp("noisy") / "checkpoint", moe)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pictures with the question of the records, and the answer red."""
    path, images = write_llava_json(tmp_path_factory.mktemp("data"), 8)
    raw = json.loads(path.read_text())
    for record in raw:
        record["conversations"] = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    path.write_text(json.dumps(raw))
    return path, images


def recipe(folder: Path, checkpoint: Path, data: tuple[Path, Path], records: Path | None, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "stage": {"learning_rates": MOE_PARTS},
        "balance": {"losses": {"switch": 0.1}},
        "train": {"max_steps": STEPS, "gradient_accumulation_steps": 2, "save_steps": 2, "report_to": "none"},
    }
    if records is not None:
        sections["scoring"] = {"data": str(records), "tasks": ["local_gqa"], "every": EVERY, "limit": LIMIT}
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value}
    return make_config(folder, checkpoint, data, **sections)


def scores(config: RunConfig) -> dict[int, dict[str, float]]:
    return {row["step"]: row["scores"] for row in read_metrics(config.output_dir) if "scores" in row}


def bits(config: RunConfig) -> dict[str, Any]:
    """All that training made, to the last bit."""
    out = Path(config.output_dir)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {
        "rows": [(row["step"], row["loss"], row["grad_norm"]) for row in history if "loss" in row],
        "weights": (out / "model" / "model.safetensors").read_bytes(),
    }


class _Logger(TrainerCallback):  # type: ignore[misc]
    """What TensorBoard and others are given."""

    def __init__(self, found: dict[int, float]) -> None:
        self.found = found

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "scores/local_gqa" in logs:
            self.found[state.global_step] = logs["scores/local_gqa"]


def _with_logger(found: dict[int, float]) -> Any:
    def make(*args: Any, **kwargs: Any) -> LlavaMoeTrainer:
        made = LlavaMoeTrainer(*args, **kwargs)
        made.add_callback(_Logger(found))
        return made

    return make


def score_of(config: RunConfig, final: Path, records: Path, out: Path) -> float:
    """The score of the saved model by `llava-moe eval`, which must be that of the last step, answer by answer."""
    found = evaluate(final, records, ["local_gqa"], out, limit=LIMIT)
    of_step = Path(config.output_dir) / "scores" / f"step-{STEPS}"
    samples = [(folder / "samples_local_gqa.jsonl").read_text() for folder in (out, of_step)]
    assert samples[0] == samples[1]
    assert json.loads((of_step / "results.json").read_text())["tasks"] == found["tasks"]
    return float(found["tasks"]["local_gqa"]["score"])


@pytest.fixture(scope="module")
def runs(
    noisy: Path, data: tuple[Path, Path], records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, RunConfig, dict[int, float]]:
    """The same run without and with scoring, and what the loggers of the latter were given."""
    folder, logged = tmp_path_factory.mktemp("runs"), dict[int, float]()
    plain, scored = recipe(folder / "plain", noisy, data, None), recipe(folder / "scored", noisy, data, records)
    runner.train(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LlavaMoeTrainer", _with_logger(logged))
        runner.train(scored)
    return plain, scored, logged


def test_a_scored_run_is_the_unscored_run(
    runs: tuple[RunConfig, RunConfig, dict[int, float]], records: Path, tmp_path: Path
) -> None:
    plain, scored, logged = runs
    assert bits(scored) == bits(plain)
    assert list(scores(scored)) == [EVERY, STEPS]
    assert scores(scored)[STEPS] == {"local_gqa": RIGHT}
    assert score_of(scored, Path(scored.output_dir) / "model", records, tmp_path) == RIGHT
    assert {step: {"local_gqa": value} for step, value in logged.items()} == scores(scored)
    row = next(row for row in read_metrics(scored.output_dir) if row["step"] == EVERY)
    assert row["pause"] > 0.9 * row["scoring_seconds"] > 0


def test_what_is_put_back_would_be_missed(
    runs: tuple[RunConfig, RunConfig, dict[int, float]],
    noisy: Path,
    data: tuple[Path, Path],
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail: without putting back, the noise of the routers is another one."""
    careless = recipe(tmp_path, noisy, data, records)
    monkeypatch.setattr(scoring, "untouched", lambda model: contextlib.nullcontext())
    runner.train(careless)
    before, after = losses(runs[0].output_dir), losses(careless.output_dir)
    assert [before[step] == after[step] for step in range(1, STEPS + 1)] == [True] * EVERY + [False] * (STEPS - EVERY)


@pytest.mark.slow
def test_bfloat16_is_scored_as_the_saved_weights_are(
    noisy: Path, data: tuple[Path, Path], records: Path, tmp_path: Path
) -> None:
    """Autocast is off while the model answers, and on again afterwards; checkpointing does not run in answers."""
    train = {"bf16": True, "activation_checkpointing": True}
    plain = recipe(tmp_path / "plain", noisy, data, None, train=train)
    scored = recipe(tmp_path / "scored", noisy, data, records, train=train)
    runner.train(plain)
    final = runner.train(scored)
    assert bits(scored) == bits(plain)
    assert score_of(scored, final, records, tmp_path / "eval") == scores(scored)[STEPS]["local_gqa"] == RIGHT


@pytest.mark.slow
def test_adapters_answer_as_the_merged_model_does(
    noisy: Path, data: tuple[Path, Path], records: Path, tmp_path: Path
) -> None:
    """During the run they stand beside the weights, in the saved model they are part of them."""
    config = recipe(
        tmp_path / "run",
        noisy,
        data,
        records,
        stage={"learning_rates": {"lora": 3e-2, "projector": 1e-2, "router": 1e-2, "embeddings": 1e-2}},
        lora={"rank": 4, "alpha": 8.0},
    )
    final = runner.train(config)
    assert score_of(config, final, records, tmp_path / "eval") == scores(config)[STEPS]["local_gqa"]


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def _stop() -> None:
    raise StoppedError


@pytest.mark.slow
def test_a_resumed_run_scores_every_step_once(
    runs: tuple[RunConfig, RunConfig, dict[int, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 4, behind the scoring of step 3 and the checkpoint of step 2; and in step 5."""
    whole, calls = runs[1], []
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
    real = LiveScorer.score

    def counted(self: Any, model: Any, processor: Any, out: Path) -> Any:
        calls.append(out.name)
        return real(self, model, processor, out)

    monkeypatch.setattr(LiveScorer, "score", counted)
    for stop in (4, 5):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "LlavaMoeTrainer", stopping_trainer(stop, _stop))
            with pytest.raises(StoppedError):
                runner.train(broken)
    runner.train(broken)
    # the second process goes on from step 2 and runs step 3 again, the third from step 4
    assert calls == ["step-3", "step-3", "step-6"]
    assert scores(broken) == scores(whole)
    assert list(scores(broken)) == [3, 6]
    assert bits(broken) == bits(whole)


def test_a_run_may_go_on_with_another_scoring(
    runs: tuple[RunConfig, RunConfig, dict[int, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes nothing of the run, so it is no other recipe; here both runs are finished."""
    plain, scored, _ = runs
    for config in (
        dataclasses.replace(plain, scoring=scored.scoring),
        dataclasses.replace(scored, scoring=None),
        dataclasses.replace(scored, scoring=dataclasses.replace(scored.scoring, every=1)),
    ):
        runner.train(config)
        assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every": 0}, r"scoring\.every=0 must be a whole number of at least 1"),
        ({"limit": 0}, r"scoring\.limit=0 must be"),
        ({"batch_size": 0}, r"scoring\.batch_size=0 must be"),
        ({"tasks": []}, r"scoring\.tasks is empty"),
        ({"tasks": ["local_gpa"]}, r"scoring\.tasks: 'local_gpa' is no local task; did you mean 'local_gqa'"),
        ({"tasks": ["gqa"]}, r"scoring\.tasks: 'gqa' is no local task"),
        ({"tasks": ["local_gqa", "local_gqa"]}, r"scoring: .*named twice"),
        ({"data": "/nowhere"}, r"scoring: task 'local_gqa' needs /nowhere/gqa\.parquet, which does not exist"),
    ],
)
def test_a_wrong_section_is_refused_before_the_first_step(
    section: dict[str, Any], message: str, noisy: Path, data: tuple[Path, Path], records: Path, tmp_path: Path
) -> None:
    config = recipe(tmp_path, noisy, data, records, scoring=section)
    with pytest.raises(RecipeError, match=message):
        runner.train(config)
    assert not (tmp_path / "out" / FILE).exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_what_leaves_ranks_with_parts_of_the_model_is_refused(
    noisy: Path, data: tuple[Path, Path], records: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, noisy, data, scoring={"data": str(records), "tasks": ["local_gqa"], "every": 10})
    describe(str(path), load_recipe(path, ["deepspeed=scripts/deepspeed/zero2.json"]))
    with pytest.raises(RecipeError, match=r"scoring: ZeRO-3 \(.*zero3\.json\).*use ZeRO-2.*llava-moe eval"):
        describe(str(path), load_recipe(path, ["deepspeed=scripts/deepspeed/zero3.json"]))
    with pytest.raises(RecipeError, match=r"scoring: expert_parallel=2 leaves each rank with a part of the experts"):
        describe(str(path), load_recipe(path, ["deepspeed=scripts/deepspeed/zero2.json", "expert_parallel=2"]))
    with pytest.raises(RecipeError, match=r"unknown key scoring\.evry; did you mean 'every'"):
        load_recipe(path, ["scoring.evry=3"])
    with pytest.raises(RecipeError, match=r"scoring needs train\.logging_strategy: steps"):
        runner.train(load_recipe(path, ["train.logging_strategy=epoch"]))
    with pytest.raises(RecipeError, match=r"scoring\.every=10 must be a multiple of train\.logging_steps=4"):
        runner.train(load_recipe(path, ["train.logging_steps=4"]))


def test_modes_and_random_states_are_put_back() -> None:
    """Also of parts that stay in eval mode while the rest trains, as a frozen tower's norms do."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model.train()
    model[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with contextlib.suppress(StoppedError), scoring.untouched(model):
        model.eval()
        torch.rand(5)
        raise StoppedError  # also where scoring fails
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.equal(torch.rand(2), expected)
