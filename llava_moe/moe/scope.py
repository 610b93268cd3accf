"""Carries the routing context into the layers and the routings out of them.

The context is stored on an object that every layer holds, not in a context variable: under non-reentrant activation
checkpointing the layers run again inside backward, long after the forward call has returned, and a context variable
would be gone by then - with a wrong gradient and no error. Only the recording is switched on and off, so the second run
records nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from llava_moe.moe.types import Routing, RoutingContext


class RoutingScope:
    """Shared by all MoE layers of a model; it holds no parameters and is not saved."""

    def __init__(self) -> None:
        self._context: RoutingContext | None = None
        self._recorded: dict[int, Routing] | None = None

    def set_context(self, context: RoutingContext) -> None:
        """Describes the tokens of the coming forward; stays valid until the next call."""
        self._context = context

    def context(self, layer: int, num_tokens: int, device: torch.device) -> RoutingContext:
        """The context for one layer.

        Raises:
            ValueError: the context describes another number of tokens than the layer was given.
        """
        if self._context is None:
            return replace(RoutingContext.trivial(num_tokens, device), layer=layer)
        if self._context.token_mask_T.shape[0] != num_tokens:
            raise ValueError(
                f"layer {layer} was given {num_tokens} tokens, but the routing context describes "
                f"{self._context.token_mask_T.shape[0]}; call set_context with this batch first"
            )
        return replace(self._context, layer=layer)

    def record(self, layer: int, routing: Routing) -> None:
        if self._recorded is not None:
            self._recorded[layer] = routing

    @contextmanager
    def recording(self) -> Iterator[dict[int, Routing]]:
        """Within it, the routing of each layer is put into the yielded dict under the layer's index."""
        recorded: dict[int, Routing] = {}
        previous, self._recorded = self._recorded, recorded
        try:
            yield recorded
        finally:
            self._recorded = previous
