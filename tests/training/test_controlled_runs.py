"""Controllers in real runs: what they see, what they move, and which recipes are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import BalanceSection, RecipeError, load_recipe
from llava_moe.model.assemble import load_model
from llava_moe.moe import LayerPlan, MlpSpec, build_layer
from llava_moe.moe.controllers import StepStats, StepSums
from llava_moe.training import runner
from llava_moe.training.controllers import Controllers, moe_layers
from llava_moe.training.dry_run import describe
from llava_moe.training.metrics import read_metrics
from tests.tiny import write_llava_json
from tests.training.controlled import SECTIONS, buffers, final_buffers
from tests.training.runs import make_config, make_trainer, write_recipe


def test_a_bias_moves_by_its_rate_in_every_step(biased: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        biased,
        write_llava_json(tmp_path / "data", 4),
        **SECTIONS,
        balance={"controllers": {"loss_free_bias": {"rate": 0.25}}},
        train={"max_steps": 3},
    )
    runner.train(config)
    found = final_buffers(config)
    assert len(found) == 2
    for name, bias in found.items():
        assert name.endswith("selection_bias_E")
        steps = bias / 0.25
        assert torch.equal(steps, steps.round())
        assert 0 < steps.abs().max() <= 3
    rows = read_metrics(config.output_dir)
    assert rows[0]["controllers"]["loss_free_bias"]["largest_bias"] == 0.25


class Spy(StepSums):
    """Keeps what the controllers were given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[StepStats] = []

    def finish(self, step: int, num_steps: int) -> StepStats:
        self.seen.append(super().finish(step, num_steps))
        return self.seen[-1]


@pytest.mark.slow
def test_micro_batches_are_added_up(biased: Path, tmp_path: Path) -> None:
    """One batch of four records moves the knobs as four micro-batches of one do, and both as their joint load says."""
    found = []
    for accumulation in (1, 4):
        config = make_config(
            tmp_path / str(accumulation),
            biased,
            write_llava_json(tmp_path / f"data{accumulation}", 4),
            **SECTIONS,
            balance={"controllers": {"loss_free_bias": {"rate": 1.0}}},
            train={
                "max_steps": 1,
                "per_device_train_batch_size": 4 // accumulation,
                "gradient_accumulation_steps": accumulation,
                "train_sampling_strategy": "sequential",
            },
        )
        made = make_trainer(config)
        spy = Spy()
        made.controllers._sums = spy
        made.train()
        found.append((buffers(made.model), spy.seen[0].layers))
    assert found[0][0].keys() == found[1][0].keys()
    for site, stats in found[0][1].items():
        assert stats.load_E.sum() == 2 * stats.num_tokens
        for key, value in vars(stats).items():
            torch.testing.assert_close(value, getattr(found[1][1][site], key), msg=key)
    for name, bias in found[0][0].items():
        assert torch.equal(bias, found[1][0][name])
        assert bias.abs().max() == 1


