"""Knobs and the state of controllers: saved, resumed, in bfloat16, and with several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_moe.config import load_recipe
from llava_moe.model.assemble import load_model
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.training import runner
from llava_moe.training.checkpoints import MANIFEST, last_whole_checkpoint
from llava_moe.training.controllers import FILE
from llava_moe.training.metrics import read_metrics
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_model, tiny_moe, write_tiny_checkpoint
from tests.training.controlled import BIASED, CAPPED, EVERYTHING, SECTIONS, buffers, final_buffers
from tests.training.runs import (
    MOE_PARTS,
    deepspeed,
    losses,
    make_config,
    make_trainer,
    repeated_data,
    start_ranks,
    torchrun,
    write_recipe,
)
from tests.training.test_resume import elsewhere, interrupt


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_resumed_run_equals_a_whole_one(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = request.getfixturevalue(kind)
    data = write_llava_json(tmp_path / "data", 6)
    train = {"max_steps": 6, "save_steps": 3}
    whole = make_config(tmp_path, checkpoint, data, **SECTIONS, balance=EVERYTHING[kind], train=train)
    runner.train(whole)
    broken = elsewhere(whole, "broken")
    interrupt(broken, 5)
    saved = load_file(Path(broken.output_dir) / "checkpoint-3" / FILE)
    assert {tensor.dtype for tensor in saved.values()} <= {torch.float32}
    runner.train(broken)
    assert losses(broken.output_dir) == pytest.approx(losses(whole.output_dir), rel=1e-6)
    one, other = (read_metrics(config.output_dir) for config in (whole, broken))
    assert [row["controllers"] for row in one] == [row["controllers"] for row in other]
    for found, expected in (
        (final_buffers(broken), final_buffers(whole)),
        (load_file(Path(broken.output_dir) / FILE), load_file(Path(whole.output_dir) / FILE)),
    ):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    if kind != "biased":
        assert (
            set(load_file(Path(whole.output_dir) / FILE))
            == {
                "capped": {"skywork_alpha.alpha_L"},
                "gated": {"remoe_lambda.lambda"},
            }[kind]
        )
        assert any(
            not torch.equal(saved[key], value) for key, value in load_file(Path(whole.output_dir) / FILE).items()
        )


def test_the_state_belongs_to_a_whole_checkpoint(gated: Path, tmp_path: Path) -> None:
    """It is there before the checkpoint has its name, and without it none counts as whole."""
    config = make_config(
        tmp_path,
        gated,
        write_llava_json(tmp_path / "data", 4),
        **SECTIONS,
        balance=EVERYTHING["gated"],
        train={"max_steps": 2, "save_steps": 1},
    )
    made = make_trainer(config)
    made.train()
    out = Path(config.output_dir)
    for step in (1, 2):
        assert FILE in json.loads((out / f"checkpoint-{step}" / MANIFEST).read_text())["files"]
    assert last_whole_checkpoint(out) == out / "checkpoint-2"
    (out / "checkpoint-2" / FILE).unlink()
    assert last_whole_checkpoint(out) == out / "checkpoint-1"


def test_a_checkpoint_without_the_state_is_refused(gated: Path, tmp_path: Path) -> None:
    """One of a version that wrote no list of its files."""
    data = write_llava_json(tmp_path / "data", 4)
    config = make_config(
        tmp_path, gated, data, **SECTIONS, balance=EVERYTHING["gated"], train={"max_steps": 4, "save_steps": 2}
    )
    interrupt(config, 3)
    for name in (FILE, MANIFEST):
        (Path(config.output_dir) / "checkpoint-2" / name).unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-2/controllers\.safetensors is missing: the state of remoe_lambda"
    ):
        runner.train(config)


def test_a_run_without_controllers_writes_no_state(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    config = make_config(
        tmp_path, moe_checkpoint, data, **SECTIONS, balance={"losses": {"switch": 0.1}}, train={"save_steps": 1}
    )
    runner.train(config)
    assert not list(Path(config.output_dir).rglob(FILE))
    assert "controllers" not in read_metrics(config.output_dir)[0]


def test_state_of_other_controllers_is_refused(gated: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, gated, write_llava_json(tmp_path / "data", 4), **SECTIONS, balance=EVERYTHING["gated"]
    )
    controllers = make_trainer(config).controllers
    with pytest.raises(ValueError, match=r"other\.x belongs to no controller"):
        controllers.load_state_dict({"other.x": torch.zeros(1)})
    controllers.load_state_dict({"remoe_lambda.lambda": torch.tensor(0.5)})
    assert float(controllers.factor("relu_l1", ("decoder", 0))) == 0.5
    assert controllers.factor("switch", ("decoder", 0)) == 1.0


@pytest.mark.parametrize("moe", [BIASED, CAPPED, tiny_moe(router={"name": "dts", "args": {}})])
def test_knobs_survive_bfloat16_and_a_round_trip(moe: dict[str, Any], tmp_path: Path) -> None:
    """1.0001 is 1 in bfloat16."""
    model = tiny_model(moe)
    owned = buffers(model)
    assert owned
    for value in owned.values():
        value.fill_(1.0001)
    path = tmp_path / "first"
    for path, original in ((tmp_path / "first", True), (tmp_path / "second", False)):
        model.to(torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model.save_pretrained(path, save_original_format=original)
        model = LlavaMoeForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        found = buffers(model)
        assert found.keys() == owned.keys()
        for name, value in found.items():
            assert value.dtype == torch.float32, name
            assert torch.equal(value, torch.full_like(value, 1.0001)), name
    assert {v.dtype for v in buffers(load_model(path)).values()} == {torch.float32}


@pytest.mark.slow
def test_two_ranks_move_the_knobs_of_one_process(biased: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 8)
    balance = {"losses": {"global_batch": 0.1}, "controllers": {"loss_free_bias": {"rate": 0.1}}}
    train = {"max_steps": 2, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    single = make_config(
        tmp_path / "single",
        biased,
        data,
        **SECTIONS,
        balance=balance,
        train={**train, "gradient_accumulation_steps": 2},
    )
    runner.train(single)
    recipe = write_recipe(tmp_path / "ranks", biased, data, **SECTIONS, balance=balance, train=train)
    done = start_ranks(torchrun(2), ["llava_moe.train", str(recipe)])
    assert done.returncode == 0, done.stdout[-3000:]
    ranks = load_recipe(recipe)
    expected, found = final_buffers(single), final_buffers(ranks)
    assert any(value.abs().max() > 0 for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_knobs_and_state_under_deepspeed_in_bfloat16(stage: int, tmp_path: Path) -> None:
    """Two ranks, killed and resumed: biases are whole steps that bfloat16 does not have, and alpha goes on."""
    moe = tiny_moe(router={"name": "deepseek_v3", "args": {"k": 2}}, capacity={"factor": 0.7})
    rate = 1.001e-3  # too small to change who is chosen, so what is overloaded stays so
    recipe = write_recipe(
        tmp_path,
        write_tiny_checkpoint(tmp_path / "checkpoint", moe),
        repeated_data(tmp_path / "data", 4, 4),
        stage={"learning_rates": dict.fromkeys(MOE_PARTS, 0.0)},
        balance={
            "losses": {"switch": 1.0},
            "controllers": {"loss_free_bias": {"rate": rate}, "skywork_alpha": {"decay": 0.5}},
        },
        train={"max_steps": 4, "save_steps": 2, "bf16": True, "train_sampling_strategy": "sequential"},
        deepspeed=f"scripts/deepspeed/zero{stage}.json",
    )
    killed = start_ranks(deepspeed(2), ["tests.training.runs", "kill", "3", str(recipe)])
    assert killed.returncode != 0
    out = tmp_path / "out"
    assert (out / "checkpoint-2" / FILE).is_file()
    done = start_ranks(deepspeed(2), ["llava_moe.train", str(recipe)])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "going on from" in done.stdout
    found = final_buffers(load_recipe(recipe))
    assert len(found) == 4
    for name, value in found.items():
        assert value.dtype == torch.float32
        if name.endswith("factor"):
            assert float(value) == pytest.approx(0.7, abs=1e-7)
        else:
            steps = value / rate
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
            assert steps.abs().max().round() == 4
    rows = [row["controllers"] for row in read_metrics(out)]
    assert [row["loss_free_bias"]["largest_bias"] for row in rows] == pytest.approx([n * rate for n in (1, 2, 3, 4)])
    # more than a twentieth is dropped, so alpha moves towards its maximum in every layer and step
    alpha = [0.01 * (1 - 0.5**n) for n in (1, 2, 3, 4)]
    assert [row["skywork_alpha"]["mean"] for row in rows] == pytest.approx(alpha, rel=1e-5)
    assert load_file(out / FILE)["skywork_alpha.alpha_L"].tolist() == pytest.approx([alpha[-1]] * 2, rel=1e-5)
    assert json.loads((out / "done.json").read_text())["bf16"]
