"""Decoders that transformers builds with experts of their own: controllers, recipes and runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from llava_moe.config import BalanceSection, NamedSection, PartSection, RecipeError, UpcycleSection
from llava_moe.model.assemble import load_model
from llava_moe.model.native import watch_native
from llava_moe.model.upcycling import upcycle
from llava_moe.moe import LayerStats, MoELayer, RoutingScope
from llava_moe.training import runner
from llava_moe.training.controllers import Controllers, measure, moe_layers
from llava_moe.training.metrics import read_metrics
from llava_moe.training.objective import Balance
from llava_moe.training.stage import part_of
from tests.model.inputs import logits_of, picture_batch
from tests.model.native_cases import BIAS, E, native_model, sites, write_native
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_config
from tests.training.runs import MOE_PARTS, make_config


class TestControllers:
    """The bias of DeepSeek-V3 under our controller, and what is refused."""

    def build(self, model: Any, **section: Any) -> Controllers:
        made = BalanceSection(**section)
        return Controllers.build(made, moe_layers(model), made.losses)

    def test_the_bias_moves_by_its_rate_towards_balance(self) -> None:
        model = native_model("deepseek_v3")
        controllers = self.build(model, controllers={"loss_free_bias": {"rate": 0.25}})
        before = {site: layer.router.gate.get_buffer(BIAS).clone() for site, layer in moe_layers(model).items()}
        with torch.no_grad():
            routings = model(**picture_batch(model)).routings
        stats = measure(routings, model.model.scope)
        controllers.observe(stats)
        controllers.finish(1, 10)
        assert list(before) == sites("deepseek_v3")
        for site, bias_E in before.items():
            load_E = stats[site].load_E
            moved = model.model.native_layers[site].router.gate.get_buffer(BIAS) - bias_E
            torch.testing.assert_close(moved, 0.25 * torch.sign(load_E.mean() - load_E))
            assert float(moved.abs().max()) == pytest.approx(0.25)

    def test_the_bias_stays_float32_in_a_bfloat16_model(self, tmp_path: Path) -> None:
        path = write_native(tmp_path, "deepseek_v3")
        model = load_model(path, torch.bfloat16)
        gates = [layer.router.gate for layer in model.model.native_layers.values()]
        assert {gate.weight.dtype for gate in gates} == {torch.bfloat16}
        assert {gate.get_buffer(BIAS).dtype for gate in gates} == {torch.float32}
        routing = next(iter(model(**{k: _half(v) for k, v in picture_batch(model).items()}).routings.values()))
        assert routing.weight_TK.dtype == routing.probs_TE.dtype == torch.float32
        cast = native_model("deepseek_v3").to(torch.bfloat16)
        for twin in (cast, copy.deepcopy(cast), cast.to(torch.float32).half()):
            gate = twin.model.native_layers["decoder", 1].router.gate
            assert gate.get_buffer(BIAS).dtype == torch.float32
            assert isinstance(gate, DeepseekV3TopkRouter)
            controllers = self.build(twin, controllers={"loss_free_bias": {"rate": 1e-4}})
            before = gate.get_buffer(BIAS).clone()
            sums = LayerStats(torch.arange(float(E)), *torch.ones(3))
            controllers.observe({("decoder", 1): sums})
            controllers.finish(1, 10)
            assert float((gate.get_buffer(BIAS) - before).abs().min()) > 5e-5

    def test_others_have_no_bias(self) -> None:
        with pytest.raises(RecipeError, match="loss_free_bias: no router has a selection bias"):
            self.build(native_model("mixtral"), controllers={"loss_free_bias": {}})

    def test_losses_that_need_more_are_refused(self) -> None:
        balance = Balance.build(BalanceSection(losses={"null_reward": 0.1}))
        with pytest.raises(RecipeError, match="NativeRouter does not provide"):
            balance.check(moe_layers(native_model("qwen3_moe")))

    def test_a_family_that_is_not_read_is_named(self) -> None:
        config = tiny_config(text="llama").text_config
        decoder = AutoModel.from_config(config)
        assert watch_native(decoder, RoutingScope()) == {}
        with pytest.raises(RecipeError, match=r"of decoders with experts of their own this program reads .*mixtral"):
            Balance.build(BalanceSection(losses={"switch": 0.1})).check({})


def _half(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value


class TestRuns:
    """Recipes: the same keys as for our own layers."""

    def test_a_run_balances_moves_the_bias_and_reports(self, tmp_path: Path) -> None:
        checkpoint = write_native(tmp_path / "checkpoint", "deepseek_v3")
        config = make_config(
            tmp_path,
            checkpoint,
            write_llava_json(tmp_path / "data", 4),
            stage={"learning_rates": MOE_PARTS},
            balance={"losses": {"sequence": 0.01}, "controllers": {"loss_free_bias": {"rate": 0.25}}},
        )
        runner.train(config)
        rows = read_metrics(config.output_dir)
        assert len(rows) == 2
        assert all({"1", "2"} == set(row["layers"]) for row in rows)
        assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-4) for row in rows for layer in row["layers"].values())
        assert all(row["sequence"] > 0 for row in rows)
        trained, start = load_model(Path(config.output_dir) / "model"), load_model(checkpoint)
        for site, layer in trained.model.native_layers.items():
            gate, before = layer.router.gate, start.model.native_layers[site].router.gate
            steps = (gate.get_buffer(BIAS) - before.get_buffer(BIAS)) / 0.25
            torch.testing.assert_close(steps, steps.round(), atol=1e-5, rtol=0)
            assert 0 < float(steps.abs().max()) < 2.1
            assert not torch.equal(gate.weight, before.weight)
            assert not torch.equal(layer.experts.down_proj, start.model.native_layers[site].experts.down_proj)

    def test_frozen_gates_stay(self, tmp_path: Path) -> None:
        checkpoint = write_native(tmp_path / "checkpoint", "qwen2_moe")
        rates = {"experts": 1e-2}
        data = write_llava_json(tmp_path / "data", 2)
        config = make_config(
            tmp_path, checkpoint, data, stage={"learning_rates": rates}, balance={"losses": {"z": 0.1}}
        )
        runner.train(config)
        trained, start = load_model(Path(config.output_dir) / "model").state_dict(), load_model(checkpoint).state_dict()
        changed = {key for key in start if not torch.equal(start[key], trained[key])}
        assert changed
        assert {part_of(key) for key in changed} == {"experts"}

    def test_dense_layers_of_a_native_decoder_become_ours(self, tmp_path: Path) -> None:
        """DeepSeek-V3's first layers are dense: upcycled, they route beside the native ones."""
        parent = write_native(tmp_path / "parent", "deepseek_v3")
        part = PartSection(layers=[0], num_experts=4, router=NamedSection("top_k", {"k": 2}))
        facts = upcycle(UpcycleSection(parent=str(parent), decoder=part), tmp_path / "out")
        assert facts["exact"] is True
        dense, sparse = load_model(parent), load_model(tmp_path / "out")
        batch = picture_batch(dense)
        assert float((logits_of(sparse, **batch) - logits_of(dense, **batch)).abs().max()) <= 1e-5
        assert sorted(sparse(**batch).routings) == [("decoder", index) for index in range(3)]
        assert sum(isinstance(module, MoELayer) for module in sparse.modules()) == 1
        assert sorted(moe_layers(sparse)) == [("decoder", index) for index in range(3)]

    def test_layers_that_have_experts_cannot_be_upcycled(self, tmp_path: Path) -> None:
        parent = write_native(tmp_path / "parent", "mixtral")
        part = PartSection(layers=[0], num_experts=4)
        with pytest.raises(ValueError, match="MixtralSparseMoeBlock matches no known feed-forward pattern"):
            upcycle(UpcycleSection(parent=str(parent), decoder=part), tmp_path / "out")
