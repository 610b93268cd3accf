"""Routing by modality: image tokens and text tokens have experts of their own, or routers of their own.

    mode: experts    the first `image_experts` experts serve image tokens, the others text tokens
    mode: routers    both may use all experts, but by scores of their own

The idea of modality-aware experts (MoMa 2407.21770, VLMo 2111.02358) over any router of this package. Each token is
scored by both routers and keeps the answer of its own: which tokens are images need not be known on the host. The
router of the other modality sees the token as padding. Shapes: T tokens, D hidden width, E experts, K slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llava_moe.moe.routers.base import Router
from llava_moe.moe.types import MlpSpec, Routing, RoutingContext
from llava_moe.registry import near_misses

MODES, _MAIN = ("experts", "routers"), ("logits_TE", "probs_TE", "index_TK", "weight_TK")
CLOSED = -1e9  # logit of an expert of the other modality; finite, so that 0 * logit stays 0 in entropies


class ModalityRouter(Router):
    """Two inner routers of one kind, `image` and `text`; its flags are theirs.

    In evaluation a missing modality means text, as in a step of generation; in training it is an error.
    """

    needs: ClassVar[tuple[str, ...]] = ("modality_T",)

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            mode: one of `MODES`.
            image_experts: with `mode: experts`, how many experts serve images; null takes half of them.
            router: a name of `ROUTERS` with its options in `router_args`; its extras must be per token.
        """

        mode: str = "routers"
        image_experts: int | None = None
        router: str = "top_k"
        router_args: dict[str, Any] = dataclasses.field(default_factory=dict)

    config: ModalityRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: ModalityRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        if config.mode not in MODES:
            raise ValueError(f"modality router: unknown mode {config.mode!r}; {near_misses(config.mode, list(MODES))}")
        num_image, self.text_start = num_experts, 0
        if config.mode == "experts":
            num_image = num_experts // 2 if config.image_experts is None else config.image_experts
            if not 0 < num_image < num_experts:
                raise ValueError(f"modality router: image_experts={num_image} must leave some of {num_experts} to each")
            self.text_start = num_image
        elif config.image_experts is not None:
            raise ValueError(f"modality router: image_experts={config.image_experts} has no meaning with mode: routers")
        from llava_moe.moe.routers import ROUTERS  # the registry names this module too

        kind = ROUTERS.get(config.router)
        self.image = kind.build(hidden, num_image, config.router_args)
        self.text = kind.build(hidden, num_experts - self.text_start, config.router_args)
        inner, shapes = self.text, {extra.rsplit("_", 1)[-1] for extra in self.text.extras}
        if isinstance(inner, ModalityRouter) or inner.needs_previous or inner.needs_experts or shapes - {"T", "TE"}:
            raise ValueError(f"modality router: router={config.router!r} cannot be split by modality")
        for flag in ("token_choice", "causal_safe", "normalised", "stochastic", "signed", "learned", "extras"):
            setattr(self, flag, getattr(inner, flag))
        self.needs = tuple(dict.fromkeys((*type(self).needs, *inner.needs)))  # type: ignore[misc]  # on the instance

    @property
    def active_experts(self) -> float:
        return max(self.image.active_experts, self.text.active_experts)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.image.reset_parameters(generator)
        self.text.reset_parameters(generator)

    def side_branch(self, spec: MlpSpec) -> nn.Module | None:
        if self.text.side_branch(spec) is not None:
            raise ValueError(f"modality router: router={self.config.router!r} has a side branch and cannot be split")
        return None

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        modality_T = context.modality_T
        if modality_T is None:
            if self.training:
                raise ValueError("modality router: needs context.modality_T; give the model input_ids")
            modality_T = torch.zeros_like(context.sequence_T)
        is_image_T = modality_T == 1
        image = self._fit(self.image, 0, x_TD, context, is_image_T)
        text = self._fit(self.text, self.text_start, x_TD, context, ~is_image_T)
        num_slots = max(image["index_TK"].shape[1], text["index_TK"].shape[1])
        for found in (image, text):
            for name, fill in (("index_TK", self.num_experts), ("weight_TK", 0.0)):
                found[name] = pad(found[name], (0, num_slots - found[name].shape[1]), value=fill)
        whose = (is_image_T, is_image_T.unsqueeze(-1))
        merged = {name: torch.where(whose[one.ndim - 1], one, text[name]) for name, one in image.items()}
        logits_TE, probs_TE, index_TK, weight_TK = (merged.pop(n) for n in _MAIN)
        return Routing(logits_TE, probs_TE, index_TK, weight_TK, merged)

    def _fit(self, inner: Router, base: int, x_TD: Tensor, context: RoutingContext, own_T: Tensor) -> dict[str, Tensor]:
        """The routing of one inner router, its experts put at their places among all E, by field name."""
        routing = inner(x_TD, dataclasses.replace(context, token_mask_T=context.token_mask_T & own_T))
        room = (base, self.num_experts - base - inner.num_experts)
        found = {
            "logits_TE": pad(routing.logits_TE, room, value=CLOSED),
            "probs_TE": pad(routing.probs_TE, room),
            "index_TK": (routing.index_TK + base).masked_fill(routing.index_TK == inner.num_experts, self.num_experts),
            "weight_TK": routing.weight_TK,
        }
        return found | {n: pad(t, room) if n.endswith("_TE") else t for n, t in routing.extras.items()}
