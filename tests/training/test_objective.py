"""The gradients that the optimiser really gets: free of accumulation, world size, padding and checkpointing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava_moe.config import BalanceSection, RecipeError
from llava_moe.data.collator import Collator
from llava_moe.model.assemble import load_model
from llava_moe.moe import BALANCE_LOSSES, LayerPlan, MlpSpec, RoutingContext, SiteKey, build_layer
from llava_moe.training.controllers import moe_layers
from llava_moe.training.metrics import read_metrics
from llava_moe.training.objective import Balance, balance_terms, combine
from tests.training.runs import (
    MOE_PARTS,
    make_config,
    make_trainer,
    repeated_data,
    start_ranks,
    step_gradients,
    torchrun,
    unequal_data,
    write_recipe,
)

BALANCE = {"switch": 0.7, "z": 0.3}
MOE_STAGE = {"learning_rates": MOE_PARTS}
NO_CLIP = {"max_steps": 1, "max_grad_norm": 0, "train_sampling_strategy": "sequential"}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def mean_over_tokens_gradients(checkpoint: Path, data: tuple[Path, Path], folder: Path) -> dict[str, torch.Tensor]:
    """The plain definition: all samples in one batch, the mean over its label tokens, backward."""
    made = make_trainer(make_config(folder, checkpoint, data, stage=MOE_STAGE))
    batch = made.data_collator([made.train_dataset[i] for i in range(len(made.train_dataset))])
    model = made.model
    hidden = model.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")})[0]
    logits = model.lm_head(hidden)[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def once_balanced(
    moe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder, and the balance gradient of one micro-batch of two samples: one process, no accumulation."""
    folder = tmp_path_factory.mktemp("balanced")
    data = repeated_data(folder / "once", 2, 1)
    config = make_config(
        folder / "a1", moe_checkpoint, data, stage=MOE_STAGE, balance={"losses": BALANCE}, train=NO_CLIP
    )
    return folder, step_gradients(config, use_cross_entropy=False)


