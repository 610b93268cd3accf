"""Slow and obvious twins of the scorers, the selectors and the routers made of them, in evaluation mode.

Every function works on one token with plain Python numbers, one formula a line. A router's oracle is

    oracle(state, config, x, context) -> (gates (T, E), probs (T, E))

`state` is `router.state_dict()` as float64 arrays, `config` the router's Config, x a (T, D) array and `context` the
fields of RoutingContext by name, as arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from llava_moe.moe import SCORERS, SELECTORS

State = Mapping[str, np.ndarray]
Row = list[float]
Oracle = Callable[[State, Any, np.ndarray, Mapping[str, Any]], tuple[np.ndarray, np.ndarray]]


def softmax(scores: Row) -> Row:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    return [power / sum(powers) for power in powers]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def dot(one: Any, two: Any) -> float:
    return sum(float(a) * float(b) for a, b in zip(one, two, strict=True))


def length(vector: Any) -> float:
    return math.sqrt(dot(vector, vector))


def best(scores: Row, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


# Scorers: (state of the scorer, options, one token) -> the logits of the token


def linear(state: State, options: Any, x: Any) -> Row:
    bias = state.get("bias", np.zeros(len(state["weight"])))
    return [dot(row, x) + float(b) for row, b in zip(state["weight"], bias, strict=True)]


def noisy_linear(state: State, options: Any, x: Any) -> Row:
    return [dot(row, x) for row in state["weight"]]


def temperature_of(state: State, options: Any) -> float:
    return math.exp(float(state["temperature.log_value"][0])) if options.learn_temperature else options.temperature


def cosine(state: State, options: Any, x: Any) -> Row:
    tau = temperature_of(state, options)
    return [dot(row, x) / (length(row) * length(x)) / tau for row in state["weight"]]


def perturbed_cosine(state: State, options: Any, x: Any) -> Row:
    tau, t1, t2 = temperature_of(state, options), options.theta1, options.theta2
    return [dot(row, x) / ((length(x) + t1) * (length(row) + t2)) / tau for row in state["weight"]]


def xmoe(state: State, options: Any, x: Any) -> Row:
    low = [dot(row, x) for row in state["projection"]]
    if options.normalise_input:
        low = [value / length(low) for value in low]
    tau = temperature_of(state, options)
    return [dot(low, row) / length(row) * options.embedding_norm / tau for row in state["embeddings"]]


def hyper(state: State, options: Any, x: Any) -> Row:
    hidden = [
        max(0.0, dot(row, state["embedding"]) + float(b))
        for row, b in zip(state["in_weight"], state["in_bias"], strict=True)
    ]
    out = [dot(row, hidden) + float(b) for row, b in zip(state["out_weight"], state["out_bias"], strict=True)]
    width = len(x) + 1
    rows = [out[start : start + width] for start in range(0, len(out), width)]
    return [dot(row[:-1], x) + row[-1] for row in rows]


def logit_norm(state: State, options: Any, x: Any) -> Row:
    raw = linear(state, options, x)
    mean = sum(raw) / len(raw)
    variance = sum((value - mean) ** 2 for value in raw) / len(raw)
    return [options.scale * (value - mean) / math.sqrt(variance + 1e-10) for value in raw]


def two_layer(state: State, options: Any, x: Any) -> Row:
    middle = [math.tanh(dot(row, x)) for row in state["in_weight"]]
    return [dot(row, middle) for row in state["out_weight"]]


# Selectors: (state of the selector, options, logits of one token) -> its gates, its probabilities


def spread(num_experts: int, chosen: list[int], weights: Row) -> Row:
    gates = [0.0] * num_experts
    for expert, weight in zip(chosen, weights, strict=True):
        gates[expert] += weight
    return gates


def softmax_top(state: State, options: Any, z: Row, convention: str) -> tuple[Row, Row]:
    p = softmax(z)
    k = int(state["schedule.active_k"]) if options.scheduled_k else options.k
    bias = state.get("bias", np.zeros(len(p)))
    ranked = [value + float(b) for value, b in zip(p, bias, strict=True)]
    chosen = best(ranked, k)
    weights = {
        "softmax_topk_renorm": [p[e] / sum(p[j] for j in chosen) for e in chosen],
        "softmax_topk": [p[e] for e in chosen],
        "topk_softmax": softmax([z[e] for e in chosen]),
        "double_softmax": softmax([ranked[e] for e in chosen]),
    }
    return spread(len(p), chosen, weights[convention]), p


def sigmoid_top(state: State, options: Any, z: Row, renormalise: bool) -> tuple[Row, Row]:
    s = [sigmoid(value) for value in z]
    chosen = best(s, options.k)
    total = sum(s[e] for e in chosen) if renormalise else 1.0
    return spread(len(s), chosen, [s[e] / total for e in chosen]), [value / sum(s) for value in s]


def group_limited(state: State, options: Any, z: Row) -> tuple[Row, Row]:
    s = [sigmoid(value) for value in z] if options.score == "sigmoid" else softmax(z)
    biased = [value + float(b) for value, b in zip(s, state["selection_bias_E"], strict=True)]
    width = len(s) // options.num_groups
    count = 2 if options.group_score == "top2" else 1
    group_scores = [
        sum(sorted(biased[group * width : (group + 1) * width], reverse=True)[:count])
        for group in range(options.num_groups)
    ]
    groups = best(group_scores, options.topk_groups)
    allowed = [e for e in range(len(s)) if e // width in groups]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: options.k]
    total = sum(s[e] for e in chosen) if options.renormalise else 1.0
    return spread(len(s), chosen, [options.scale * s[e] / total for e in chosen]), [value / sum(s) for value in s]


def relu(state: State, options: Any, z: Row) -> tuple[Row, Row]:
    gates = [max(0.0, value) for value in z]
    return gates, gates


def top_p(state: State, options: Any, z: Row) -> tuple[Row, Row]:
    p = softmax(z)
    chosen: list[int] = []
    for expert in best(p, len(p) if options.k_max is None else options.k_max):
        if chosen and sum(p[e] for e in chosen) >= options.p:
            break
        chosen.append(expert)
    return spread(len(p), chosen, [p[e] / sum(p[j] for j in chosen) for e in chosen]), p


def dense_softmax(state: State, options: Any, z: Row) -> tuple[Row, Row]:
    return softmax(z), softmax(z)


def dts(state: State, options: Any, z: Row) -> tuple[Row, Row]:
    tau = float(state["temperature"])
    p = softmax([value / tau for value in z])
    chosen = best(p, options.k)
    hard = options.hard_at is not None and tau <= options.hard_at + 1e-6
    total = sum(p[e] for e in chosen) if hard else 1.0
    return spread(len(p), chosen, [p[e] / total for e in chosen]), p


SCORER_ORACLES: dict[str, Callable[[State, Any, Any], Row]] = {
    "linear": linear,
    "noisy_linear": noisy_linear,
    "cosine": cosine,
    "perturbed_cosine": perturbed_cosine,
    "xmoe": xmoe,
    "hyper": hyper,
    "logit_norm": logit_norm,
    "two_layer": two_layer,
}
SELECTOR_ORACLES: dict[str, Callable[[State, Any, Row], tuple[Row, Row]]] = {
    "softmax_topk_renorm": lambda s, o, z: softmax_top(s, o, z, "softmax_topk_renorm"),
    "softmax_topk": lambda s, o, z: softmax_top(s, o, z, "softmax_topk"),
    "topk_softmax": lambda s, o, z: softmax_top(s, o, z, "topk_softmax"),
    "double_softmax": lambda s, o, z: softmax_top(s, o, z, "double_softmax"),
    "sigmoid_topk": lambda s, o, z: sigmoid_top(s, o, z, False),
    "sigmoid_topk_renorm": lambda s, o, z: sigmoid_top(s, o, z, True),
    "group_limited": group_limited,
    "relu": relu,
    "top_p": top_p,
    "dense_softmax": dense_softmax,
    "dts": dts,
}


# Routers


def part_of(state: State, name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def two_parts(
    state: State, x: np.ndarray, scorer: str, scorer_options: Any, selector: str, selector_options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Score and select each token."""
    score, select = SCORER_ORACLES[scorer], SELECTOR_ORACLES[selector]
    scorer_state, selector_state = part_of(state, "scorer"), part_of(state, "selector")
    gates, probs = [], []
    for token in x:
        g, p = select(selector_state, selector_options, score(scorer_state, scorer_options, token))
        gates.append(g)
        probs.append(p)
    return np.array(gates), np.array(probs)


