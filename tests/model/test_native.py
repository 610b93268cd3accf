"""Decoders that transformers builds with experts of their own: records, losses, controllers, telemetry and files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func as qwen2_loss
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as qwen3_loss

from llava_moe.config import BalanceSection, NamedSection, PartSection, RecipeError, UpcycleSection
from llava_moe.model.assemble import load_model
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.model.native import NATIVE_FAMILIES, NativeRouter, watch_native
from llava_moe.model.upcycling import count_parameters, upcycle
from llava_moe.moe import BALANCE_LOSSES, LayerStats, MoELayer, RoutingContext, RoutingScope
from llava_moe.training import runner
from llava_moe.training.controllers import Controllers, measure, moe_layers
from llava_moe.training.metrics import read_metrics
from llava_moe.training.objective import Balance, balance_terms
from llava_moe.training.stage import part_of
from llava_moe.training.telemetry import RoutingMeter
from tests.model.inputs import gradients, greedy, logits_of, picture_batch, prompt_batch
from tests.tiny import tiny_tokenizer, write_llava_json
from tests.tiny_model import tiny_config, tiny_processor
from tests.training.runs import MOE_PARTS, make_config

E, K = 8, 3
BIAS = "e_score_correction_bias"
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_QWEN = {"moe_intermediate_size": 24, "num_experts": E}
# name: model_type, values of its config, layers with experts
DECODERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "mixtral": ("mixtral", {"num_local_experts": E}, [0, 1, 2]),
    "qwen2_moe": ("qwen2_moe", {**_QWEN, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]}, [0, 2]),
    "qwen3_moe": ("qwen3_moe", {**_QWEN, "norm_topk_prob": True, "head_dim": 8, "mlp_only_layers": [0]}, [1, 2]),
    "olmoe": ("olmoe", {"num_experts": E}, [0, 1, 2]),
    "deepseek_v3": (
        "deepseek_v3",
        {**_MLA, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": E, "n_group": 4,
         "topk_group": 2, "first_k_dense_replace": 1},
        [1, 2],
    ),
}  # fmt: skip
every_decoder = pytest.mark.parametrize("name", DECODERS)


def text_config(name: str, **changes: Any) -> Any:
    model_type, values, _ = DECODERS[name]
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
        "num_experts_per_tok": K, "tie_word_embeddings": False, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return CONFIG_MAPPING[model_type](**{**sizes, **values, **changes})


def native_model(name: str, seed: int = 0, **changes: Any) -> LlavaMoeForConditionalGeneration:
    """Gates of unequal taste, and a bias that moves the selection where there is one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaMoeForConditionalGeneration(tiny_config(text_config=text_config(name, **changes))).eval()
        for layer in model.model.native_layers.values():
            for parameter in [*layer.router.gate.parameters(), *layer.experts.parameters()]:
                parameter.normal_(std=0.3)
            for buffer in layer.router.gate.buffers():
                buffer.normal_(std=0.1)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(std=0.3)
    return model


def write_native(folder: Path, name: str, **changes: Any) -> Path:
    model, processor = native_model(name, **changes), tiny_processor()
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.pad_token_id
    model.save_pretrained(folder, save_original_format=True)
    processor.save_pretrained(folder)
    return folder


def sites(name: str) -> list[tuple[str, int]]:
    return [("decoder", index) for index in DECODERS[name][2]]


class Watch:
    """What every gate is given, by its layer: the oracle starts from there and from the gate's tensors."""

    def __init__(self, model: Any) -> None:
        self.inputs: dict[int, Tensor] = {}
        for (_, index), layer in model.model.native_layers.items():
            layer.router.gate.register_forward_pre_hook(self._keeper(index))

    def _keeper(self, index: int) -> Any:
        def keep(module: Any, args: tuple[Tensor, ...]) -> None:
            self.inputs[index] = args[0].detach().reshape(-1, args[0].shape[-1])

        return keep