def test_balance_reaches_the_router_and_nothing_behind_it(
    once_balanced: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    gradients = once_balanced[1]
    routers = [name for name in gradients if ".mlp.router." in name]
    assert len(routers) == 2
    assert all(gradients[name].abs().max() > 1e-4 for name in routers)
    assert gradients["lm_head.weight"].abs().max() == 0


@pytest.mark.parametrize("accumulation", [2, 4])
def test_balance_gradient_is_free_of_accumulation(
    accumulation: int, once_balanced: tuple[Path, dict[str, torch.Tensor]], moe_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(
        tmp_path,
        moe_checkpoint,
        repeated_data(tmp_path / "data", 2, accumulation),
        stage=MOE_STAGE,
        balance={"losses": BALANCE},
        train={**NO_CLIP, "gradient_accumulation_steps": accumulation},
    )
    assert_same(step_gradients(config, use_cross_entropy=False), once_balanced[1])


def test_balance_gradient_in_a_short_last_step(
    once_balanced: tuple[Path, dict[str, torch.Tensor]], moe_checkpoint: Path, tmp_path: Path
) -> None:
    """Three micro-batches and accumulation 2: the second step of the epoch has one micro-batch only."""
    config = make_config(
        tmp_path,
        moe_checkpoint,
        repeated_data(tmp_path / "data", 2, 3),
        stage={"learning_rates": dict.fromkeys(MOE_PARTS, 0.0)},
        balance={"losses": BALANCE},
        train={**NO_CLIP, "max_steps": 2, "gradient_accumulation_steps": 2},
    )
    assert_same(step_gradients(config, use_cross_entropy=False), once_balanced[1])


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_cross_entropy_gradient_is_the_mean_over_all_tokens(
    accumulation: int, moe_checkpoint: Path, tmp_path: Path
) -> None:
    data = unequal_data(tmp_path / "data")
    expected = mean_over_tokens_gradients(moe_checkpoint, data, tmp_path / "plain")
    train = {
        **NO_CLIP,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    config = make_config(tmp_path / "run", moe_checkpoint, data, stage=MOE_STAGE, train=train)
    assert_same(step_gradients(config), expected)


@pytest.mark.slow
def test_gradients_are_free_of_world_size(
    once_balanced: tuple[Path, dict[str, torch.Tensor]], moe_checkpoint: Path, tmp_path: Path
) -> None:
    """Two ranks with the same micro-batch, with and without accumulation; and two ranks with unequal batches."""
    cases = []
    for accumulation in (1, 2):
        # Batches go to the ranks in turn, so both get the same two records each time.
        recipe = write_recipe(
            tmp_path / f"a{accumulation}",
            moe_checkpoint,
            repeated_data(tmp_path / f"data{accumulation}", 2, 2 * accumulation),
            stage=MOE_STAGE,
            balance={"losses": BALANCE},
            train={**NO_CLIP, "gradient_accumulation_steps": accumulation},
        )
        cases.append({"recipe": str(recipe), "use_cross_entropy": False})
    data = unequal_data(tmp_path / "unequal")
    for batch, accumulation in ((2, 1), (1, 2)):
        train = {**NO_CLIP, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        recipe = write_recipe(tmp_path / f"ce{accumulation}", moe_checkpoint, data, stage=MOE_STAGE, train=train)
        cases.append({"recipe": str(recipe), "use_cross_entropy": True})
    out = tmp_path / "gradients.pt"
    done = start_ranks(torchrun(2), ["tests.training.runs", str(out), *map(json.dumps, cases)])
    assert done.returncode == 0, done.stdout[-4000:]
    found = torch.load(out)
    assert_same(found[0], once_balanced[1])
    assert_same(found[1], once_balanced[1])
    expected = mean_over_tokens_gradients(moe_checkpoint, data, tmp_path / "plain")
    assert_same(found[2], expected)
    assert_same(found[3], expected)


def test_checkpointing_keeps_every_gradient(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = unequal_data(tmp_path / "data")
    found = {}
    for name, extra in (("plain", {}), ("checkpointed", {"activation_checkpointing": True})):
        config = make_config(
            tmp_path / name,
            moe_checkpoint,
            data,
            stage=MOE_STAGE,
            balance={"losses": BALANCE},
            train={**NO_CLIP, **extra},
        )
        found[name] = step_gradients(config)
    assert_same(found["checkpointed"], found["plain"])


def test_padding_changes_nothing(moe_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, moe_checkpoint, unequal_data(tmp_path / "data"), stage=MOE_STAGE, balance={"losses": BALANCE}
    )
    made = make_trainer(config)
    made.current_gradient_accumulation_steps = 1
    batch = made.data_collator([made.train_dataset[i] for i in range(3)])
    collator = made.data_collator
    assert isinstance(collator, Collator)
    fill = {"input_ids": collator.pad_token_id, "attention_mask": 0, "labels": -100}
    padded = {k: F.pad(v, (0, 7), value=fill[k]) if k in fill else v for k, v in batch.items()}
    results = []
    made.model.train()
    for inputs in (batch, padded):
        made.model.zero_grad()
        loss = made.compute_loss(made.model, inputs)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), made.meter.flush(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name in ("cross_entropy", "switch", "z"):
        assert math.isclose(results[0][1][name], results[1][1][name], rel_tol=1e-5), name
    loads = [[layer["load"] for layer in row[1]["layers"].values()] for row in results]
    assert loads[0] == loads[1]
    assert_same(results[1][2], results[0][2])


def test_parts_are_logged_unscaled(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever the accumulation: the mean over tokens, and the unweighted losses; and they add up to the total."""
    data = repeated_data(tmp_path / "data", 2, 2)
    rows = []
    for accumulation in (1, 2):
        config = make_config(
            tmp_path / f"a{accumulation}",
            moe_checkpoint,
            data,
            stage=MOE_STAGE,
            balance={"losses": BALANCE},
            train={**NO_CLIP, "gradient_accumulation_steps": accumulation},
        )
        made = make_trainer(config)
        made.train()
        rows.append(read_metrics(config.output_dir)[0])
    for name in ("cross_entropy", "switch", "z", "loss"):
        assert math.isclose(rows[0][name], rows[1][name], rel_tol=1e-5), name
    total = rows[0]["cross_entropy"] + sum(c * rows[0][name] for name, c in BALANCE.items())
    assert math.isclose(rows[0]["loss"], total, rel_tol=1e-5)
    model = load_model(moe_checkpoint)
    batch = made.data_collator([made.train_dataset[i] for i in range(2)])
    output = model(**batch)
    terms = balance_terms(output.routings, model.model.scope, made.balance.losses)
    assert math.isclose(float(output.loss.detach()), rows[0]["cross_entropy"], rel_tol=1e-4)
    for name, term in terms.items():
        assert math.isclose(float(term.detach()), rows[0][name], rel_tol=1e-4), name


def test_combine_by_hand() -> None:
    objective = combine(torch.tensor(0.25), {"a": torch.tensor(2.0)}, {"a": 0.5}, accumulation_steps=4, world_size=2)
    assert objective.total == 0.25 * 2 + 0.5 * 2.0 / 4
    assert objective.parts == {"cross_entropy": 0.25 * 4 * 2, "a": 2.0}


def test_factors_of_controllers_multiply_single_layers(moe_checkpoint: Path, tmp_path: Path) -> None:
    """And reach the gradient: a factor of 0 leaves a layer's router alone."""
    model = load_model(moe_checkpoint)
    made = make_trainer(make_config(tmp_path, moe_checkpoint, repeated_data(tmp_path / "data", 2, 1), stage=MOE_STAGE))
    output = model(**made.data_collator([made.train_dataset[i] for i in range(2)]))
    losses = {name: BALANCE_LOSSES.get(name).build({}) for name in BALANCE}
    factors = {"switch": {("decoder", 0): torch.tensor(3.0), ("decoder", 2): 0.0}, "z": {}}

    def factor(name: str, site: SiteKey) -> torch.Tensor | float:
        return factors[name].get(site, 1.0)

    driven = balance_terms(output.routings, model.model.scope, losses, factor)
    plain = balance_terms(output.routings, model.model.scope, losses)
    first = losses["switch"](output.routings["decoder", 0], model.model.scope.context_of(("decoder", 0)))
    torch.testing.assert_close(driven["switch"], 3 * first / 2)
    torch.testing.assert_close(driven["z"], plain["z"])
    driven["switch"].backward()
    gradients = {site: layer.router.scorer.weight.grad for site, layer in moe_layers(model).items()}
    assert gradients["decoder", 0].abs().max() > 0
    # the layer above reads what the first one wrote, but its own loss has the factor 0
    assert gradients["decoder", 2] is None or gradients["decoder", 2].abs().max() == 0


def test_a_capacity_does_not_hide_the_imbalance_from_the_losses() -> None:
    """They are about what the router chose: after the drops no expert has more than its share."""
    generator, terms = torch.Generator().manual_seed(0), []
    weight, x = torch.randn(4, 8, generator=generator), torch.randn(64, 8, generator=generator) + 0.5
    weight[0] += 0.5
    losses = {name: BALANCE_LOSSES.get(name).build({}) for name in ("switch", "gshard", "sequence", "global_batch")}
    spec = MlpSpec(8, 12, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    for capacity in (None, {"factor": 1.0}):
        layer = build_layer(LayerPlan(4, capacity=capacity), spec).train()
        with torch.no_grad():
            layer.router.scorer.weight.copy_(weight)
        with layer.scope.recording() as routings:
            layer(x)
        if capacity is not None:
            assert routings[layer.site].extras["dropped_T"].any()
            assert losses["switch"](routings[layer.site], RoutingContext.trivial(64)) < terms[0]["switch"]
        for loss in losses.values():
            loss.start_step()
        terms.append(balance_terms(routings, layer.scope, losses))
    for name in losses:
        torch.testing.assert_close(terms[1][name], terms[0][name])


def test_losses_without_a_routing_are_an_error(moe_checkpoint: Path) -> None:
    losses = {"switch": BALANCE_LOSSES.get("switch").build({})}
    with pytest.raises(ValueError, match="switch: no layer has routed"):
        balance_terms({}, load_model(moe_checkpoint).model.scope, losses)
    assert balance_terms({}, load_model(moe_checkpoint).model.scope, {}) == {}


def test_options_of_a_loss_in_a_recipe() -> None:
    balance = Balance.build(
        BalanceSection(losses={"switch": {"coefficient": 0.01, "per": "token"}, "z": 1e-3, "entropy": None})
    )
    assert balance.coefficients == {"switch": 0.01, "z": 1e-3}
    assert set(balance.losses) == {"switch", "z"}
    assert balance.losses["switch"].config.per == "token"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"swich": 0.01}, r"balance\.losses: unknown balance loss 'swich'; did you mean 'switch'"),
        ({"switch": "much"}, r"balance\.losses\.switch: coefficient='much' must be a number of at least 0"),
        ({"switch": True}, r"balance\.losses\.switch: coefficient=True"),
        ({"switch": -1.0}, r"balance\.losses\.switch: coefficient=-1\.0"),
        ({"switch": math.nan}, r"balance\.losses\.switch: coefficient=nan"),
        ({"switch": {"per": "token"}}, r"balance\.losses\.switch needs a coefficient"),
        ({"switch": {"coefficient": 1.0, "pre": "token"}}, r"balance\.losses\.switch: .*no option 'pre'.*'per'"),
        ({"switch": {"coefficient": 1.0, "per": 3}}, r"balance\.losses\.switch: .*per=3 must be str"),
        ({"relu_l1": {"coefficient": 1.0, "k": 0}}, r"balance\.losses\.relu_l1: .*k=0 must be at least 1"),
        ({"locality": 0.1}, r"balance\.losses\.locality: .*needs the option 'num_nodes'"),
    ],
)
def test_a_wrong_loss_is_named(losses: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Balance.build(BalanceSection(losses=losses))


def test_losses_are_held_against_the_model(dense_checkpoint: Path, moe_checkpoint: Path) -> None:
    dense, sparse = (moe_layers(load_model(path)) for path in (dense_checkpoint, moe_checkpoint))
    Balance.build(BalanceSection()).check(dense)
    switch = Balance.build(BalanceSection(losses={"switch": 0.01}))
    switch.check(sparse)
    with pytest.raises(RecipeError, match=r"balance\.losses names switch, .* dense checkpoint"):
        switch.check(dense)
    for losses, message in (
        ({"importance_load": 0.01}, r"importance_load: layer 0: .*'load_prob_TE'.*use the router noisy_top_k"),
        ({"locality": {"coefficient": 0.1, "num_nodes": 3}}, r"locality: layer 0: .*num_nodes=3 must divide the 4"),
    ):
        with pytest.raises(RecipeError, match=rf"balance\.losses\.{message}"):
            Balance.build(BalanceSection(losses=losses)).check(sparse)
