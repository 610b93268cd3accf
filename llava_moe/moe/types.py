"""The records that pass between routers, experts, losses and analyses.

Shapes: T tokens, D hidden width, F expert width, E experts, K slots of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Where a layer sits: its part of the model ("decoder", "vision", "projector") and its index there.
SiteKey = tuple[str, int]
# Extras with which a capacity keeps what the router chose, beside the slots that it has left filled.
CHOSEN, CHOSEN_WEIGHT = "chosen_TK", "chosen_weight_TK"


@dataclass(frozen=True)
class MlpSpec:
    """What one dense feed-forward block looks like, so that experts of the same kind can be made from it.

    Attributes:
        hidden: width D of the residual stream.
        intermediate: width F between the two projections.
        activation: a key of `llava_moe.moe.experts.ACTIVATIONS`.
        gated: whether the block is `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        bias: whether every projection has a bias.
        gate_name, up_name, down_name: child names of the dense projections; `gate_name` is None when there is no gate,
            and equals `up_name` when the two are stored as one matrix (gate rows first).
        out: width of the output where it is not D (the block of a projector); None otherwise.
    """

    hidden: int
    intermediate: int
    activation: str
    gated: bool
    bias: bool
    gate_name: str | None
    up_name: str
    down_name: str
    out: int | None = None

    @property
    def fused_gate(self) -> bool:
        return self.gated and self.gate_name == self.up_name

    @property
    def output(self) -> int:
        """Width of what the block returns."""
        return self.hidden if self.out is None else self.out

    def with_width(self, intermediate: int) -> MlpSpec:
        """The same block with another expert width."""
        return dataclasses.replace(self, intermediate=intermediate)


@dataclass(frozen=True)
class Routing:
    """The decision of one router for T tokens, as autograd tensors.

    A token has K slots. A slot that is not used (variable k, dropped, null expert) holds the index E, which no expert
    has, and weight 0; so every token-choice and expert-choice method fits.

    Attributes:
        logits_TE: float32 scores before any noise.
        probs_TE: float32 scores after the router's normalisation.
        index_TK: int64 expert of each slot, E for an empty slot.
        weight_TK: combine weight of each slot, 0 for an empty slot; negative where a method subtracts an expert.
        extras: what single losses need besides, by name; a router declares the names in `Router.extras`. A name ends
            in its shape: a tensor whose shape begins with T is per token.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[-1]

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    def load_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Number of slots each expert received, float32 of shape (E,); tokens outside `mask_T` do not count."""
        num_experts = self.num_experts
        filled_TK = (self.index_TK < num_experts).to(torch.float32)
        if mask_T is not None:
            filled_TK = filled_TK * mask_T.to(torch.float32).unsqueeze(-1)
        # One bin more than experts takes the empty slots; scatter_add does not make the host wait, bincount would.
        bins = torch.zeros(num_experts + 1, dtype=torch.float32, device=self.index_TK.device)
        bins.scatter_add_(0, self.index_TK.reshape(-1), filled_TK.reshape(-1))
        return bins[:num_experts]

    def gates_TE(self) -> Tensor:
        """The combine weights spread over the experts, (T, E); 0 for experts that a token does not use."""
        size = (self.num_tokens, self.num_experts + 1)
        spread = torch.zeros(size, dtype=torch.float32, device=self.weight_TK.device)
        spread = spread.scatter_add(1, self.index_TK, self.weight_TK.float())
        return spread[:, : self.num_experts]

    def extra(self, name: str) -> Tensor:
        """One of the extras.

        Raises:
            ValueError: the router does not provide it.
        """
        if name not in self.extras:
            raise ValueError(f"this router does not provide {name!r}; it provides {sorted(self.extras) or 'no extras'}")
        return self.extras[name]

    def before_drops(self) -> Routing:
        """What the router chose, where a capacity has emptied slots since: what balance losses are about.

        After the drops no expert has more than its capacity, whatever the router prefers.
        """
        if CHOSEN not in self.extras:
            return self
        return dataclasses.replace(self, index_TK=self.extras[CHOSEN], weight_TK=self.extras[CHOSEN_WEIGHT])

    def detach(self) -> Routing:
        return Routing(
            self.logits_TE.detach(),
            self.probs_TE.detach(),
            self.index_TK.detach(),
            self.weight_TK.detach(),
            {name: value.detach() for name, value in self.extras.items()},
        )


@dataclass(frozen=True)
class RoutingContext:
    """What a router and a balance loss may know about the T tokens besides their hidden states.

    Attributes:
        token_mask_T: bool, False for padding.
        sequence_T: int64, the row of the batch that each token belongs to.
        modality_T: int64, 0 text and 1 image, or None when the caller gave embeddings and no ids.
        token_ids_T: int64 vocabulary ids, or None likewise.
        layer: index of the layer in its part.
        part: "decoder", "vision" or "projector".
        previous: routing of the MoE layer before this one in the same forward, None for the first.
        run_experts: maps (T, D) to the outputs (T, E, D) of all experts; set by the layer for the routers that ask for
            it (`Router.needs_experts`), None otherwise.
    """

    token_mask_T: Tensor
    sequence_T: Tensor
    modality_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    layer: int = 0
    part: str = "decoder"
    previous: Routing | None = None
    run_experts: Callable[[Tensor], Tensor] | None = None

    @property
    def site(self) -> SiteKey:
        return (self.part, self.layer)

    @staticmethod
    def trivial(num_tokens: int, device: torch.device | str = "cpu") -> RoutingContext:
        """The context of one unpadded sequence, for layers that are used alone."""
        return RoutingContext(
            token_mask_T=torch.ones(num_tokens, dtype=torch.bool, device=device),
            sequence_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        )
