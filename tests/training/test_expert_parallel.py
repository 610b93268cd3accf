"""Experts spread over ranks: the numbers of a run without it, whole checkpoints, exact resumes, and what is refused.

As a program it is one of two ranks: `deepspeed ... --module tests.training.test_expert_parallel FOLDER`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
from safetensors.torch import load_file  # isort: skip
from torch.utils.checkpoint import checkpoint as recomputed  # isort: skip

from llava_moe.config import RecipeError, RunConfig, StageSection, load_recipe
from llava_moe.model.assemble import load_model
from llava_moe.moe import MlpSpec
from llava_moe.moe.experts import StackedExperts
from llava_moe.planning import Setup, estimate
from llava_moe.training import distributed, runner
from llava_moe.training.dry_run import outlook
from llava_moe.training.expert_parallel import check_recipe, learning_names, spread_layers
from llava_moe.training.metrics import read_metrics
from llava_moe.training.stage import apply_stage
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_model, tiny_moe, write_tiny_checkpoint
from tests.training.controlled import BIASED, CAPPED, final_buffers
from tests.training.runs import MOE_PARTS, REPO, deepspeed, make_config, start_ranks, write_recipe
from tests.training.test_resume import elsewhere, interrupt
from tests.training.test_saving import names_on_disk

ZERO2 = "scripts/deepspeed/zero2.json"
SPEC = MlpSpec(
    hidden=8, intermediate=12, activation="silu", gated=True, bias=False,
    gate_name="gate_proj", up_name="up_proj", down_name="down_proj",
)  # fmt: skip


def recipe(tmp_path: Path, **changes: Any) -> RunConfig:
    """One that would be accepted with two ranks, but for the changes."""
    sections = {"expert_parallel": 2, "deepspeed": str(REPO / ZERO2), **changes}
    return make_config(tmp_path, tmp_path, (tmp_path / "data.json", tmp_path), **sections)


def test_a_plain_recipe_is_accepted(tmp_path: Path) -> None:
    check_recipe(recipe(tmp_path), 2)
    check_recipe(recipe(tmp_path), 8)
    check_recipe(recipe(tmp_path, expert_parallel=None, deepspeed=None), 3)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"expert_parallel": 1}, 2, "expert_parallel=1: must be a number of ranks, at least 2"),
        ({"expert_parallel": 4}, 6, "expert_parallel=4: must divide the number of ranks, and this run has 6"),
        ({"deepspeed": None}, 2, "expert_parallel=2 needs DeepSpeed; set deepspeed: scripts/deepspeed/zero2.json"),
        ({"deepspeed": "scripts/deepspeed/zero3.json"}, 2, "zero3.json is ZeRO-3, which spreads all parameters"),
        ({"deepspeed": "scripts/deepspeed/zero0.json"}, 2, "zero0.json is ZeRO-0, under which DeepSpeed clips by a"),
        ({"train": {"auto_find_batch_size": True}}, 2, "train.auto_find_batch_size does not go with expert_parallel"),
        ({"train": {"torch_compile": True}}, 2, "train.torch_compile does not go with expert_parallel"),
        ({"lora": {}}, 2, "lora does not go with expert_parallel"),
        ({"speed": {"compile_layers": True}}, 2, "speed.compile_layers does not go with expert_parallel"),
    ],
)
def test_recipes_are_refused(changes: dict[str, Any], ranks: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe(tmp_path, **changes), ranks)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (
            "expert_parallel",
            {"enabled": True},
            "has a section expert_parallel: DeepSpeed's AutoEP replaces the routers",
        ),
        ("tensor_parallel", {"autotp_size": 2}, "has a section tensor_parallel"),
        ("data_types", {"grad_accum_dtype": "fp32"}, "has a section data_types"),
        ("checkpoint", {"load_universal": True}, "checkpoint.load_universal does not know experts"),
        (
            "zero_optimization",
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "has zero_optimization.offload_opt",
        ),
        ("zero_optimization", {"stage": 2, "reduce_scatter": False}, "zero_optimization.reduce_scatter must be true"),
        ("zero_optimization", "2", "not readable as a DeepSpeed JSON"),
    ],
)
def test_deepspeed_files_are_refused(section: str, value: Any, message: str, tmp_path: Path) -> None:
    raw = json.loads((REPO / ZERO2).read_text())
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({**raw, section: value}))
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe(tmp_path, deepspeed=str(file)), 2)


@pytest.mark.parametrize(
    ("moe", "size", "message"),
    [
        (None, 2, "expert_parallel=2: no layer of the decoder has experts"),
        (
            {"projector": tiny_moe(router={"name": "top_k", "args": {"k": 2}})["decoder"] | {"layers": [0]}},
            2,
            "no layer",
        ),
        (tiny_moe(), 3, "expert_parallel=3: model.language_model.layers.0.mlp: must divide its 4 experts"),
        (tiny_moe(experts={"name": "special", "args": {"num_zero": 1}}), 2, "experts SpecialExperts cannot be spread"),
        (tiny_moe(router={"name": "compete_smoe", "args": {"k": 2}}), 2, "CompeteSMoERouter looks at the outputs of"),
    ],
)
def test_layers_are_refused(moe: dict[str, Any] | None, size: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        spread_layers(tiny_model(moe), size)


def test_frozen_experts_are_refused() -> None:
    model = tiny_model(tiny_moe())
    apply_stage(model, StageSection("test", {"router": 1e-3}))
    with pytest.raises(RecipeError, match="its experts do not learn in this stage"):
        spread_layers(model, 2)
    apply_stage(model, StageSection("test", {"experts": 1e-3}))
    assert list(spread_layers(model, 2)) == [f"model.language_model.layers.{i}.mlp" for i in (0, 2)]


def test_the_memory_of_a_rank() -> None:
    model = tiny_model(tiny_moe())
    experts = sum(p.numel() for layer in spread_layers(model, 2).values() for p in layer.experts.parameters())
    for stage, gradients in ((1, experts * 3 // 4), (2, 0)):
        one = estimate(model, Setup(devices=8, zero_stage=stage))
        four = estimate(model, Setup(devices=8, zero_stage=stage, expert_parallel=4))
        assert one.weights - four.weights == experts * 3 // 4 * 4
        assert one.gradients - four.gradients == gradients * 4
        assert (one.optimiser, one.activations) == (four.optimiser, four.activations)


def test_a_dry_run_checks_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    source = "scripts/recipes/siglip_vicuna_7b/moe.yaml"
    plain = load_recipe(source, [f"deepspeed={ZERO2}"])
    whole, spread = (outlook(source, dataclasses.replace(plain, expert_parallel=n)) for n in (None, 4))
    assert whole.memory is not None
    assert spread.memory is not None
    assert whole.counts is not None
    elsewhere = whole.counts.parts["experts"].total * 3 // 4
    assert whole.memory.weights - spread.memory.weights == elsewhere * 2  # bfloat16
    with pytest.raises(RecipeError, match="expert_parallel=3: must divide the number of ranks, and this run has 8"):
        outlook(source, dataclasses.replace(plain, expert_parallel=3))


# What two ranks do, and this process to compare with.

SGD: dict[str, Any] = {
    "optim": "sgd",  # the weights move by the gradients themselves: what differs in a gradient differs in the model
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "sequential",
}
STAGE = {"learning_rates": {**dict.fromkeys(MOE_PARTS, 0.3), "vision_tower": 0.1}}
# name: (config of the experts, what one process and two ranks share, DeepSpeed file, accumulation of the ranks)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, int]] = {
    "zero2": (CAPPED, {"balance": {"losses": {"switch": 0.1, "z": 0.01}}}, "zero2", 1),
    "zero1": (
        BIASED,
        {
            "balance": {"losses": {"sequence": 0.1}, "controllers": {"loss_free_bias": {"rate": 0.1}}},
            "train": {"gradient_checkpointing": True},
        },
        "zero1",
        2,
    ),
}
ADAM: dict[str, Any] = {"bf16": True, "optim": "adamw_torch", "lr_scheduler_type": "cosine", "save_steps": 2}


@pytest.mark.slow
def test_two_ranks_equal_one_process_and_resume(tmp_path: Path) -> None:
    """One start of two ranks for all: the layer alone, gradients of whole runs, and an interrupted run."""
    _write_recipes(tmp_path)
    done = start_ranks(deepspeed(2), ["tests.training.test_expert_parallel", str(tmp_path)], timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    for name, (_, shared, _, _) in CASES.items():
        one, two = (load_recipe(tmp_path / name / kind / "recipe.yaml") for kind in ("one", "two"))
        runner.train(one)
        _compare_steps(name, two, one, [*shared["balance"]["losses"]])
        _compare_models(two, one, tmp_path / name / "start")

    whole = load_recipe(tmp_path / "adam" / "recipe.yaml")
    broken = elsewhere(whole, "broken")
    assert _told(broken) == _told(whole)
    first = read_metrics(tmp_path / "zero2" / "two" / "out")[0]["cross_entropy"]  # the same in float32
    assert first != _told(whole)[0]["loss"] == pytest.approx(first, rel=1e-2)
    same, other = (load_model(Path(config.output_dir) / "model").state_dict() for config in (whole, broken))
    assert same.keys() == other.keys()
    assert all(torch.equal(same[key], other[key]) for key in same)


def _write_recipes(folder: Path) -> None:
    data = write_llava_json(folder / "data", 16, text_only_every=2)
    for name, (moe, shared, zero, accumulation) in CASES.items():
        start = write_tiny_checkpoint(folder / name / "start", moe)
        spread = {"expert_parallel": 2, "deepspeed": f"scripts/deepspeed/{zero}.json"}
        for kind, extra, steps in (("one", {}, 2 * accumulation), ("two", spread, accumulation)):
            train = {**SGD, **shared.get("train", {}), "gradient_accumulation_steps": steps}
            write_recipe(folder / name / kind, start, data, **{**shared, "stage": STAGE, "train": train, **extra})
    write_recipe(
        folder / "adam", folder / "zero2" / "start", data,
        stage={"learning_rates": MOE_PARTS}, train={**SGD, **ADAM}, expert_parallel=2, deepspeed=ZERO2,
    )  # fmt: skip


def _compare_steps(name: str, two: RunConfig, one: RunConfig, losses: list[str]) -> None:
    rows, expected = read_metrics(two.output_dir), read_metrics(one.output_dir)
    assert len(rows) == len(expected) == 4
    for row, reference in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm", "cross_entropy", *losses):
            assert row[key] == pytest.approx(reference[key], rel=1e-5), (name, row["step"], key)
        assert row["layers"].keys() == reference["layers"].keys()
        for layer, facts in row["layers"].items():
            assert facts["load"] == pytest.approx(reference["layers"][layer]["load"], abs=1e-5), (name, layer)
    assert expected[0]["grad_norm"] > 1  # clipped, so a wrong norm would show in the weights
    facts = [json.loads((Path(config.output_dir) / "done.json").read_text()) for config in (two, one)]
    assert facts[0]["trainable"] == facts[1]["trainable"]


def _compare_models(two: RunConfig, one: RunConfig, start: Path) -> None:
    finals = [Path(config.output_dir) / "model" for config in (two, one)]
    assert names_on_disk(finals[0]) == names_on_disk(finals[1]) == names_on_disk(start)
    found, wanted, begin = (load_model(path).state_dict() for path in (*finals, start))
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        if ".experts." in key:  # and each expert has moved, by more than that
            moved = (tensor - begin[key]).abs().flatten(1).amax(1)
            assert (moved > 1e-3).all(), (key, moved)
    if one.balance.controllers:
        knobs = final_buffers(one)
        assert any(value.abs().sum() > 0 for value in knobs.values())
        for key, value in final_buffers(two).items():
            torch.testing.assert_close(value, knobs[key], msg=key)


def _told(config: RunConfig) -> list[dict[str, Any]]:
    """All of the telemetry that does not tell time."""
    return [
        {key: row[key] for key in ("step", "loss", "grad_norm", "learning_rate", "layers")}
        for row in read_metrics(config.output_dir)
    ]


def ranks(folder: Path) -> None:
    """What each of the two ranks does."""
    distributed.prepare(True)
    _compare_layers()
    for name in CASES:
        runner.train(load_recipe(folder / name / "two" / "recipe.yaml"))
    whole = load_recipe(folder / "adam" / "recipe.yaml")
    runner.train(whole)
    broken = elsewhere(whole, "broken")
    interrupt(broken, 3)
    if distributed.rank() == 0:
        _check_training_checkpoint(broken, folder / "zero2" / "start")
    distributed.barrier()
    runner.train(broken)
    distributed.finish()


def _check_training_checkpoint(config: RunConfig, start: Path) -> None:
    """All experts under the in-memory names, as a run without expert parallelism writes them."""
    saved = load_file(Path(config.output_dir) / "checkpoint-2" / "model.safetensors")
    wanted = load_model(start).state_dict()
    assert saved.keys() == wanted.keys(), saved.keys() ^ wanted.keys()
    assert all(saved[key].shape == wanted[key].shape for key in wanted)


def _compare_layers() -> None:
    """Outputs and gradients of both kinds of experts in float64, for easy and odd routings."""
    from llava_moe.training.expert_shard import ParallelExperts

    odd = dataclasses.replace(SPEC, gated=False, bias=True, activation="gelu", gate_name=None, out=6)
    rank = distributed.rank()
    for spec in (SPEC, odd):
        for kernel in ("grouped", "loop", "batched"):
            torch.manual_seed(7)
            whole = StackedExperts(spec, 4, StackedExperts.Config(kernel=kernel)).double()
            for parameter in whole.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
            spread = ParallelExperts(whole, 2)
            own = slice(2 * rank, 2 * rank + 2)
            for name, tensor in spread.gathered(keep=True).items():
                assert torch.equal(tensor, whole.state_dict()[name]), name
            assert spread.gathered(keep=False) == {}
            assert spread.gathered(keep=True).keys() == whole.state_dict().keys()
            layer = torch.nn.ModuleDict({"experts": spread})
            assert sorted(learning_names(layer)) == sorted(f"experts.{name}" for name in whole.state_dict())
            held = sum(parameter.numel() for parameter in spread.parameters())
            assert held - spread.idle_parameters(2.0) == sum(p.numel() for p in whole.parameters()) / 2
            for case, inputs in _routings().items():
                for again in (False, True):
                    _compare(whole, spread, inputs, own, rank, again, f"{spec.gated} {kernel} {case} {again}")


def _routings() -> dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """By name, for each rank: tokens, experts (4 is an empty slot) and weights."""

    def made(index: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index_TK = torch.tensor(index)
        return torch.randn(len(index), 8).double(), index_TK, torch.rand(index_TK.shape)

    return {
        "usual": [made([[0, 2], [3, 1], [2, 1]]), made([[1, 3], [0, 1], [3, 2], [2, 0], [1, 2]])],
        "empty slots": [made([[4, 2], [4, 4], [0, 4]]), made([[3, 4], [1, 4]])],
        "all to one rank": [made([[0, 1], [1, 0]]), made([[1, 4], [0, 1], [0, 1]])],
        "one sends nothing": [made([[4, 4], [4, 4]]), made([[3, 0], [2, 1]])],
        "nobody sends": [made([[4, 4]]), made([[4, 4], [4, 4]])],
    }


def _compare(
    whole: StackedExperts, spread: Any, inputs: list[Any], own: slice, rank: int, again: bool, case: str
) -> None:
    reference = deepcopy(whole)
    wanted = []
    for x_TD, index_TK, weight_TK in inputs:
        x, w = x_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
        y = reference(x, index_TK, w)
        (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
        wanted.append((y, x.grad, w.grad))
    x_TD, index_TK, weight_TK = inputs[rank]
    x, w = x_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
    spread.zero_grad()
    y = recomputed(spread, x, index_TK, w, use_reentrant=False) if again else spread(x, index_TK, w)
    (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
    for found, value in zip((y, x.grad, w.grad), wanted[rank], strict=True):
        torch.testing.assert_close(found, value, msg=lambda m: f"{case}: {m}")
    w1, w2, w3 = (p.grad for p in spread.shard.experts.parameters())
    name = "gate_up" if whole.spec.gated else "up"
    # The sum over the tokens of both ranks; DeepSpeed divides it.
    torch.testing.assert_close(w1, getattr(reference, f"{name}_proj").grad[own], msg=lambda m: f"{case}: {m}")
    torch.testing.assert_close(w2, reference.down_proj.grad[own], msg=lambda m: f"{case}: {m}")
    if whole.spec.bias:
        biases = torch.cat([getattr(reference, f"{name}_bias").grad, reference.down_bias.grad], dim=1)[own]
        torch.testing.assert_close(w3[:, 0], biases, msg=lambda m: f"{case}: {m}")


if __name__ == "__main__":
    ranks(Path(sys.argv[1]))
