"""Alarms: each for what it is about and for nothing else, once, with advice that fits; and in real runs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import BalanceSection, RecipeError, RunConfig, StageSection, TelemetrySection
from llava_moe.moe import LayerPlan, MlpSpec, SiteKey, build_layer
from llava_moe.training import runner
from llava_moe.training.alarm_base import Setup
from llava_moe.training.alarm_kinds import ALARMS
from llava_moe.training.alarms import Alarms, CollapseError, check_telemetry, lines_of, summary
from llava_moe.training.metrics import FILE, read_metrics
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_model, tiny_moe, tiny_processor, write_tiny_checkpoint
from tests.training.runs import MOE_PARTS, make_config, start_ranks, torchrun, write_recipe

SETUP = Setup(losses={"switch": 0.01}, controllers={}, rates={"router": 1e-3, "experts": 1e-4})
EVEN: dict[str, Any] = {
    "load": [0.25, 0.25, 0.25, 0.25],
    "max_violation": 0.0,
    "experts_per_token": 1.0,
    "entropy_share": 0.6,
    "image_tokens": 0.6,
    "image_share": [0.6, 0.6, 0.6, 0.6],
}


def row(step: int, loss: float = 2.0, switch: float | None = None, **layer: Any) -> dict[str, Any]:
    """A log line of one decoder layer, healthy but for what is named."""
    value = 1.0 + 0.001 * step if switch is None else switch
    return {"step": step, "loss": loss, "switch": value, "layers": {"3": {**EVEN, **layer}}}


def tell(alarms: Alarms, rows: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Step to the names of the alarms that begin there."""
    found = {r["step"]: [record["alarm"] for record in alarms.update(r)] for r in rows}
    return {step: names for step, names in found.items() if names}


def rows_of(number: int, start: int = 1, **changes: Any) -> list[dict[str, Any]]:
    return [row(step, **changes) for step in range(start, start + number)]


SPIKES = [row(step, loss=2.0 + 0.01 * (step % 3)) for step in range(1, 21)]
# What raises each alarm, at which step, and the same just within its limits.
CASES: dict[str, tuple[list[dict[str, Any]], int, list[dict[str, Any]]]] = {
    "imbalance": (rows_of(9, max_violation=2.6), 5, rows_of(9, max_violation=2.5)),
    "dead_experts": (
        rows_of(9, load=[0.5, 0.49, 0.01, 0.0], dead=[2, 3]),
        5,
        [row(step, load=[0.5, 0.49, 0.01, 0.0], dead=[step % 4]) for step in range(1, 10)],
    ),
    "saturated": (rows_of(9, entropy_share=0.019), 5, rows_of(9, entropy_share=0.021)),
    "uniform": (
        rows_of(9, start=998, entropy_share=0.999),
        1005,
        rows_of(9, start=1, entropy_share=0.999) + rows_of(9, start=2000, entropy_share=0.99),
    ),
    "drops": (rows_of(9, drop_rate=0.21), 5, rows_of(9, drop_rate=0.2)),
    "images_to_one": (
        rows_of(9, load=[0.6, 0.2, 0.1, 0.1], image_share=[0.98, 0.02, 0.01, 0.01]),
        5,
        # the same for text: it is the load as a whole that is uneven
        rows_of(9, load=[0.8, 0.1, 0.05, 0.05], image_share=[0.72, 0.2, 0.0, 0.0])
        + rows_of(9, start=50, experts_per_token=3.0, image_share=[0.8, 0.8, 0.8, 0.0]),
    ),
    "no_gradient": (
        [{**r, "without_gradient": ["switch"]} for r in rows_of(3)],
        1,
        [{**r, "without_gradient": ["z"]} for r in rows_of(3)],  # a loss without a coefficient
    ),
    "constant_loss": (rows_of(9, switch=1.0), 6, rows_of(5, switch=1.0) + rows_of(9, start=6, switch=0.0)),
    "loss_spike": ([*SPIKES, row(21, loss=3.1)], 21, [*SPIKES, row(21, loss=2.9), *rows_of(3, start=22)]),
}


def test_every_alarm_has_a_case() -> None:
    assert set(CASES) == set(ALARMS.names())


@pytest.mark.parametrize("name", CASES)
def test_it_is_raised_for_its_reason_alone_and_once(name: str) -> None:
    beyond, step, within = CASES[name]
    assert tell(Alarms(TelemetrySection(), SETUP), beyond) == {step: [name]}
    assert tell(Alarms(TelemetrySection(), SETUP), within) == {}
    off = TelemetrySection(alarms={name: None})
    assert tell(Alarms(off, SETUP), beyond) == {}


