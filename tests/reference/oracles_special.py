"""Slow and obvious twins of the routers that are more than a scorer and a selector, in evaluation mode.

    oracle(state, config, x, context) -> (gates (T, E), probs (T, E))

as in `oracles_routers.py`: `state` is `router.state_dict()` as float64 arrays, `context` the fields of RoutingContext.
Below them: balanced assignment by dynamic programming, expert kinds and Soft MoE on single tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from llava_moe.moe import ROUTERS as REGISTRY
from llava_moe.moe import SCORERS
from tests.reference import oracles_routers
from tests.reference.oracles_routers import SCORER_ORACLES, Oracle, Row, State, best, dot, length, part_of, softmax

Answer = tuple[np.ndarray, np.ndarray]


def logits_before(context: Mapping[str, Any]) -> np.ndarray | None:
    """Logits of the MoE layer before this one, or None."""
    previous = context.get("previous")
    if previous is None:
        return None
    found = previous if isinstance(previous, np.ndarray) else previous.logits_TE
    return np.asarray(found.detach() if hasattr(found, "detach") else found, dtype=np.float64)


def slices(width: int, num_experts: int) -> list[range]:
    """The dimensions of each expert: those with floor(j E / D) of the bounds floor(e D / E)."""
    bounds = [math.floor(e * width / num_experts) for e in range(num_experts + 1)]
    return [range(bounds[e], bounds[e + 1]) for e in range(num_experts)]


def grap(state: State, options: Any, x: Any) -> Row:
    num_experts = len(state["directions"])
    bias = state.get("bias", np.zeros(num_experts))
    means = [sum(float(x[j]) for j in part) / len(part) for part in slices(len(x), num_experts)]
    return [max(0.0, mean + float(b)) for mean, b in zip(means, bias, strict=True)]


def locmoe(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    gates, probs = [], []
    for token in x:
        z = grap(part_of(state, "scorer"), None, token)
        p = softmax(z)
        winner = z.index(max(z))
        gates.append([(1.0 if config.renormalise else p[e]) * (e == winner) for e in range(len(z))])
        probs.append(p)
    return np.array(gates), np.array(probs)


def expert_token_resonance(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    """In evaluation experts refuse nobody."""
    num_experts = len(state["directions"])
    gates, probs = [], []
    for token in x:
        size = length(token)
        cosines = [
            sum(float(token[j]) for j in part) / (math.sqrt(len(part)) * size) if size else 0.0
            for part in slices(len(token), num_experts)
        ]
        p = softmax(cosines)
        chosen = best(cosines, config.k)
        gates.append([p[e] / sum(p[j] for j in chosen) if e in chosen else 0.0 for e in range(num_experts)])
        probs.append(p)
    return np.array(gates), np.array(probs)


def expert_choice(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    scorer = part_of(state, "scorer")
    probs = np.array([softmax(oracles_routers.linear(scorer, None, token)) for token in x])
    num_tokens, num_experts = probs.shape
    group_of = [0 if config.group == "batch" else int(s) for s in context["sequence_T"]]
    gates = np.zeros_like(probs)
    for group in set(group_of):
        members = [t for t in range(num_tokens) if group_of[t] == group and bool(context["token_mask_T"][t])]
        capacity = min(len(members), math.ceil(config.capacity_factor * len(members) / num_experts - 1e-9))
        for e in range(num_experts):
            for t in sorted(members, key=lambda t: -probs[t, e])[:capacity]:
                gates[t, e] = probs[t, e]
    if config.renormalise:
        gates = np.array([row / row.sum() if row.sum() else row for row in gates])
    return gates, probs


def base_layer(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    gates, probs = [], []
    for token in x:
        z = [dot(centroid, token) for centroid in state["centroids"]]
        alpha = [1 / (1 + math.exp(-value)) for value in z]
        gates.append([alpha[e] if z[e] == max(z) else 0.0 for e in range(len(z))])
        probs.append(alpha)
    return np.array(gates), np.array(probs)


def compete_smoe(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    """It never competes in evaluation."""
    return oracles_routers.two_parts(state, x, "linear", config, "softmax_topk_renorm", _top(config.k))


def _top(k: int) -> Any:
    return SimpleNamespace(k=k, scheduled_k=False)


def moe_plus_plus(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    options = SCORERS.get(config.scorer).parse(config.scorer_args)
    before = logits_before(context)
    gates, probs = [], []
    for t, token in enumerate(x):
        z = SCORER_ORACLES[config.scorer](part_of(state, "scorer"), options, token)
        if before is not None:
            z = [value + dot(row, before[t]) for value, row in zip(z, state["residual"], strict=True)]
        p = softmax(z)
        kept = [e for e in best(z, config.k) if not state["zero_E"][e]]
        gates.append([p[e] / sum(p[j] for j in kept) if e in kept else 0.0 for e in range(len(z))])
        probs.append(p)
    return np.array(gates), np.array(probs)


def tc_moe(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    num_experts = (len(state["weight"]) - config.k) // 2
    offsets = [0.0] * num_experts + [config.negative_offset] * num_experts + [config.null_offset] * config.k
    gates, probs = np.zeros((len(x), num_experts)), np.zeros((len(x), num_experts))
    for t, token in enumerate(x):
        z = [dot(row, token) + offset for row, offset in zip(state["weight"], offsets, strict=True)]
        p = softmax(z)
        chosen = best(z, config.k)
        normaliser = sum(p[a] for a in chosen if a < 2 * num_experts) + sum(p[2 * num_experts :])
        for a in chosen:
            if a < num_experts:
                gates[t, a] += p[a] / normaliser
            elif a < 2 * num_experts:
                gates[t, a - num_experts] -= p[a] / normaliser
        for e in range(num_experts):
            probs[t, e] = p[e] + p[e + num_experts]
    return gates, probs


def hyper_moe(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    return oracles_routers.ROUTERS["noisy_top_k"](state, config, x, context)


def modality(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> Answer:
    """Each token alone is given to the router of its modality; inner routers here look at single tokens."""
    inner_config = REGISTRY.get(config.router).parse(config.router_args)
    found = {}
    for kind in ("image", "text"):
        inner = all_routers()[config.router]
        found[kind] = inner(part_of(state, kind), inner_config, x, context)
    num_image, num_text = found["image"][0].shape[1], found["text"][0].shape[1]
    split = config.mode == "experts"
    num_experts = num_image + num_text if split else num_image
    gates, probs = np.zeros((len(x), num_experts)), np.zeros((len(x), num_experts))
    for t in range(len(x)):
        is_image = context.get("modality_T") is not None and context["modality_T"][t] == 1
        start = num_image if split and not is_image else 0
        own_gates, own_probs = found["image" if is_image else "text"]
        gates[t, start : start + own_gates.shape[1]] = own_gates[t]
        probs[t, start : start + own_probs.shape[1]] = own_probs[t]
    return gates, probs


SPECIAL_SCORERS = {"grap": grap}
ROUTERS: dict[str, Oracle] = {
    "expert_choice": expert_choice,
    "base_layer": base_layer,
    "compete_smoe": compete_smoe,
    "moe_plus_plus": moe_plus_plus,
    "tc_moe": tc_moe,
    "locmoe": locmoe,
    "expert_token_resonance": expert_token_resonance,
    "hyper_moe": hyper_moe,
    "modality": modality,
}


def all_routers() -> dict[str, Oracle]:
    return {**oracles_routers.ROUTERS, **ROUTERS}


def best_balanced_total(scores: np.ndarray) -> float:
    """The largest sum of scores when no expert takes more than ceil(T / E) tokens: all ways, token after token."""
    num_tokens, num_experts = scores.shape
    limit = math.ceil(num_tokens / num_experts)

    @functools.cache
    def rest(token: int, room: tuple[int, ...]) -> float:
        if token == num_tokens:
            return 0.0
        options = [e for e in range(num_experts) if room[e]]
        return max(float(scores[token, e]) + rest(token + 1, (*room[:e], room[e] - 1, *room[e + 1 :])) for e in options)

    return rest(0, (limit,) * num_experts)


def soft_moe(x: np.ndarray, phi: np.ndarray, scale: float, experts: list[Any], mask: list[bool]) -> np.ndarray:
    """One sequence (S, D); `phi` is (E, P, D) and `experts` are functions of one vector."""
    directions = [phi[e, p] for e in range(phi.shape[0]) for p in range(phi.shape[1])]

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / math.sqrt(float(vector @ vector) + 1e-6)

    z = [[scale * float(unit(token) @ unit(direction)) for direction in directions] for token in x]
    real = [t for t in range(len(x)) if mask[t]]
    outputs = []
    for m in range(len(directions)):
        shares = softmax([z[t][m] for t in real])
        mixed = sum(share * x[t] for share, t in zip(shares, real, strict=True))
        outputs.append(experts[m // phi.shape[1]](mixed))
    return np.array([sum(c * out for c, out in zip(softmax(z[t]), outputs, strict=True)) for t in range(len(x))])


def dense_block(state: State, x: np.ndarray, activation: Any, gated: bool) -> np.ndarray:
    """The frozen block on one token, by its `base_*` tensors."""
    return _block(state, x, activation, gated, lambda name, value: np.zeros(len(state[f"base_{name}_proj"])))


def lora_expert(state: State, e: int, x: np.ndarray, activation: Any, gated: bool, scale: float) -> np.ndarray:
    """The block with W + s B_e A_e in the place of every W."""
    return _block(
        state, x, activation, gated, lambda n, v: scale * state[f"lora_{n}_b"][e] @ (state[f"lora_{n}_a"][e] @ v)
    )


def lora_mixture(state: State, gates: Row, x: np.ndarray, activation: Any, gated: bool, scale: float) -> np.ndarray:
    """The block with W + s sum_e g_e B_e A_e in the place of every W."""

    def delta(name: str, value: np.ndarray) -> np.ndarray:
        change = sum(g * state[f"lora_{name}_b"][e] @ state[f"lora_{name}_a"][e] for e, g in enumerate(gates))
        return scale * change @ value

    return _block(state, x, activation, gated, delta)


def vector_mixture(state: State, gates: Row, x: np.ndarray, activation: Any, gated: bool) -> np.ndarray:
    """The block with its intermediate multiplied by sum_e g_e l_e."""
    merged = sum(g * state["vectors"][e] for e, g in enumerate(gates))
    scaled = {**state, "base_down_proj": state["base_down_proj"] * merged}
    return dense_block(scaled, x, activation, gated)


def _block(state: State, x: np.ndarray, activation: Any, gated: bool, delta: Any) -> np.ndarray:
    def project(name: str, value: np.ndarray) -> np.ndarray:
        bias = state.get(f"base_{name}_bias", 0.0)
        return state[f"base_{name}_proj"] @ value + bias + delta(name, value)

    act = np.vectorize(activation)
    hidden = act(project("gate", x)) * project("up", x) if gated else act(project("up", x))
    return project("down", hidden)
