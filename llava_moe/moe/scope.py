"""Carries the routing context into the layers and the routings out of them.

The context is stored on an object that every layer holds, not in a context variable: under non-reentrant activation
checkpointing the layers run again inside backward, long after the forward call has returned, and a context variable
would be gone by then - with a wrong gradient and no error. Only the recording is switched on and off, so the second run
records nothing twice. For the same reason the latest routing of a layer outlives the forward where routers read the
previous layer's: they must find the same one when they run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from llava_moe.moe.types import Routing, RoutingContext, SiteKey


class RoutingScope:
    """Shared by all MoE layers of a model; it holds no parameters, is not saved and not copied."""

    def __init__(self) -> None:
        self._contexts: dict[str, RoutingContext] = {}
        self._latest: dict[SiteKey, Routing] = {}
        self._seen: dict[SiteKey, RoutingContext] = {}
        self._recorded: dict[SiteKey, Routing] | None = None

    def set_context(self, context: RoutingContext) -> None:
        """Describes the tokens of the coming forward for the layers of one part; valid until the next call."""
        self._contexts[context.part] = context

    def context(self, site: SiteKey, shape: torch.Size | tuple[int, ...], device: torch.device) -> RoutingContext:
        """The context of one layer whose hidden states have this shape, (..., D).

        Where none was set, every row of the leading dimension is an unpadded sequence of its own.

        Raises:
            ValueError: the context describes another number of tokens than the layer was given.
        """
        part, layer = site
        num_tokens = shape[:-1].numel() if isinstance(shape, torch.Size) else torch.Size(shape[:-1]).numel()
        known = self._contexts.get(part)
        if known is None:
            known = _unpadded(shape, num_tokens, device)
        elif known.token_mask_T.shape[0] != num_tokens:
            raise ValueError(
                f"layer {layer} was given {num_tokens} tokens, but the routing context describes "
                f"{known.token_mask_T.shape[0]}; call set_context with this batch first"
            )
        return replace(known, layer=layer, part=part, previous=self._previous(site))

    def _previous(self, site: SiteKey) -> Routing | None:
        below = [layer for part, layer in self._latest if part == site[0] and layer < site[1]]
        return self._latest[(site[0], max(below))] if below else None

    def record(self, site: SiteKey, routing: Routing, context: RoutingContext, keep: bool = False) -> None:
        """Takes a layer's routing; `keep` is for routers that read the previous layer's, and only for them: a kept
        routing keeps the graph of its batch alive until the next forward."""
        if keep:
            self._latest[site] = routing
        self._seen[site] = replace(context, previous=None, run_experts=None)
        if self._recorded is not None:
            self._recorded[site] = routing

    def context_of(self, site: SiteKey) -> RoutingContext:
        """The context that the layer at this site was last given; what a balance loss needs after the forward."""
        return self._seen[site]

    @contextmanager
    def recording(self) -> Iterator[dict[SiteKey, Routing]]:
        """Within it, the routing of each layer is put into the yielded dict under the layer's site."""
        recorded: dict[SiteKey, Routing] = {}
        previous, self._recorded = self._recorded, recorded
        try:
            yield recorded
        finally:
            self._recorded = previous

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingScope:
        """A copy of the model gets a scope of its own, without the tensors of the last forward."""
        memo[id(self)] = fresh = RoutingScope()
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        return {"_contexts": {}, "_latest": {}, "_seen": {}, "_recorded": None}


def _unpadded(shape: tuple[int, ...], num_tokens: int, device: torch.device) -> RoutingContext:
    rows = shape[0] if len(shape) > 2 else 1
    trivial = RoutingContext.trivial(num_tokens, device)
    if rows <= 1:
        return trivial
    sequence_T = torch.arange(rows, device=device).repeat_interleave(num_tokens // rows)
    return replace(trivial, sequence_T=sequence_T)