def test_a_healthy_run_raises_none() -> None:
    """Entropy falls, loads sway, the loss sinks with noise, and ends where it may."""
    torch.manual_seed(0)
    rows = []
    for step in range(1, 200):
        load = (torch.ones(4) + 0.2 * torch.randn(4)).softmax(0)
        loss = 6 * math.exp(-step / 30) + 1.5 + 0.1 * float(torch.randn(()))
        rows.append(
            row(
                10 * step, loss=loss, load=load.tolist(), max_violation=float(load.max() * 4 - 1),
                entropy_share=0.99 - 0.003 * step, drop_rate=0.05,
            )
        )  # fmt: skip
    assert tell(Alarms(TelemetrySection(), SETUP), rows) == {}


@pytest.mark.parametrize(("experts", "k", "limit"), [(4, 2, 0.85), (8, 1, 4.0), (8, 2, 2.55), (64, 8, 4.0)])
def test_the_limit_of_an_imbalance_follows_what_is_possible(experts: int, k: int, limit: float) -> None:
    alarms = Alarms(TelemetrySection(alarms={"imbalance": {"lines": 1}}), SETUP)
    load = [1 / experts] * experts
    shape = {"load": load, "experts_per_token": float(k), "image_share": [0.6] * experts}
    assert alarms.update(row(1, max_violation=limit - 0.01, **shape)) == []
    assert [record["limit"] for record in alarms.update(row(2, max_violation=limit + 0.01, **shape))] == [limit]


def test_it_comes_again_only_after_it_was_over() -> None:
    """Two good lines are not the end of it; five are."""
    alarms = Alarms(TelemetrySection(), SETUP)
    bad, good = {"max_violation": 2.9}, {"max_violation": 0.1}
    rows = [*rows_of(9, **bad), *rows_of(2, start=10, **good), *rows_of(9, start=12, **bad)]
    rows += [*rows_of(5, start=30, **good), *rows_of(9, start=40, **bad)]
    assert tell(alarms, rows) == {5: ["imbalance"], 44: ["imbalance"]}


def test_a_resumed_run_goes_on_as_if_not_interrupted(tmp_path: Path) -> None:
    """Interrupted behind a checkpoint at step 4: the lines behind it run again, and one is cut off."""
    rows = CASES["imbalance"][0]
    (tmp_path / FILE).write_text("".join(f"{json.dumps(r)}\n" for r in rows[:6]) + '{"step": 7, "lo')
    for checkpoint, expected in ((4, {5: ["imbalance"]}), (6, {})):
        alarms = Alarms(TelemetrySection(), SETUP)
        alarms.resume(tmp_path, tmp_path / f"checkpoint-{checkpoint}")
        assert tell(alarms, rows[checkpoint:]) == expected


def test_sites_of_one_kind_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    alarms = Alarms(TelemetrySection(), SETUP)
    bad = {**EVEN, "load": [0.5, 0.5, 0.0, 0.0], "dead": [2, 3], "max_violation": 2.9}
    for step in range(1, 7):
        line = {"step": step, "loss": 2.0, "layers": {"0": bad, "1": EVEN, "2": {**bad, "max_violation": 2.95}}}
        alarms.watch(line)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert told[0].startswith(
        "alarm: step 5: imbalance in layers 0, 2: largest violation 2.95 (limit 2.55) for 5 log lines; "
    )
    assert "dead_experts in layers 0 (experts 2, 3), 2 (experts 2, 3): load of experts 0 (limit 0.025)" in told[1]
    assert [(r["alarm"], r["site"]) for r in line.get("alarms", [])] == []


