"""Soft MoE (Puigcerver et al., 2308.00951): tokens are mixed into slots, experts process slots, slots are mixed back.

    z = scale * x^ phi^        x^, phi^: x and phi with length 1 along D        (S, M), M = E P slots
    slot input   sum_t D_tm x_t      D = softmax of z over the tokens of a sequence
    output       sum_m C_tm y_m      C = softmax of z over all slots             slot m belongs to expert m // P

No token is assigned, so there is no `Routing`, nothing to balance and nothing to drop: it is a layer kind and no
router. Every slot sees the whole sequence, later tokens too, so it fits a vision tower or a projector and no causal
decoder. The rows of the input are the sequences: pictures are never mixed, and padding enters no slot.
Shapes: B sequences, S tokens of each, D hidden width, O output width, E experts, P slots of an expert, M = E x P.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.component import Component
from llava_moe.moe.experts import EXPERTS, Experts
from llava_moe.moe.experts.shared import SharedExperts
from llava_moe.moe.scope import RoutingScope
from llava_moe.moe.types import MlpSpec

if TYPE_CHECKING:
    from llava_moe.moe.build import LayerPlan


class SoftMixing(nn.Module, Component):
    """The learned half: who is mixed with whom. Parameters phi (E, P, D) and scale (1)."""

    kind: ClassVar[str] = "router"

    @dataclasses.dataclass(frozen=True)
    class Config(Component.Config):
        """Options.

        Attributes:
            slots: P, slots of an expert. The cost is that of E P tokens for each sequence, whatever its length.
        """

        slots: int = 1

    def __init__(self, hidden: int, num_experts: int, config: SoftMixing.Config) -> None:
        super().__init__()
        if config.slots < 1:
            raise ValueError(f"soft_moe: slots={config.slots} must be at least 1")
        self.config = config
        self.phi = nn.Parameter(torch.empty(num_experts, config.slots, hidden))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.phi, std=self.phi.shape[-1] ** -0.5, generator=generator)
        nn.init.ones_(self.scale)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """D and C, both float32 (B, S, M). A sequence of padding alone gives D = 0."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BSM = self.scale.float() * (_unit(x_BSD) @ _unit(self.phi.flatten(0, 1)).t())
            hidden = ~mask_BS.unsqueeze(-1)
            lowest = torch.finfo(torch.float32).min  # finite: a whole column of -inf would be NaN
            dispatch_BSM = logits_BSM.masked_fill(hidden, lowest).softmax(dim=1).masked_fill(hidden, 0.0)
            return dispatch_BSM, logits_BSM.softmax(dim=2)


def _unit(x: Tensor) -> Tensor:
    """Length 1 along the last dimension, in float32."""
    x = x.float()
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


class SoftMoELayer(nn.Module):
    """Takes the place of a dense feed-forward block, as `MoELayer` does, but records no routing (2308.00951).

    Args:
        plan: what it is made of: any kind of experts, each given its P slots of every sequence; `router_args` are the
            options of `SoftMixing`.
        spec: the dense block.
        layer, part, scope: as in `MoELayer`.

    Raises:
        ValueError: an option is unknown or refused, or the plan has a capacity.
    """

    Config = SoftMixing.Config
    causal_safe = False

    def __init__(
        self, plan: LayerPlan, spec: MlpSpec, layer: int = 0, part: str = "vision", scope: RoutingScope | None = None
    ) -> None:
        super().__init__()
        if plan.capacity is not None:
            raise ValueError("soft_moe: assigns no tokens, so a capacity has no meaning; remove it")
        self.experts: Experts = EXPERTS.get(plan.experts).build(spec, plan.num_experts, plan.experts_args)
        # Under the name that a router has elsewhere: learning rates and checkpoints go by it.
        self.router = SoftMixing(spec.hidden, self.experts.num_experts, SoftMixing.parse(plan.router_args))
        self.shared = None if plan.shared is None else SharedExperts.build(spec, plan.shared)
        self.site = (part, layer)
        self.scope = scope if scope is not None else RoutingScope()

    @property
    def layer(self) -> int:
        return self.site[1]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (B, ..., D) to (B, ..., O), every row a sequence; or (T, D) to (T, O), sequences as in the context."""
        context = self.scope.context(self.site, hidden_states.shape, hidden_states.device)
        x_TD, mask_T = hidden_states.reshape(-1, hidden_states.shape[-1]), context.token_mask_T
        if hidden_states.ndim > 2:
            x_BSD = hidden_states.flatten(1, -2)
            y_TO = self._mixed(x_BSD, mask_T.reshape(x_BSD.shape[:2])).flatten(0, 1)
        else:
            place_T, shape = _layout(context.sequence_T)
            x_BSD = x_TD.new_zeros(shape.numel(), x_TD.shape[-1]).index_copy(0, place_T, x_TD).unflatten(0, shape)
            mask_BS = mask_T.new_zeros(shape.numel()).index_copy(0, place_T, mask_T).unflatten(0, shape)
            y_TO = self._mixed(x_BSD, mask_BS).flatten(0, 1)[place_T]
        if self.shared is not None:
            y_TO = self.shared(x_TD, y_TO)
        return y_TO.reshape(*hidden_states.shape[:-1], y_TO.shape[-1])

    def _mixed(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """(B, S, D) to (B, S, O)."""
        dispatch_BSM, combine_BSM = self.router(x_BSD, mask_BS)
        slots_BMD = dispatch_BSM.transpose(1, 2).to(x_BSD.dtype) @ x_BSD
        # Not the shape of phi, which is empty outside of its own module's forward under ZeRO-3.
        num_rows, num_experts, num_slots = x_BSD.shape[0], self.experts.num_experts, self.router.config.slots
        expert_M = torch.arange(num_experts, device=x_BSD.device).repeat_interleave(num_slots)
        index = expert_M.repeat(num_rows).unsqueeze(-1)
        out = self.experts(slots_BMD.flatten(0, 1), index, torch.ones_like(index, dtype=torch.float32))
        out_BMO = out.unflatten(0, (num_rows, num_experts * num_slots))
        return (combine_BSM.to(out_BMO.dtype) @ out_BMO).to(x_BSD.dtype)


def _layout(sequence_T: Tensor) -> tuple[Tensor, torch.Size]:
    """Where each token goes in a (B, S) table of the sequences, flattened; and its shape.

    The host must know how many sequences there are and how long the longest is, so it waits for them.
    """
    _, row_T, length_B = sequence_T.unique(return_inverse=True, return_counts=True)
    longest = int(length_B.max()) if length_B.numel() else 0
    order_T = row_T.argsort(stable=True)
    start_B = length_B.cumsum(0) - length_B
    in_row_T = torch.arange(row_T.numel(), device=row_T.device) - start_B[row_T[order_T]]
    place_T = torch.empty_like(row_T).scatter_(0, order_T, in_row_T) + row_T * longest
    return place_T, torch.Size((length_B.numel(), longest))
