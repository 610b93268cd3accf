"""Decoders that transformers builds with experts of their own: their routing, in our records.

A hook on each gate turns what it returns (logits, weights, indices) into a `Routing` of the model's scope. So balance
losses, telemetry and controllers work on Mixtral or DeepSeek-V3 as they do on our own layers, while the decoder's code
and the names of its tensors stay as they are. The balance loss that transformers has for these decoders is computed in
their `...ForCausalLM` classes, which a LLaVA model does not contain: nothing is counted twice.

Under activation checkpointing a gate runs again inside backward, and so does its hook. The scope records the first run
only, and the second builds the same graph that the first one did, which non-reentrant checkpointing asks for.

Shapes: T tokens, D hidden width, E experts, K slots of a token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe import MoELayer, Router, Routing, RoutingContext, RoutingScope, SiteKey
from llava_moe.moe.component import Float32Buffers
from llava_moe.moe.controllers.loss_free_bias import KNOB

# How the gates of a family, by the decoder's model_type, make scores of logits; tests/model/test_native.py tries each.
_SCORES: dict[str, tuple[str, ...]] = {
    "softmax": (
        "aria_text", "cohere2_moe", "deepseek_v2", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe",
        "granitemoeshared", "hunyuan_v1_moe", "mellum", "minimax", "mistral4", "mixtral", "olmoe", "qwen2_moe",
        "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text",
    ),
    "sigmoid": (
        "afmoe", "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "hy_v4",
        "kolibri1", "laguna", "mimo_v2_flash", "minimax_m2", "solar_open",
    ),
}  # fmt: skip
NATIVE_FAMILIES: dict[str, str] = {family: score for score, families in _SCORES.items() for family in families}
_BIAS = "e_score_correction_bias"  # transformers' name of what DeepSeek-V3 adds to the scores for the selection alone
_UNNORMALISED = ("deepseek_v2",)  # weights that do not sum to 1 although the gate has no key that says so
_GATES = ("gate", "router")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class NativeRouter(Router):
    """A stock gate under the contract of our routers; it holds the gate and no parameter of its own.

    Args:
        gate: returns (logits, weights, indices) of shapes (T, E), (T, K), (T, K).
        hidden: D.
        family: a key of `NATIVE_FAMILIES`: the gate's score is "softmax", or "sigmoid", whose scores are divided by
            their sum in `Routing.probs_TE`.

    Raises:
        ValueError: the gate does not say how many experts it knows.
    """

    def __init__(self, gate: nn.Module, hidden: int, family: str) -> None:
        numbers = {key: getattr(gate, key, None) for key in ("num_experts", "top_k")}
        if not all(isinstance(number, int) for number in numbers.values()):
            raise ValueError(f"{type(gate).__name__} is no gate that this program can read: it says {numbers}")
        super().__init__(hidden, int(numbers["num_experts"] or 0), Router.Config())
        self.gate = gate
        self.k = int(numbers["top_k"] or 0)
        self.score = NATIVE_FAMILIES[family]
        renormalised = getattr(gate, "norm_topk_prob", family not in _UNNORMALISED)
        self.normalised = bool(renormalised) and getattr(gate, "routed_scaling_factor", 1) == 1

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the gate's matrix as transformers does; the bias starts at 0."""
        with torch.no_grad():
            for parameter in self.gate.parameters():
                parameter.normal_(std=0.02, generator=generator)
            for buffer in self.gate.buffers():
                buffer.zero_()

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        return self.read(self.gate.forward(x_TD))  # past the hook: nothing is recorded

    def read(self, output: tuple[Tensor, Tensor, Tensor]) -> Routing:
        """The record of what the gate returned, in float32."""
        logits_TE, weight_TK, index_TK = output
        logits_TE = logits_TE.float()
        # softmax(log s) = s / sum(s), also where every s underflows to 0.
        scores_TE = F.logsigmoid(logits_TE) if self.score == "sigmoid" else logits_TE
        return Routing(logits_TE, scores_TE.softmax(dim=-1), index_TK, weight_TK.float())

    @property
    def active_experts(self) -> float:
        return self.k

    def get_buffer(self, target: str) -> Tensor:
        """As of any module; the gate's selection bias also answers to the name that our controllers turn.

        Raises:
            AttributeError: there is no such buffer.
        """
        return self.gate.get_buffer(_BIAS) if target == KNOB else super().get_buffer(target)


class NativeLayer(nn.Module):
    """What controllers, losses and reports ask a layer for; it lies beside the model and not in it."""

    def __init__(self, router: NativeRouter, experts: nn.Module, site: SiteKey) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.site = site
        self.shared: None = None  # the stock block adds its shared experts itself
        self.capacity: None = None

    def idle_parameters(self) -> float:
        """Parameters of the routed experts that a token does not touch."""
        own = sum(parameter.numel() for parameter in self.experts.parameters())
        return own * (1 - self.router.active_experts / self.router.num_experts)


class _Recorder:
    """The hook of one gate. An object and not a closure, so that a copy of the model records into its own scope."""

    def __init__(self, router: NativeRouter, site: SiteKey, scope: RoutingScope) -> None:
        self.router = router
        self.site = site
        self.scope = scope

    def __call__(self, gate: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        routing = self.router.read(output)
        shape = (routing.num_tokens, self.router.hidden)
        context = self.scope.context(self.site, shape, routing.logits_TE.device)
        self.scope.record(self.site, routing, context)


def watch_native(decoder: Any, scope: RoutingScope) -> dict[SiteKey, NativeLayer]:
    """Records the routing of a decoder that has experts of its own.

    Called inside the model's `__init__`, once.

    Args:
        decoder: a transformers decoder; layers whose block is already one of ours are left alone.
        scope: the model's.

    Returns:
        The layers by site; none for a dense decoder, and for one whose family is not in `NATIVE_FAMILIES`: it runs as
        it is, and a recipe that asks to balance it is refused.
    """
    family = decoder.config.model_type
    layers: dict[SiteKey, NativeLayer] = {}
    for index, gate, experts in _blocks(decoder) if family in NATIVE_FAMILIES else ():
        router = NativeRouter(gate, decoder.config.hidden_size, family)
        site = ("decoder", index)
        layers[site] = NativeLayer(router, experts, site)
        if isinstance(gate._buffers.get(_BIAS), Tensor):
            stock: Any = type(gate)
            gate.__class__ = _with_float32_bias(stock)
        gate.register_forward_hook(_Recorder(router, site, scope))
    return layers


@functools.cache
def _with_float32_bias(gate: Any) -> type[nn.Module]:
    """The same class, whose bias stays float32 when the model is cast: a move of 1e-3 would be lost in bfloat16.

    transformers sees to that while it loads a checkpoint; DeepSpeed and `model.to(...)` cast what is there.
    """
    return type(gate.__name__, (Float32Buffers, gate), {"float32_buffers": (_BIAS,), "__module__": gate.__module__})


def _blocks(decoder: nn.Module) -> Iterator[tuple[int, nn.Module, nn.Module]]:
    """(layer, gate, experts) of every stock MoE block."""
    for path, module in decoder.named_modules():
        experts = getattr(module, "experts", None)
        gate = next((child for name in _GATES if isinstance(child := getattr(module, name, None), nn.Module)), None)
        layer = _LAYER.search(f"{path}.")
        if isinstance(module, MoELayer) or not isinstance(experts, nn.Module) or gate is None or layer is None:
            continue
        yield int(layer[1]), gate, experts
