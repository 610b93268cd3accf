"""The upcycling program: every method through the files, and experts from several checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import CalibrationSection, NamedSection, PartSection
from llava_moe.model import upcycling_layer
from llava_moe.model.assemble import load_model
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.upcycling import count_parameters, upcycle
from llava_moe.moe import UPCYCLERS, MoELayer
from llava_moe.moe.upcycling import Contract
from tests.model.upcycle_cases import DECODER, named, on_disk, run, section
from tests.tiny_model import write_tiny_checkpoint

# upcycler, other values of the part, whether the result equals its parent
METHODS: dict[str, tuple[NamedSection, dict[str, Any], bool]] = {
    "copy": (named("copy"), {}, True),
    "copy unnormalised": (named("copy"), {"router": named("top_k", convention="softmax_topk")}, False),
    "noise": (named("noise", std=0.01), {}, False),
    "drop": (named("drop", ratio=0.5), {}, False),
    "virtual_group": (named("virtual_group", granularity=2), {}, True),
    "virtual_group uniform": (
        named("virtual_group", granularity=2),
        {"router": named("top_k", convention="softmax_topk", init_std=0.0)},
        True,
    ),
    "virtual_group not uniform": (
        named("virtual_group", granularity=2),
        {"router": named("top_k", convention="softmax_topk")},
        False,
    ),
    "partition_random": (named("partition_random"), {}, False),
    "partition uniform": (
        named("partition_random", output_scale="n"),
        {"router": named("top_k", k=4, init_std=0.0)},
        True,
    ),
    "partition_cluster": (named("partition_cluster"), {}, False),
    "partition_coactivation": (named("partition_coactivation"), {}, False),
    "partition_calibrated": (named("partition_random", output_scale="calibrate"), {}, False),
    "partition_gradient": (named("partition_gradient"), {}, False),
    "sharing_inner": (named("sharing_inner"), {}, False),
    "sharing_inter": (named("sharing_inter", num_residual=2), {}, False),
    "from_scratch": (named("from_scratch"), {}, False),
    "shared sum": (named("copy"), {"shared": {"num": 2}}, True),
    "shared gated": (named("copy"), {"shared": {"num": 1, "width": 8, "mix": "gated"}}, True),
    "shared mean": (named("copy"), {"shared": {"num": 1, "mix": "mean"}}, True),
    "special experts": (named("copy"), {"experts": named("special")}, False),
    "lora experts": (named("copy"), {"experts": named("lora", rank=2)}, True),
    "mov experts": (named("copy"), {"experts": named("mov")}, True),
    "capacity": (named("copy"), {"capacity": {"factor": 0.5}}, True),
    "side branch": (named("copy"), {"router": named("hyper_moe")}, False),
}


class TestMethods:
    """Every upcycler and every kind of experts, through the files."""

    @pytest.mark.parametrize("method", METHODS)
    def test_method(self, method: str, dense_checkpoint: Path, samples: CalibrationSection, tmp_path: Path) -> None:
        upcycler, values, exact = METHODS[method]
        kind = UPCYCLERS.get(upcycler.name).build(upcycler.args)
        calibration = samples if kind.needs != "nothing" else None
        made = section(dense_checkpoint, calibration=calibration, upcycler=upcycler, **values)
        facts = run(made, tmp_path / "out")
        assert facts["exact"] is exact
        assert (facts["max_abs_logit_error"] <= 1e-5 * max(1.0, facts["max_abs_logit"])) is exact
        assert (facts["greedy_agreement"] == 1.0) or not exact
        assert facts["num_tokens"] > 0
        sparse = load_model(tmp_path / "out")
        layers = [module for module in sparse.modules() if isinstance(module, MoELayer)]
        assert [layer.site for layer in layers] == [("decoder", 0), ("decoder", 2)]
        first, second = (dict(layer.named_parameters()) for layer in layers)
        drawn = [name for name in first if "router" in name and float(first[name].detach().std()) > 0]
        assert all(not torch.equal(first[name], second[name]) for name in drawn)
        assert facts["parameters"]["moe"] == count_parameters(sparse)
        if upcycler.name in ("copy", "sharing_inter"):
            sparse.save_pretrained(tmp_path / "stock", save_original_format=True)
            assert on_disk(tmp_path / "out") == on_disk(tmp_path / "stock")

    def test_every_upcycler_is_tested(self) -> None:
        assert {named.name for named, _, _ in METHODS.values()} | {"branch_train_mix"} == set(UPCYCLERS.names())

    def test_experts_are_what_the_upcycler_made(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        upcycle(section(dense_checkpoint, upcycler="partition_random", layers=[1]), tmp_path / "out")
        dense, sparse = load_model(dense_checkpoint), load_model(tmp_path / "out")
        block, experts = (m.get_submodule(DECODER.format(1)) for m in (dense, sparse))
        assert sparse.config.moe["decoder"]["expert_width"] == 12
        rows = experts.experts.gate_up_proj.unflatten(1, (2, 12))
        up = rows[:, 1].flatten(0, 1)
        assert sorted(up.tolist()) == sorted(block.up_proj.weight.tolist())
        sums = [float(weight.detach().sum()) for weight in (block.down_proj.weight, experts.experts.down_proj)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-4)

    def test_sharing_inter_writes_its_shared_experts(
        self, dense_checkpoint: Path, samples: CalibrationSection, tmp_path: Path
    ) -> None:
        upcycler = named("sharing_inter", num_residual=2)
        made = section(dense_checkpoint, calibration=samples, upcycler=upcycler, layers=[1], num_experts=4)
        run(made, tmp_path / "out")
        dense, sparse = load_model(dense_checkpoint), load_model(tmp_path / "out")
        layer = sparse.get_submodule(DECODER.format(1))
        assert layer.shared.config.mix == "sum"
        assert layer.shared.spec.intermediate == 16
        wanted = dense.get_submodule(DECODER.format(1)).up_proj.weight
        found = torch.cat([layer.experts.gate_up_proj[:, 8:].flatten(0, 1), layer.shared.block.gate_up_proj[0, 16:]])
        assert sorted(found.tolist()) == sorted(wanted.tolist())

    def test_soft_moe_in_the_tower(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        made = section(dense_checkpoint, "vision", layers=[0], router="soft_moe", experts="stacked")
        facts = upcycle(made, tmp_path / "out")
        assert facts["exact"] is False
        assert load_model(tmp_path / "out").config.moe["vision"]["router"]["name"] == "soft_moe"


class TestBranchTrainMix:
    """Experts from several checkpoints, the mean of everything else."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        folder = tmp_path_factory.mktemp("trained")
        return [write_tiny_checkpoint(folder / str(seed), seed=seed) for seed in (1, 2, 3)]

    @pytest.mark.parametrize("with_parent", [False, True])
    def test_experts_and_means(
        self, trained: list[Path], with_parent: bool, dense_checkpoint: Path, tmp_path: Path
    ) -> None:
        upcycler = named("branch_train_mix", checkpoints=[str(p) for p in trained], with_parent=with_parent)
        made = section(dense_checkpoint, upcycler=upcycler, num_experts=3 + with_parent, layers=[1])
        made.projector = PartSection(num_experts=2)
        facts = upcycle(made, tmp_path / "out")
        assert facts["exact"] is False
        paths = [dense_checkpoint] * with_parent + trained
        assert facts["sources"] == [str(path) for path in paths]
        states = [load_model(path).state_dict() for path in paths]
        found = load_model(tmp_path / "out").state_dict()
        block = DECODER.format(1)
        for e, state in enumerate(states):
            assert torch.equal(found[f"{block}.experts.down_proj"][e], state[f"{block}.down_proj.weight"])
            up = torch.cat([state[f"{block}.{name}_proj.weight"] for name in ("gate", "up")])
            assert torch.equal(found[f"{block}.experts.gate_up_proj"][e], up)
        for key in ("lm_head.weight", f"{DECODER.format(0)}.up_proj.weight"):
            assert torch.allclose(found[key], torch.stack([state[key] for state in states]).mean(0), atol=1e-6)
        mean = torch.stack([s["model.multi_modal_projector.linear_2.weight"] for s in states]).mean(0)
        assert torch.allclose(found["model.multi_modal_projector.experts.down_proj"][1], mean, atol=1e-6)

    def test_identical_checkpoints_are_sparse_upcycling(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        upcycler = named("branch_train_mix", checkpoints=[str(dense_checkpoint)] * 3)
        facts = upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=3), tmp_path / "mixed")
        upcycle(section(dense_checkpoint, num_experts=3), tmp_path / "copied")
        mixed, copied = (load_model(tmp_path / name).state_dict() for name in ("mixed", "copied"))
        assert all(torch.allclose(mixed[key], copied[key], atol=1e-6) for key in copied)
        assert facts["max_abs_logit_error"] < 1e-5

    def test_other_names_on_disk_are_no_obstacle(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        load_model(dense_checkpoint).save_pretrained(tmp_path / "renamed", save_original_format=False)
        upcycler = named("branch_train_mix", checkpoints=[str(tmp_path / "renamed")], with_parent=True)
        facts = upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=2), tmp_path / "out")
        assert facts["max_abs_logit_error"] < 1e-5

    @pytest.mark.parametrize(
        ("args", "num_experts", "message"),
        [
            ({}, 3, r"upcycler\.args\.checkpoints=None: name the fine-tuned checkpoints"),
            ({"checkpoints": "a"}, 3, r"checkpoints='a'"),
            ({"checkpoints": ["PARENT"], "with_parent": 1}, 2, "with_parent=1 must be true or false"),
            ({"checkpoints": ["PARENT"], "seed": 1}, 1, "no option 'seed'"),
            ({"checkpoints": ["PARENT"] * 2}, 3, r"num_experts=3: .* each of the 2 checkpoints, so it must be 2"),
            ({"checkpoints": ["PARENT"], "with_parent": True}, 3, "and one of the parent, so it must be 2"),
            ({"checkpoints": ["/nowhere"]}, 1, "/nowhere: no such checkpoint"),
        ],
    )
    def test_wrong_options(
        self, args: dict[str, Any], num_experts: int, message: str, dense_checkpoint: Path, tmp_path: Path
    ) -> None:
        args = json.loads(json.dumps(args).replace("PARENT", str(dense_checkpoint)))
        upcycler = NamedSection("branch_train_mix", args)
        with pytest.raises(ValueError, match=message):
            upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=num_experts), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_part_that_is_measured_is_refused_beside_it(
        self, dense_checkpoint: Path, samples: CalibrationSection, tmp_path: Path
    ) -> None:
        """Its dense block is a mean of checkpoints; statistics of one of them would be those of another block."""
        upcycler = named("branch_train_mix", checkpoints=[str(dense_checkpoint)] * 2)
        made = section(dense_checkpoint, calibration=samples, upcycler=upcycler, num_experts=2)
        made.projector = PartSection(num_experts=2, upcycler=named("partition_random", output_scale="calibrate"))
        with pytest.raises(ValueError, match=r"upcycle\.projector\.upcycler=.partition_random. runs the dense model"):
            run(made, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_the_first_tensor_that_differs_is_named(
        self, dense_checkpoint: Path, timm_checkpoint: Path, tmp_path: Path
    ) -> None:
        upcycler = named("branch_train_mix", checkpoints=[str(timm_checkpoint)])
        with pytest.raises(CheckpointError, match=r"embeddings\.patch_embedding\.weight is missing, and \("):
            upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=1), tmp_path / "out")


def test_a_router_starts_uniform_or_not() -> None:
    from llava_moe.moe import ROUTERS

    build = ROUTERS.get("top_k").build
    assert upcycling_layer.starts_uniform(build(8, 4, {"init_std": 0.0}))
    assert not upcycling_layer.starts_uniform(build(8, 4, {}))
    assert Contract.EXACT_UNIFORM_ROUTER.value == "exact_uniform_router"