def test_lambda_drives_the_loss_and_is_logged(gated: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    losses = {"losses": {"relu_l1": 1.0}}
    driven = {**losses, "controllers": {"remoe_lambda": {"initial": 0.01, "rate": 1.5}}}
    found = []
    for name, balance in (("plain", losses), ("driven", driven)):
        config = make_config(tmp_path / name, gated, data, **SECTIONS, balance=balance, train={"max_steps": 3})
        make_trainer(config).train()
        found.append(read_metrics(config.output_dir))
    plain, rows = found
    # about half of the gates are open at the start, more than one of four, so the pressure grows
    assert [row["controllers"]["remoe_lambda"]["lambda"] for row in rows] == pytest.approx([0.015, 0.0225, 0.03375])
    for row in rows:
        assert 0 < row["controllers"]["remoe_lambda"]["sparsity"] < 0.75
        assert row["loss"] == pytest.approx(row["cross_entropy"] + row["relu_l1"], rel=1e-5)  # with the factor in it
    assert rows[0]["relu_l1"] == pytest.approx(0.01 * plain[0]["relu_l1"], rel=1e-5)


def test_alpha_and_drop_rates(capped: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        capped,
        write_llava_json(tmp_path / "data", 4),
        **SECTIONS,
        balance={"losses": {"switch": 1.0}, "controllers": {"skywork_alpha": {"decay": 0.5}}},
        train={"max_steps": 2},
    )
    made = make_trainer(config)
    made.train()
    rows = read_metrics(config.output_dir)
    assert rows[0]["switch"] == 0  # alpha is 0 until something was dropped
    assert 0 < rows[1]["switch"] < 0.01
    for row in rows:
        assert all(0.2 < layer["drop_rate"] < 0.8 for layer in row["layers"].values())
    rates = [layer["drop_rate"] for layer in rows[0]["layers"].values()]
    alpha = [0.5 * min(0.2 * rate, 0.01) for rate in rates]
    told = rows[0]["controllers"]["skywork_alpha"]
    assert told["mean"] == pytest.approx(sum(alpha) / 2, rel=1e-3)
    assert told["largest"] == pytest.approx(max(alpha), rel=1e-3)


def test_the_capacity_follows_its_plan(capped: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        capped,
        write_llava_json(tmp_path / "data", 4),
        **SECTIONS,
        balance={"controllers": {"capacity": {"largest": 4.0, "smallest": 0.5}}},
        train={"max_steps": 2},
    )
    runner.train(config)
    rates = [row["layers"]["0"]["drop_rate"] for row in read_metrics(config.output_dir)]
    assert rates[0] == 0  # four times the mean load is every token
    assert all(float(factor) == 0.5 for factor in final_buffers(config).values())


def test_evaluation_moves_nothing(biased: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        biased,
        write_llava_json(tmp_path / "data", 4),
        **SECTIONS,
        balance={"controllers": {"loss_free_bias": {"rate": 0.25}}},
    )
    made = make_trainer(config)
    made.current_gradient_accumulation_steps = 1
    batch = made.data_collator([made.train_dataset[0]])
    made.compute_loss(made.model.eval(), batch)
    assert made.controllers._sums.finish(1, 1).layers == {}
    made.compute_loss(made.model.train(), batch)
    assert set(made.controllers._sums.finish(1, 1).layers) == {("decoder", 0), ("decoder", 2)}


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"controllers": {"loss_free_bais": {}}}, "controllers: unknown controller 'loss_free_bais'; did you mean"),
        ({"controllers": {"loss_free_bias": {"rat": 1}}}, r"controllers\.loss_free_bias: .*no option 'rat'.*'rate'"),
        ({"controllers": {"loss_free_bias": {"rate": -1.0}}}, r"controllers\.loss_free_bias: .*rate=-1\.0"),
        ({"controllers": {"loss_free_bias": {}}}, r"controllers\.loss_free_bias: .*use the router deepseek_v3"),
        ({"controllers": {"k_schedule": {"start": 1}}}, r"controllers\.k_schedule: .*needs the option 'end'"),
        ({"controllers": {"loss_free_bias": 3}}, r"controllers\.loss_free_bias=3 must be a mapping"),
        ({"losses": {"null_reward": 1.0}}, r"losses\.null_reward: layer 0: .*'null_prob_T'.*use the router tc_moe"),
        ({"losses": {"switch": "x"}}, r"losses\.switch: coefficient='x'"),
    ],
)
def test_a_wrong_balance_section_is_named(
    balance: dict[str, Any], message: str, moe_checkpoint: Path, tmp_path: Path
) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    recipe = write_recipe(tmp_path, moe_checkpoint, data, **SECTIONS, balance=balance)
    with pytest.raises(RecipeError, match=rf"balance\.{message}"):
        make_trainer(load_recipe(recipe))
    with pytest.raises(RecipeError, match=rf"balance\.{message}"):
        describe(str(recipe), load_recipe(recipe))


def test_a_driven_loss_must_be_named(gated: Path, tmp_path: Path) -> None:
    section = BalanceSection(losses={"z": 1.0}, controllers={"remoe_lambda": {}})
    layers = moe_layers(load_model(gated))
    with pytest.raises(RecipeError, match=r"controllers\.remoe_lambda drives the loss relu_l1; name it"):
        Controllers.build(section, layers, ["z"])
    assert Controllers.build(section, layers, ["z", "relu_l1"]).by_name.keys() == {"remoe_lambda"}


def test_a_competition_without_its_loss_is_refused() -> None:
    """The router would get no gradient in such a step; other ranks would wait for it."""
    spec = MlpSpec(8, 12, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    layer = build_layer(LayerPlan(4, router="compete_smoe"), spec)
    section = BalanceSection(controllers={"competition": {}})
    with pytest.raises(RecipeError, match=r"controllers\.competition drives the loss competition; name it"):
        Controllers.build(section, {layer.site: layer}, ["switch"])
    assert Controllers.build(section, {layer.site: layer}, ["competition"]).by_name.keys() == {"competition"}


def test_null_leaves_out_what_a_base_recipe_names(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    both = {"losses": {"switch": 0.1, "z": 0.01}, "controllers": {"loss_free_bias": {"rate": 0.1}}}
    write_recipe(tmp_path, moe_checkpoint, data, **SECTIONS, balance=both).rename(tmp_path / "base.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\nbalance: {losses: {switch: null}, controllers: {loss_free_bias: null}}\n")
    made = make_trainer(load_recipe(child, ["balance.losses.z.coefficient=0.5"]))
    assert made.balance.coefficients == {"z": 0.5}
    assert made.controllers.by_name == {}


def test_a_dry_run_builds_the_controllers(biased: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    recipe = write_recipe(tmp_path, biased, data, **SECTIONS, balance={"controllers": {"loss_free_bias": {}}})
    assert "loss_free_bias" in describe(str(recipe), load_recipe(recipe))