def oracle(layer: Any, x_TD: Tensor, text: Any) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Logits, probabilities and chosen experts, token by token."""
    gate = layer.router.gate
    logits_TE = x_TD.double() @ gate.weight.detach().double().T
    chosen = []
    if not hasattr(gate, BIAS):
        probs_TE = torch.softmax(logits_TE, dim=-1)
        for row in probs_TE.tolist():
            chosen.append(sorted(range(E), key=lambda e: -row[e])[:K])
        return logits_TE, probs_TE, chosen
    scores_TE = torch.sigmoid(logits_TE)
    for row in (scores_TE + gate.get_buffer(BIAS)).tolist():
        width = E // text.n_group
        groups = [row[g * width : (g + 1) * width] for g in range(text.n_group)]
        best = sorted(range(text.n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))[: text.topk_group]
        inside = [e for e in range(E) if e // width in best]
        chosen.append(sorted(inside, key=lambda e: -row[e])[:K])
    return logits_TE, scores_TE / scores_TE.sum(-1, keepdim=True), chosen


@every_decoder
class TestRecords:
    """What a forward leaves in the scope."""

    def test_routings_are_the_oracles(self, name: str) -> None:
        model = native_model(name)
        watch, batch = Watch(model), picture_batch(model)
        with torch.no_grad():
            output = model(**batch)
        assert list(output.routings) == sites(name)
        meter, mask_T = RoutingMeter(), batch["attention_mask"].bool().flatten()
        for site, routing in output.routings.items():
            layer = model.model.native_layers[site]
            logits_TE, probs_TE, chosen = oracle(layer, watch.inputs[site[1]], model.config.text_config)
            assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.weight_TK.dtype == torch.float32
            torch.testing.assert_close(routing.logits_TE.double(), logits_TE, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(routing.probs_TE.double(), probs_TE, rtol=1e-4, atol=1e-6)
            assert [sorted(row) for row in routing.index_TK.tolist()] == [sorted(row) for row in chosen]
            counts = [0.0] * E
            for real, row in zip(mask_T.tolist(), chosen, strict=True):
                for expert in row:
                    counts[expert] += real
            assert LayerStats.measure(routing, mask_T).load_E.tolist() == counts
            sums_T = routing.weight_TK.sum(-1)
            assert bool((sums_T - 1).abs().max() < 1e-5) is layer.router.normalised
            context = model.model.scope.context_of(site)
            assert context.token_mask_T.tolist() == mask_T.tolist()
            assert context.site == site
            again = layer.router(watch.inputs[site[1]], RoutingContext.trivial(len(mask_T)))
            assert torch.equal(again.index_TK, routing.index_TK)
        stats = measure(output.routings, model.model.scope)
        meter.update({}, output.routings, model.model.scope)
        row = meter.flush()["layers"][str(sites(name)[0][1])]
        load_E = stats[sites(name)[0]].load_E
        assert row["load"] == [round(float(v / load_E.sum()), 5) for v in load_E]

    def test_checkpointing_records_once_and_changes_no_gradient(self, name: str) -> None:
        found = []
        for checkpointing in (False, True):
            model = native_model(name).train()
            calls: list[Any] = []
            for layer in model.model.native_layers.values():
                layer.router.gate.register_forward_hook(lambda gate, *_, calls=calls: calls.append(gate))
            if checkpointing:
                model.gradient_checkpointing_enable()
            output = model(**picture_batch(model), use_cache=False)
            before = {site: routing.index_TK.clone() for site, routing in output.routings.items()}
            terms = balance_terms(output.routings, model.model.scope, {"switch": switch(), "z": switch("z")})
            (output.loss + 0.1 * terms["switch"] + 0.01 * terms["z"]).backward()
            assert all(torch.equal(before[site], routing.index_TK) for site, routing in output.routings.items())
            assert list(output.routings) == sites(name)
            assert len(calls) == len(sites(name)) * (2 if checkpointing else 1)
            found.append(gradients(model))
        plain, recomputed = found
        assert plain.keys() == recomputed.keys()
        for key, gradient in plain.items():
            torch.testing.assert_close(recomputed[key], gradient, rtol=1e-4, atol=1e-6)

    def test_balance_alone_reaches_the_gates_and_nothing_behind_them(self, name: str) -> None:
        model = native_model(name).train()
        output = model(**picture_batch(model), use_cache=False)
        balance_terms(output.routings, model.model.scope, {"switch": switch()})["switch"].backward()
        found = gradients(model)
        for site, layer in model.model.native_layers.items():
            path = next(key for key, module in model.named_modules() if module is layer.router.gate)
            assert float(found[f"{path}.weight"].abs().sum()) > 0, site
        assert "lm_head.weight" not in found

    def test_the_stock_balance_loss_is_not_in_the_loss(self, name: str) -> None:
        model = native_model(name, output_router_logits=True)
        if hasattr(model.config.text_config, "router_aux_loss_coef"):
            model.config.text_config.router_aux_loss_coef = 100.0
        batch = picture_batch(model)
        with torch.no_grad():
            output = model(**batch)
        labels = batch["labels"]
        alone = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(output.loss, alone)

    def test_a_copy_records_into_its_own_scope(self, name: str) -> None:
        model = native_model(name)
        twin = copy.deepcopy(model)
        batch = picture_batch(model)
        with torch.no_grad():
            mine, theirs = model(**batch).routings, twin(**batch).routings
        assert list(mine) == list(theirs) == sites(name)
        gate = twin.model.native_layers[sites(name)[0]].router.gate
        assert any(module is gate for module in twin.modules())
        with torch.no_grad():
            gate.weight.neg_()
            assert not torch.equal(twin(**batch).routings[sites(name)[0]].index_TK, mine[sites(name)[0]].index_TK)
            assert torch.equal(model(**batch).routings[sites(name)[0]].index_TK, mine[sites(name)[0]].index_TK)

    def test_the_parts_of_a_stage(self, name: str) -> None:
        model = native_model(name)
        owners = {id(p): "router" for layer in model.model.native_layers.values() for p in layer.router.parameters()}
        owners |= {id(p): "experts" for layer in model.model.native_layers.values() for p in layer.experts.parameters()}
        parts = {key: part_of(key) for key, _ in model.named_parameters()}
        for key, parameter in model.named_parameters():
            if id(parameter) in owners:
                assert parts[key] == owners[id(parameter)], key
            else:
                assert parts[key] == ("experts" if ".shared_expert" in key else parts[key]) != "router", key
        assert sum(part == "router" for part in parts.values()) == len(sites(name))
        assert any(part == "decoder" for part in parts.values())

    def test_active_parameters(self, name: str) -> None:
        model = native_model(name)
        found = count_parameters(model)
        experts = sum(p.numel() for layer in model.model.native_layers.values() for p in layer.experts.parameters())
        assert found["total"] == sum(p.numel() for p in model.parameters())
        assert found["total"] - found["active"] == experts * (E - K) // E


def switch(loss: str = "switch", **options: Any) -> Any:
    return BALANCE_LOSSES.get(loss).build(options)


class TestAgainstTransformers:
    """Our loss on these records is theirs, where the two mean the same."""

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize(
        ("name", "theirs"), [("mixtral", mixtral_loss), ("qwen2_moe", qwen2_loss), ("qwen3_moe", qwen3_loss)]
    )
    def test_switch_per_token(self, name: str, theirs: Any, padded: bool) -> None:
        """`switch {per: token}` layer by layer. Over several layers theirs is no mean: it multiplies means of the
        layers' loads with means of their probabilities, so that opposite layers seem balanced."""
        model = native_model(name)
        batch = picture_batch(model, batch=3)
        if not padded:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        routings = model(**batch).routings
        ours = switch(per="token")
        mask = batch["attention_mask"] if padded else None
        values = []
        for site, routing in routings.items():
            values.append(ours(routing, model.model.scope.context_of(site)))
            torch.testing.assert_close(values[-1], theirs((routing.logits_TE,), E, K, mask))
        joint = theirs(tuple(routing.logits_TE for routing in routings.values()), E, K, mask)
        mean = balance_terms(routings, model.model.scope, {"switch": ours})["switch"]
        torch.testing.assert_close(mean, torch.stack(values).mean())
        assert float((joint - mean).abs().detach()) > 1e-3

    @every_decoder
    @pytest.mark.parametrize("original_format", [False, True])
    def test_a_stock_llava_around_it_loads_and_ours_is_bit_equal(
        self, name: str, original_format: bool, tmp_path: Path
    ) -> None:
        model = native_model(name)
        own = (
            "model_type",
            "projector",
            "projector_args",
            "moe",
            "logit_scale",
            "logit_softcap",
            "logit_bias",
            "architectures",
        )
        values = {key: value for key, value in model.config.to_dict().items() if key not in own}
        stock = LlavaForConditionalGeneration(LlavaConfig(**values)).eval()
        stock.load_state_dict(model.state_dict())
        stock.save_pretrained(tmp_path / "stock")
        ours = load_model(tmp_path / "stock")
        batch, prompts = picture_batch(model), prompt_batch(model)
        assert torch.equal(logits_of(ours, **batch), logits_of(stock, **batch))
        ours.save_pretrained(tmp_path / "ours", save_original_format=original_format)
        again = load_model(tmp_path / "ours")
        mine, theirs = model.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
        assert torch.equal(logits_of(again, **batch), logits_of(model, **batch))
        assert greedy(again, **prompts) == greedy(model, **prompts) == greedy(stock, **prompts)
        if original_format:
            names = [sorted(_names(tmp_path / folder)) for folder in ("stock", "ours")]
            assert names[0] == names[1]


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


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