def scored(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    scorer_options = SCORERS.get(config.scorer).parse(config.scorer_args)
    selector_options = SELECTORS.get(config.selector).parse(config.selector_args)
    return two_parts(state, x, config.scorer, scorer_options, config.selector, selector_options)


def named(scorer: str, selector: str, **fixed: Any) -> Oracle:
    """A router whose Config has the options of both parts; `fixed` are those that it sets itself."""

    def oracle(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        options = SimpleNamespace(**{"scheduled_k": False, **vars(config), **fixed})
        return two_parts(state, x, scorer, options, selector, options)

    return oracle


def with_any_selector(scorer: str) -> Oracle:
    """A router whose Config has the options of the scorer, and names the selector."""

    def oracle(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        selector = SELECTORS.get(config.selector)
        options = selector.parse({selector.k_option: config.k, **config.selector_args})
        return two_parts(state, x, scorer, config, config.selector, options)

    return oracle


def top_k(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return two_parts(state, x, "linear", config, config.convention, config)


def sigmoid_router(
    state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    selector = "sigmoid_topk_renorm" if config.renormalise else "sigmoid_topk"
    return two_parts(state, x, "linear", config, selector, config)


def random(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    num_experts = len(state["projection_ED"])
    gates = []
    for token in x:
        scores = [math.cos(16 * dot(row, token) / length(token)) for row in state["projection_ED"]]
        gates.append(spread(num_experts, best(scores, config.k), [1 / config.k] * config.k))
    return np.array(gates), np.full((len(x), num_experts), 1 / num_experts)


def hash_router(state: State, config: Any, x: np.ndarray, context: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The number of experts is that of the widest table entry, so every expert must occur in it."""
    num_experts = int(state["position_table_VK"].max()) + 1
    seen: dict[int, int] = {}
    gates = []
    for t in range(len(x)):
        sequence = int(context["sequence_T"][t])
        picture = context["modality_T"] is not None and context["modality_T"][t] == 1
        by_place = bool(context["token_mask_T"][t]) and (picture or config.by == "position")
        if by_place or config.by == "position":
            row = state["position_table_VK"][seen.get(sequence, 0) % 4096]
        else:
            row = state["table_VK"][int(context["token_ids_T"][t]) % len(state["table_VK"])]
        seen[sequence] = seen.get(sequence, 0) + by_place
        gates.append(spread(num_experts, [int(e) for e in row], [1 / config.k] * config.k))
    return np.array(gates), np.array(gates)


ROUTERS: dict[str, Oracle] = {
    "top_k": top_k,
    "scored": scored,
    "noisy_top_k": named("noisy_linear", "topk_softmax"),
    "sigmoid": sigmoid_router,
    "cosine": with_any_selector("cosine"),
    "perturbed_cosine": with_any_selector("perturbed_cosine"),
    "xmoe": with_any_selector("xmoe"),
    "hyper_router": with_any_selector("hyper"),
    "skywork": with_any_selector("logit_norm"),
    "deepseek_v2": named("linear", "group_limited", score="softmax", group_score="max"),
    "deepseek_v3": named("linear", "group_limited", score="sigmoid", group_score="top2"),
    "remoe": named("linear", "relu"),
    "dts": named("linear", "dts"),
    "top_p": named("linear", "top_p"),
    "dense": named("linear", "dense_softmax"),
    "random": random,
    "hash": hash_router,
}