@pytest.mark.parametrize(
    ("name", "setup", "advice"),
    [
        ("imbalance", SETUP, ["raise balance.losses.switch (now 0.01)", "lower stage.learning_rates.router (now 0."]),
        ("imbalance", dataclasses.replace(SETUP, losses={}), ["add balance.losses.switch: 0.01"]),
        ("imbalance", dataclasses.replace(SETUP, losses={"gshard": 0.5}), ["raise balance.losses.gshard (now 0.5)"]),
        ("imbalance", dataclasses.replace(SETUP, biased=True), ["add balance.controllers.loss_free_bias: {rate: 0."]),
        (
            "imbalance",
            dataclasses.replace(SETUP, biased=True, controllers={"loss_free_bias": {"rate": 0.002}}),
            ["raise balance.controllers.loss_free_bias.rate (now 0.002)"],
        ),
        ("imbalance", dataclasses.replace(SETUP, rates={"experts": 1e-4}), ["name router in stage.learning_rates"]),
        ("saturated", SETUP, ["add balance.losses.z: 0.001", "lower stage.learning_rates.router"]),
        ("uniform", SETUP, ["raise stage.learning_rates.router (now 0.001)", "lower balance.losses.switch (now 0.01)"]),
        ("drops", dataclasses.replace(SETUP, factors={"3": 1.25}), ["raise the factor of the capacity (now 1.25)"]),
        ("no_gradient", dataclasses.replace(SETUP, rates={}), ["name router in", "or remove balance.losses.switch"]),
    ],
)  # fmt: skip
def test_advice_speaks_of_the_recipe_at_hand(name: str, setup: Setup, advice: list[str]) -> None:
    alarms = Alarms(TelemetrySection(), setup)
    told = [line for r in CASES[name][0] for line in lines_of(r["step"], alarms.update(r))]
    assert len(told) == 1
    for words in advice:
        assert words in told[0]


def test_routers_that_do_not_learn_are_left_alone() -> None:
    """A hash is sure of every token by design; what a capacity drops is worth telling all the same."""
    setup = dataclasses.replace(SETUP, fixed=frozenset({"3"}))
    rows = rows_of(9, entropy_share=0.0, max_violation=2.9, dead=[0], drop_rate=0.5)
    assert tell(Alarms(TelemetrySection(), setup), rows) == {5: ["drops"]}