_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "num_experts": E,
    "num_local_experts": E, "n_routed_experts": E, "moe_num_experts": E, "num_experts_per_tok": K, "n_group": 2,
    "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "shared_expert_intermediate_size": 16,
    "pad_token_id": 0, "sliding_window": 16, "initializer_range": 0.2, **_MLA,
}  # fmt: skip
_HEAD_DIM_OF_ITS_OWN = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "mistral4")


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_every_family_of_the_table(family: str) -> None:
    """The weights of the chosen experts are in proportion to the scores that the table names; the flags are true."""
    warnings.simplefilter("ignore")
    sizes = _SMALL if family in _HEAD_DIM_OF_ITS_OWN else {**_SMALL, "head_dim": 8, "num_key_value_heads": 2}
    decoder = AutoModel.from_config(CONFIG_MAPPING[family](**sizes)).eval()
    scope = RoutingScope()
    layers = watch_native(decoder, scope)
    assert layers
    for layer in layers.values():
        with torch.no_grad():
            for tensor in [*layer.router.gate.parameters(), *layer.router.gate.buffers()]:
                tensor.normal_(std=0.3)
    with scope.recording() as routings, torch.no_grad():
        decoder(input_ids=torch.arange(20).reshape(2, 10) + 1, use_cache=False)
    assert routings.keys() == layers.keys()
    for site, routing in routings.items():
        router = layers[site].router
        assert isinstance(router, NativeRouter)
        assert routing.probs_TE.shape == (20, router.num_experts)
        assert routing.index_TK.shape == (20, router.active_experts)
        assert int(routing.index_TK.max()) < router.num_experts
        torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(20))
        ratio_TK = routing.weight_TK / routing.probs_TE.gather(-1, routing.index_TK)
        torch.testing.assert_close(ratio_TK, ratio_TK[:, :1].expand_as(ratio_TK), rtol=1e-3, atol=0)
        assert bool((routing.weight_TK.sum(-1) - 1).abs().max() < 1e-4) is router.normalised
    gates = {id(p) for layer in layers.values() for p in layer.router.parameters()}
    experts = {id(p) for layer in layers.values() for p in layer.experts.parameters()}
    for key, parameter in decoder.named_parameters(prefix="model.language_model"):
        found = part_of(key)
        assert (found == "router") is (id(parameter) in gates), key
        if id(parameter) in experts:
            assert found == "experts", key


def test_the_table_is_as_long_as_promised() -> None:
    assert len(NATIVE_FAMILIES) >= 30
    assert {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"} <= NATIVE_FAMILIES.keys()
