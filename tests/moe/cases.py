"""What the contract tests of this folder run over: every registered name, with the option values that matter."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llava_moe.moe import EXPERTS, ROUTERS, Experts, MlpSpec, MoELayer, Router, Routing, RoutingContext, RoutingScope
from llava_moe.moe.experts import ACTIVATIONS, StackedExperts
from llava_moe.moe.kernels import ExpertWeights

Case = tuple[str, dict[str, Any]]
HIDDEN, NUM_EXPERTS = 8, 5
# Every router must appear with its defaults; a new one is added by itself.
_EXTRA_ROUTERS: list[Case] = [
    ("top_k", {"k": 1}),
    ("top_k", {"k": 3, "bias": True}),
    ("top_k", {"k": 2, "convention": "softmax_topk"}),
    ("top_k", {"k": 1, "convention": "softmax_topk"}),
    ("top_k", {"k": 2, "convention": "topk_softmax"}),
    ("top_k", {"k": 3, "scheduled_k": True}),
    ("top_k", {"k": NUM_EXPERTS}),
    ("scored", {"scorer": "two_layer", "selector": "sigmoid_topk_renorm"}),
    ("scored", {"scorer": "noisy_linear", "scorer_args": {"init_std": 0.1}, "selector": "sigmoid_topk"}),
    ("noisy_top_k", {"k": 1, "init_std": 0.02}),
    ("sigmoid", {"renormalise": True, "expert_dropout": 0.0}),
    ("sigmoid", {"k": 1, "expert_dropout": 0.5}),
    ("cosine", {"learn_temperature": True, "selector": "sigmoid_topk"}),
    ("perturbed_cosine", {"theta1": 0.0, "selector": "double_softmax", "selector_args": {"bias": True}}),
    ("xmoe", {"embedding_norm": 1.5, "learn_temperature": False, "selector": "double_softmax"}),
    ("xmoe", {"width": 3, "normalise_input": False, "temperature": 1.0, "embedding_init": "orthogonal"}),
    ("hyper_router", {"freeze": False, "selector_args": {"scheduled_k": True}}),
    ("deepseek_v2", {"num_groups": 5, "topk_groups": 2, "renormalise": True}),
    ("deepseek_v3", {"num_groups": 5, "topk_groups": 3, "scale": 2.5}),
    ("deepseek_v3", {"renormalise": False}),
    ("dts", {"k": 2, "gumbel_weights": False}),
    ("dts", {"hard_at": 0.5}),
    ("skywork", {"scale": 3.0, "bias": True}),
    ("top_p", {"p": 0.9, "k_max": 3}),
    ("random", {"k": 1}),
    ("hash", {"k": 2, "table": "modulo", "rows": 7}),
    ("hash", {"table": "balanced", "frequencies": (9.0, 4.0, 3.0, 2.0, 2.0, 1.0, 1.0)}),
    ("hash", {"by": "position", "seed": None}),
]
ROUTER_CASES: list[Case] = [(name, {}) for name in ROUTERS.names()] + _EXTRA_ROUTERS
SPECS = {
    "gated": MlpSpec(8, 12, "silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "gated-bias": MlpSpec(8, 12, "gelu", True, True, "gate_proj", "up_proj", "down_proj"),
    "plain": MlpSpec(8, 12, "relu2", False, False, None, "up_proj", "down_proj"),
    "plain-bias": MlpSpec(8, 12, "gelu", False, True, None, "fc1", "fc2"),
    "odd": MlpSpec(7, 9, "silu", True, True, "gate_proj", "up_proj", "down_proj"),
}
# Kinds of experts that a router cannot do without, such that a layer has NUM_EXPERTS of them.
_SPECIAL = {"moe_plus_plus": {"num_zero": 1, "num_copy": 1, "num_constant": 0}}


def case_id(case: Case) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def kinds_for(name: str, num_experts: int) -> tuple[str, ...]:
    """What the experts behind a router of that name are."""
    if name not in _SPECIAL:
        return ("ffn",) * num_experts
    return (*("ffn",) * max(0, num_experts - 2), "zero", "copy")[-num_experts:]


def make_router(case: Case, hidden: int = HIDDEN, num_experts: int = NUM_EXPERTS) -> Router:
    """A router that has seen its experts, with logits of order one, so that near-ties do not decide a test."""
    router = ROUTERS.get(case[0]).build(hidden, num_experts, case[1])
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    spec = dataclasses.replace(SPECS["gated"], hidden=hidden)
    experts = SimpleNamespace(spec=spec, num_experts=num_experts, kinds=kinds_for(case[0], num_experts))
    router.attach(cast(Experts, experts))
    return router


def make_experts(spec: MlpSpec, num_experts: int = NUM_EXPERTS, kernel: str = "loop") -> StackedExperts:
    """Experts with biases that are not zero."""
    experts = StackedExperts.build(spec, num_experts, {"kernel": kernel})
    assert isinstance(experts, StackedExperts)
    _randomise(experts)
    return experts


def _randomise(experts: Experts) -> None:
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)


class FullScope(RoutingScope):
    """Gives text ids and a modality to every token whose context has none, so that any router works in a layer."""

    def context(self, *args: Any) -> RoutingContext:
        found = super().context(*args)
        zeros_T = torch.zeros_like(found.sequence_T)
        return dataclasses.replace(
            found,
            token_ids_T=zeros_T if found.token_ids_T is None else found.token_ids_T,
            modality_T=zeros_T if found.modality_T is None else found.modality_T,
        )


def make_layer(case: Case = ("top_k", {}), spec: str = "gated", kernel: str = "grouped", **kwargs: Any) -> MoELayer:
    """A layer of NUM_EXPERTS experts of the kind that the router needs."""
    router, experts = make_router(case, SPECS[spec].hidden), make_experts(SPECS[spec], kernel=kernel)
    if case[0] in _SPECIAL:
        options = {"kernel": kernel, **_SPECIAL[case[0]]}
        special = EXPERTS.get("special").build(SPECS[spec], NUM_EXPERTS - 2, options)
        _randomise(special)
        return MoELayer(router, special, **{"scope": FullScope(), "part": part_for(case), **kwargs})
    return MoELayer(router, experts, **{"scope": FullScope(), "part": part_for(case), **kwargs})


def part_for(case: Case) -> str:
    """Where a router can stand: one that goes by positions alone is not for decoders."""
    return "vision" if case[1].get("by") == "position" else "decoder"


def full_context(
    num_tokens: int, num_experts: int = NUM_EXPERTS, hidden: int = HIDDEN, part: str = "decoder", pictures: bool = True
) -> RoutingContext:
    """A context with every field: two sequences, ids, every third token a picture's unless `pictures` is false, a layer
    before this one, and experts that can be run (fixed linear maps)."""
    generator = torch.Generator().manual_seed(17)
    place_T = torch.arange(num_tokens)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    weight_TK, index_TK = logits_TE.softmax(-1).topk(min(2, num_experts), dim=-1)
    maps_EDD = torch.randn(num_experts, hidden, hidden, generator=generator)
    return RoutingContext(
        token_mask_T=torch.ones(num_tokens, dtype=torch.bool),
        sequence_T=(place_T >= num_tokens // 2).long(),
        modality_T=(place_T % 3 == 1).long() if pictures else torch.zeros_like(place_T),
        token_ids_T=place_T * 7 % 11,
        part=part,
        previous=Routing(logits_TE, logits_TE.softmax(-1), index_TK, weight_TK),
        run_experts=lambda x_TD: torch.einsum("td,eod->teo", x_TD.float(), maps_EDD).to(x_TD.dtype),
    )


def context_for(case: Case, num_tokens: int, num_experts: int = NUM_EXPERTS) -> RoutingContext:
    """The full context of a part where the router can stand. Of text alone where the place of a picture's token would
    decide, so that the order of the tokens does not matter."""
    return full_context(num_tokens, num_experts, part=part_for(case), pictures=case[0] != "hash")


def take(context: RoutingContext, index_T: Tensor) -> RoutingContext:
    """The context of some of the tokens, in that order."""
    names = ("token_mask_T", "sequence_T", "modality_T", "token_ids_T")
    chosen = {name: value[index_T] for name in names if (value := getattr(context, name)) is not None}
    if (before := context.previous) is not None:
        tensors = (before.logits_TE, before.probs_TE, before.index_TK, before.weight_TK)
        chosen["previous"] = Routing(*(tensor[index_T] for tensor in tensors))
    return dataclasses.replace(context, **chosen)


def padded(context: RoutingContext, num_pads: int) -> RoutingContext:
    """The context with masked tokens appended to its last sequence; their other fields are copies of real ones."""
    num_tokens = context.token_mask_T.shape[0]
    more = take(context, torch.cat([torch.arange(num_tokens), torch.full((num_pads,), num_tokens - 1)]))
    return dataclasses.replace(more, token_mask_T=torch.arange(num_tokens + num_pads) < num_tokens)


def as_numpy(context: RoutingContext) -> dict[str, Any]:
    """The context as the oracles take it: arrays under the names of the fields, also inside `previous`."""
    found: dict[str, Any] = {}
    for name in ("token_mask_T", "sequence_T", "modality_T", "token_ids_T"):
        value = getattr(context, name)
        found[name] = None if value is None else value.numpy()
    before = context.previous
    found["previous"] = before and SimpleNamespace(
        logits_TE=before.logits_TE.double().numpy(),
        probs_TE=before.probs_TE.double().numpy(),
        index_TK=before.index_TK.numpy(),
        weight_TK=before.weight_TK.double().numpy(),
    )
    return {**found, "layer": context.layer, "part": context.part}


def state_as_numpy(router: Router) -> dict[str, np.ndarray]:
    """The state dict as the oracles take it: float64 arrays."""
    return {name: value.double().numpy() for name, value in router.state_dict().items()}


def expert_weights(experts: StackedExperts) -> ExpertWeights:
    """The arguments that a kernel gets for these experts."""
    first = "gate_up" if experts.spec.gated else "up"
    return ExpertWeights(
        first_EFD=getattr(experts, f"{first}_proj"),
        down_EDF=experts.down_proj,
        first_bias_EF=getattr(experts, f"{first}_bias"),
        down_bias_ED=experts.down_bias,
        activation=ACTIVATIONS[experts.spec.activation],
        gated=experts.spec.gated,
    )


def random_slots(num_tokens: int, k: int, num_experts: int = NUM_EXPERTS, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, (T, K), with positive weights; `empty` puts the index E into some slots."""
    index = torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)]) if num_tokens else None
    index_TK = torch.zeros(0, k, dtype=torch.int64) if index is None else index
    if empty:
        index_TK = torch.where(torch.rand(num_tokens, k) < 0.4, num_experts, index_TK)
    return index_TK, torch.rand(num_tokens, k) + 0.1


def golden_routing() -> Routing:
    """The worked example of four tokens, three experts and k = 2."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    weight, index = probs.topk(2, dim=-1)
    return Routing(probs.log(), probs, index, weight)
