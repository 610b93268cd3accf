"""The order in which the sorted kernels work: slots by expert. Shapes: T tokens, E experts, K slots, S = T x K."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """All slots sorted by expert, the empty ones last. S counts the empty ones too: how many slots are filled is known
    to the device only.

    Attributes:
        slot_S: int64, which slot (t * K + k) stands at each place.
        token_S: int64, its token t.
        place_TK: int64, the place of each slot.
        ends_E: int32, the place behind the last slot of each expert; `ends_E[-1]` slots are filled.
    """

    slot_S: Tensor
    token_S: Tensor
    place_TK: Tensor
    ends_E: Tensor

    def loads(self) -> tuple[list[int], list[int]]:
        """The experts that have slots, and how many. On a GPU the host waits for it."""
        ends = self.ends_E.tolist()
        counts = [hi - lo for lo, hi in zip([0, *ends[:-1]], ends, strict=True)]
        return [e for e, count in enumerate(counts) if count], [count for count in counts if count]


def sort_slots(index_TK: Tensor, num_experts: int) -> Slots:
    """Sorts without a host synchronisation and without atomic additions."""
    num_slots = index_TK.shape[1]
    # Narrow keys: a radix sort makes one pass for each byte.
    key_S = index_TK.reshape(-1).to(torch.int16 if num_experts < 2**15 else torch.int32)
    expert_S, slot_S = key_S.sort(stable=True)
    experts_E = torch.arange(num_experts, dtype=expert_S.dtype, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, experts_E, right=True, out_int32=True)
    places_S = torch.arange(slot_S.numel(), device=slot_S.device)
    place_TK = torch.empty_like(slot_S).scatter_(0, slot_S, places_S).view_as(index_TK)
    return Slots(slot_S, slot_S // num_slots, place_TK, ends_E)