def test_a_router_that_keeps_pictures_apart_may_do_so() -> None:
    setup = dataclasses.replace(SETUP, by_modality=frozenset({"3"}))
    assert tell(Alarms(TelemetrySection(), setup), CASES["images_to_one"][0]) == {}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_spike(loss: float) -> None:
    assert tell(Alarms(TelemetrySection(), SETUP), [row(1), row(2, loss=loss)]) == {2: ["loss_spike"]}
    as_logged = {**row(2), "loss": None, "not_finite": ["loss"]}
    assert tell(Alarms(TelemetrySection(), SETUP), [row(1), as_logged]) == {2: ["loss_spike"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalanced": {}}, r"telemetry\.alarms: unknown alarm 'imbalanced'; did you mean 'imbalance'"),
        ({"imbalance": {"line": 3}}, r"telemetry\.alarms\.imbalance: alarm Imbalance has no option 'line'"),
        ({"imbalance": {"lines": 0}}, r"telemetry\.alarms\.imbalance: lines=0 must be a number of at least 1"),
        ({"imbalance": {"above": "much"}}, r"telemetry\.alarms\.imbalance: .*above='much' must be float"),
        ({"imbalance": 3}, r"telemetry\.alarms\.imbalance: 3 must be a mapping of options, or null for off"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Alarms(TelemetrySection(alarms=options), SETUP)


def test_wrong_options_are_refused_without_a_model() -> None:
    with pytest.raises(RecipeError, match=r"unknown alarm 'imbalanced'"):
        check_telemetry(TelemetrySection(alarms={"imbalanced": {}}))
    with pytest.raises(RecipeError, match=r"telemetry\.every=-1"):
        check_telemetry(TelemetrySection(every=-1))
    check_telemetry(TelemetrySection(alarms={"drops": {"above": 0.5}, "uniform": None}))


def test_the_setup_is_that_of_recipe_and_layers() -> None:
    spec = MlpSpec(8, 16, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    plans: dict[SiteKey, LayerPlan] = {
        ("decoder", 0): LayerPlan(4, "top_k", {}, capacity={"factor": 1.5}),
        ("decoder", 2): LayerPlan(4, "hash", {}),
        ("decoder", 4): LayerPlan(4, "modality", {"mode": "experts"}),
        ("decoder", 6): LayerPlan(4, "modality", {"mode": "routers"}),
        ("vision", 1): LayerPlan(4, "deepseek_v3", {}),
    }
    layers = {site: build_layer(plan, spec, site[1], site[0]) for site, plan in plans.items()}
    config = RunConfig(
        stage=StageSection("moe", {"router": 1e-3}),
        balance=BalanceSection({"switch": {"coefficient": 0.02}, "z": None}, {"loss_free_bias": {"rate": 0.01}}),
    )
    setup = Setup.of(config, layers)
    assert setup == Setup(
        losses={"switch": 0.02},
        controllers={"loss_free_bias": {"rate": 0.01}},
        rates={"router": 1e-3},
        biased=True,
        fixed=frozenset({"2"}),
        by_modality=frozenset({"4"}),
        factors={"0": 1.5},
    )
    assert not Setup.of(config, {site: layers[site] for site in list(layers)[:4]}).biased


def write_planted(folder: Path) -> Path:
    """A checkpoint whose selection bias sends every token of layer 2 to expert 1 first; layer 0 has none."""
    model = tiny_model(tiny_moe(router={"name": "deepseek_v3", "args": {"k": 2}}))
    layer = model.model.language_model.layers[2].mlp
    layer.router.selector.get_buffer("selection_bias_E")[1] = 1e4
    model.save_pretrained(folder, save_original_format=True)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "checkpoint")


RATES = dict.fromkeys(MOE_PARTS, 1e-5)
LINES = {"imbalance": {"lines": 3}, "dead_experts": {"lines": 3}, "saturated": {"lines": 3}}


def test_a_planted_collapse_stops_the_run_or_is_told(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token of layer 2 uses expert 1: exactly the imbalance of exactly that layer, once. With `stop` the run ends
    at that line without a checkpoint of it; told to warn, the same run goes on in the same folder."""
    config = make_config(
        tmp_path,
        planted,
        write_llava_json(tmp_path / "data", 8, text_only_every=4),
        stage={"learning_rates": RATES},
        balance={"losses": {"switch": 0.01}},
        telemetry={"on_collapse": "stop", "alarms": LINES},
        train={"max_steps": 5, "per_device_train_batch_size": 8, "save_steps": 1},
    )
    out = Path(config.output_dir)
    with pytest.raises(CollapseError, match=r"on_collapse=stop: step 3: imbalance in layer 2: .*on_collapse=warn"):
        runner.train(config)
    assert capsys.readouterr().out.count("alarm: ") == 1
    assert not (out / "done.json").exists()
    assert [r["step"] for r in read_metrics(out)] == [1, 2, 3]
    assert runner.last_whole_checkpoint(out) == out / "checkpoint-2"
    warned = dataclasses.replace(config, telemetry=dataclasses.replace(config.telemetry, on_collapse="warn"))
    runner.train(warned)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm: ")]
    assert len(told) == 1
    assert "step 3: imbalance in layer 2: largest violation 1 (limit 0.85) for 3 log lines; raise " in told[0]
    assert "add balance.controllers.loss_free_bias" in told[0]  # this router has the knob
    rows = read_metrics(out)
    assert [(r["step"], a["alarm"], a["site"]) for r in rows for a in r.get("alarms", [])] == [(3, "imbalance", "2")]
    (kept,) = json.loads((out / "done.json").read_text())["alarms"]
    assert (kept["alarm"], kept["site"], kept["first_step"], kept["times"]) == ("imbalance", "2", 3, 1)
    assert [kept] == summary(out)


def test_a_balance_loss_that_nothing_learns_from_is_told(tmp_path: Path) -> None:
    """Only the experts of the first layer learn, and its router sees nothing of them."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", tiny_moe(layers=[0]))
    config = make_config(
        tmp_path,
        checkpoint,
        write_llava_json(tmp_path / "data", 4),
        stage={"learning_rates": {"experts": 1e-3}},
        balance={"losses": {"switch": 0.01}},
    )
    runner.train(config)
    (told,) = summary(config.output_dir)
    assert (told["alarm"], told["loss"], told["site"], told["first_step"]) == ("no_gradient", "switch", None, 1)
    assert told["advice"].startswith("name router in stage.learning_rates")


@pytest.mark.slow
def test_two_ranks_stop_together(planted: Path, tmp_path: Path) -> None:
    """Both have the same rows, so both raise the same alarm at the same step; the first alone tells it."""
    recipe = write_recipe(
        tmp_path,
        planted,
        write_llava_json(tmp_path / "data", 8),
        stage={"learning_rates": RATES},
        telemetry={"on_collapse": "stop", "alarms": LINES},
        train={"max_steps": 5, "per_device_train_batch_size": 4},
    )
    ended = start_ranks(torchrun(2), ["llava_moe.train", str(recipe)], timeout=120)
    assert ended.returncode != 0
    assert ended.stdout.count("alarm: step 3: imbalance in layer 2: ") == 1, ended.stdout[-3000:]
    assert "error: telemetry.on_collapse=stop: step 3: imbalance in layer 2" in ended.stdout
    assert [r["step"] for r in read_metrics(tmp_path / "out")] == [1, 2, 3]
