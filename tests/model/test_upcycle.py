"""The upcycling program beyond exactness: which layers, provenance, fresh routers, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import NamedSection, UpcycleSection
from llava_moe.data.processing import load_processor
from llava_moe.model import upcycling
from llava_moe.model.assemble import load_model
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.upcycling import PROVENANCE, count_parameters, logit_error, select_layers, upcycle
from llava_moe.moe import MoELayer
from llava_moe.moe.upcycling import Copy
from tests.model.inputs import gradients, logits_of, picture_batch
from tests.tiny_model import TINY_MOE, tiny_model, tiny_moe


def section(parent: Path, **changes: Any) -> UpcycleSection:
    return UpcycleSection(parent=str(parent), **changes)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("alternate", [0, 2, 4]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ([3, 1], [3, 1]),
        (["2"], [2]),
    ],
)
def test_select_layers(choice: Any, expected: list[int]) -> None:
    assert select_layers(choice, 5) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("alternating", "must be one of all, alternate, first_half, second_half or a list"),
        ([5], r"the decoder has layers 0\.\.4"),
        ([-1], r"the decoder has layers 0\.\.4"),
        ([], r"the decoder has layers 0\.\.4"),
    ],
)
def test_select_layers_refuses(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(choice, 5)


def test_provenance_and_processor(dense_checkpoint: Path, tmp_path: Path) -> None:
    facts = upcycle(section(dense_checkpoint, num_experts=3, layers=[1, 3]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text()) == facts
    assert facts["parent"] == str(dense_checkpoint)
    assert facts["layers"] == [1, 3]
    assert facts["contract"] == "exact_any_router"
    assert facts["exact"] is True
    assert facts["max_abs_logit_error"] <= 1e-5
    assert facts["section"]["num_experts"] == 3
    dense, sparse = load_model(dense_checkpoint), load_model(tmp_path / "out")
    assert facts["parameters"] == {"dense": count_parameters(dense), "moe": count_parameters(sparse)}
    processors = [load_processor(path) for path in (dense_checkpoint, tmp_path / "out")]
    assert processors[0].to_dict() == processors[1].to_dict()
    assert sparse.generation_config.eos_token_id == dense.generation_config.eos_token_id
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parameter_counts() -> None:
    dense, sparse = count_parameters(tiny_model()), count_parameters(tiny_model(TINY_MOE))
    block, router = 3 * 32 * 48, 4 * 32
    assert dense["total"] == dense["active"] == sum(p.numel() for p in tiny_model().parameters())
    assert sparse["total"] == dense["total"] + 2 * (3 * block + router)
    assert sparse["active"] == dense["total"] + 2 * (1 * block + router)


def test_routers_are_fresh_and_repeatable(dense_checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(section(dense_checkpoint, seed=seed), tmp_path / name)
        torch.randn(3)  # the global random state has no say
    states = {name: load_model(tmp_path / name).state_dict() for name in "abc"}
    routers = [key for key in states["a"] if ".router." in key]
    assert len(routers) == 2
    assert not torch.equal(states["a"][routers[0]], states["a"][routers[1]])
    assert all(torch.equal(states["a"][key], states["b"][key]) for key in states["a"])
    for key in routers:
        assert not torch.equal(states["a"][key], states["c"][key])
        assert float(states["a"][key].std()) == pytest.approx(0.02, rel=0.3)


def test_all_other_weights_are_the_parents(dense_checkpoint: Path, tmp_path: Path) -> None:
    upcycle(section(dense_checkpoint), tmp_path / "out")
    dense, sparse = load_model(dense_checkpoint).state_dict(), load_model(tmp_path / "out").state_dict()
    shared = [key for key in sparse if ".experts." not in key and ".router." not in key]
    assert all(torch.equal(sparse[key], dense[key]) for key in shared)
    assert set(dense) - set(shared) == {
        f"model.language_model.layers.{i}.mlp.{name}.weight"
        for i in (0, 2)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("k", [1, 2])
def test_router_gets_no_gradient_from_the_task_at_the_start(dense_checkpoint: Path, tmp_path: Path, k: int) -> None:
    upcycle(section(dense_checkpoint, router=NamedSection("top_k", {"k": k})), tmp_path / "out")
    model = load_model(tmp_path / "out").train()
    model(**picture_batch(model)).loss.backward()
    found = gradients(model)
    routers = [gradient for name, gradient in found.items() if ".router." in name]
    others = max(float(gradient.abs().max()) for name, gradient in found.items() if ".experts." in name)
    assert len(routers) == 2
    assert all(float(gradient.abs().max()) < 1e-5 * others for gradient in routers)
    trained = tiny_model(tiny_moe(router={"name": "top_k", "args": {"k": 2}})).train()
    trained(**picture_batch(trained)).loss.backward()
    assert all(float(g.abs().max()) > 1e-3 * others for n, g in gradients(trained).items() if ".router." in n)


def test_weights_that_sum_to_less_are_not_called_exact(dense_checkpoint: Path, tmp_path: Path) -> None:
    router = NamedSection("top_k", {"k": 2, "convention": "softmax_topk"})
    facts = upcycle(section(dense_checkpoint, router=router), tmp_path / "out")
    assert facts["exact"] is False
    assert facts["max_abs_logit_error"] > 1e-3


def test_an_upcycler_that_breaks_its_promise_is_found_out(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sloppy(Copy):
        def __call__(self, *args: Any) -> dict[str, torch.Tensor]:
            return {name: tensor * 1.001 for name, tensor in super().__call__(*args).items()}

    monkeypatch.setitem(upcycling.UPCYCLERS._entries, "sloppy", Sloppy)
    with pytest.raises(CheckpointError, match=r"not exact: logits .* differ by"):
        upcycle(section(dense_checkpoint, upcycler=NamedSection("sloppy")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exactness_is_judged_at_the_scale_of_the_logits(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Rounding grows with the logits; those of real decoders reach 50, and 1e-5 of 1 would refuse them."""
    model, processor = load_model(dense_checkpoint), load_processor(dense_checkpoint)
    with torch.no_grad():
        model.lm_head.weight *= 100
    parent = tmp_path / "loud"
    model.save_pretrained(parent, save_original_format=True)
    processor.save_pretrained(parent)
    facts = upcycle(section(parent, layers="all"), tmp_path / "out")
    assert facts["exact"] is True
    error, largest = logit_error(model, load_model(tmp_path / "out"))
    assert largest > 100
    assert error == pytest.approx(facts["max_abs_logit_error"])
    assert error <= 1e-5 * largest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upcycler": NamedSection("copi")}, "unknown upcycler 'copi'; did you mean 'copy'"),
        ({"upcycler": NamedSection("copy", {"noise": 1})}, "no option 'noise'"),
        ({"router": NamedSection("topk")}, "did you mean 'top_k'"),
        ({"router": NamedSection("top_k", {"k": 5})}, "k=5 must be between 1 and the 4 experts"),
        ({"kernel": "fast"}, "unknown experts kernel 'fast'"),
        ({"layers": [7]}, r"upcycle\.layers=\[7\]"),
        ({"layers": [1, 1]}, "each once"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
    ],
)
def test_wrong_sections(dense_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(section(dense_checkpoint, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_parent_is_refused(moe_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already a mixture of experts"):
        upcycle(section(moe_checkpoint), tmp_path / "out")


def test_experts_are_equal_at_first_and_part_after_one_step(dense_checkpoint: Path, tmp_path: Path) -> None:
    upcycle(section(dense_checkpoint), tmp_path / "out")
    model = load_model(tmp_path / "out").train()
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    weights = layer.experts.down_proj
    assert all(torch.equal(weights[0], weights[e]) for e in range(1, 4))
    batch = picture_batch(model, batch=4, length=20)
    before = logits_of(model, **batch)
    model(**batch).loss.backward()
    torch.optim.SGD(layer.experts.parameters(), lr=0.1).step()
    assert not all(torch.equal(weights[0], weights[e]) for e in range(1, 4))
    assert not torch.equal(logits_of(model, **batch), before)
