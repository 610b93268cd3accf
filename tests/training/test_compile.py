"""Compiled decoder layers: the gradients of the plain ones, with experts, recomputation and changing lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.config import RecipeError
from llava_moe.training.compiling import compile_layers, is_compiled
from llava_moe.training.speed import apply_speed, check_names, speed_facts
from tests.model.inputs import gradients, picture_batch
from tests.tiny_model import TINY_MOE, tiny_model
from tests.training.runs import make_config

SHAPES = ((3, 12), (2, 17), (2, 23))


def steps(model: Any) -> list[dict[str, Tensor]]:
    found = []
    for rows, length in SHAPES:
        model.zero_grad()
        output = model(**picture_batch(model, rows, length), loss_only=True, use_cache=False)
        assert sorted(output.routings) == [("decoder", 0), ("decoder", 2)]
        balance = sum(routing.probs_TE.square().sum() for routing in output.routings.values())
        (output.loss + 0.1 * balance).backward()
        found.append({"loss": output.loss.detach()} | gradients(model))
    return found


@pytest.mark.slow
def test_compiled_layers_have_the_gradients_of_plain_ones() -> None:
    """Traced and differentiated by the compiler, then run op by op: generating C++ would take minutes here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(TINY_MOE).train()
    model.gradient_checkpointing_enable()
    names = list(model.state_dict())
    expected = steps(model)
    compile_layers(model, backend="aot_eager")
    assert is_compiled(model)
    assert list(model.state_dict()) == names
    for found, wanted in zip(steps(model), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 8  # a dense layer, and what is before and behind experts; two lengths
    reasons = list(counters["graph_break"])
    assert reasons
    assert all("MoELayer.forward" in reason for reason in reasons)


def test_a_recipe_compiles_layers_and_says_so(dense_checkpoint: Path, tmp_path: Path) -> None:
    class Arguments:
        device = torch.device("cpu")

    config = make_config(tmp_path, dense_checkpoint, (tmp_path, tmp_path), speed={"compile_layers": True})
    model = tiny_model()
    assert "compiled" not in speed_facts(model)
    arguments: Any = Arguments()
    apply_speed(model, config, arguments)
    assert speed_facts(model)["compiled"] == "decoder layers"
    check_names(config)
    for key, value in (("torch_compile", True), ("torch_compile_mode", "max-autotune")):
        config.train[key] = value
        with pytest.raises(RecipeError, match=f"train.{key} compiles the whole model; set speed.compile_layers=true"):
            check_names(config)
        del config.train[key]
    config.deepspeed = "scripts/deepspeed/zero2.json"
    check_names(config)
    config.deepspeed = "scripts/deepspeed/zero3_offload.json"
    with pytest.raises(RecipeError, match=r"speed\.compile_layers: under ZeRO-3"):
        check_names(config)
