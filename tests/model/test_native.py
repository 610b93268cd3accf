"""Decoders that transformers builds with experts of their own: records, losses, files, and every family known."""

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
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func as qwen2_loss
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as qwen3_loss

from llava_moe.model.assemble import load_model
from llava_moe.model.native import NATIVE_FAMILIES, NativeRouter, watch_native
from llava_moe.model.upcycling import count_parameters
from llava_moe.moe import LayerStats, RoutingContext, RoutingScope
from llava_moe.training.controllers import measure
from llava_moe.training.objective import balance_terms
from llava_moe.training.stage import part_of
from llava_moe.training.telemetry import RoutingMeter
from tests.model.inputs import gradients, greedy, logits_of, picture_batch, prompt_batch
from tests.model.native_cases import BIAS, MLA, E, K, every_decoder, native_model, sites, switch


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


_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "num_experts": E,
    "num_local_experts": E, "n_routed_experts": E, "moe_num_experts": E, "num_experts_per_tok": K, "n_group": 2,
    "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "shared_expert_intermediate_size": 16,
    "pad_token_id": 0, "sliding_window": 16, "initializer_range": 0.2, **MLA,
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
