"""The records that pass between routers, experts, losses and analyses.

Shapes: T tokens, D hidden width, F expert width, E experts, K slots of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    hidden: int
    intermediate: int
    activation: str
    gated: bool
    bias: bool
    gate_name: str | None
    up_name: str
    down_name: str

    @property
    def fused_gate(self) -> bool:
        return self.gated and self.gate_name == self.up_name


@dataclass(frozen=True)
class Routing:
    """The decision of one router for T tokens, as autograd tensors.

    A token has K slots. A slot that is not used (variable k, dropped, null expert) holds the index E, which no expert
    has, and weight 0; so every token-choice and expert-choice method fits.

    Attributes:
        logits_TE: float32 scores before any noise.
        probs_TE: float32 scores after the router's normalisation.
        index_TK: int64 expert of each slot, E for an empty slot.
        weight_TK: combine weight of each slot, 0 for an empty slot.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[-1]

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

    def detach(self) -> Routing:
        return Routing(*(t.detach() for t in (self.logits_TE, self.probs_TE, self.index_TK, self.weight_TK)))


@dataclass(frozen=True)
class RoutingContext:
    """What a router and a balance loss may know about the T tokens besides their hidden states.

    Attributes:
        token_mask_T: bool, False for padding.
        modality_T: int64, 0 text and 1 image, or None when the caller gave embeddings and no ids.
        token_ids_T: int64 vocabulary ids, or None likewise.
        sequence_T: int64, the row of the batch that each token belongs to.
        layer: index of the decoder layer.
    """

    token_mask_T: Tensor
    sequence_T: Tensor
    modality_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    layer: int = 0

    @staticmethod
    def trivial(num_tokens: int, device: torch.device | str = "cpu") -> RoutingContext:
        """The context of one unpadded sequence, for layers that are used alone."""
        return RoutingContext(
            token_mask_T=torch.ones(num_tokens, dtype=torch.bool, device=device),
            sequence_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        )
