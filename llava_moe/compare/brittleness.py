"""What a model loses without the top expert of every token: whether its experts differ, and whether routing matters.

Where copies of one expert answer alike, losing the best costs nothing. In every layer with experts the slot of the
largest weight (by size, where weights may be negative) is emptied; the token's other slots take over, and are scaled so
that the sizes of the weights sum to what they did. A token with a single slot gets the best other expert by the
router's probabilities instead, with the weight of the lost one. Experts that see every token stay.

Shapes: T tokens, E experts, K slots of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from llava_moe.moe import MoELayer, Routing

_TINY = 1e-20  # of the weights that are left; less is none at all


def without_top(routing: Routing) -> Routing:
    """The routing with each token's top expert taken out; a token without any expert stays as it is."""
    index_TK, weight_TK = routing.index_TK, routing.weight_TK
    num_experts = routing.num_experts
    filled_TK = index_TK < num_experts
    size_TK = weight_TK.abs().masked_fill(~filled_TK, -1.0)
    top_T1 = size_TK.argmax(dim=1, keepdim=True)
    lost_T1 = index_TK.gather(1, top_T1)
    # an expert may have several slots of a token; all of them are lost
    kept_TK = filled_TK & (index_TK != lost_T1)
    total_T1 = (weight_TK.abs() * filled_TK).sum(dim=1, keepdim=True)
    left_T1 = (weight_TK.abs() * kept_TK).sum(dim=1, keepdim=True)
    taken_over_T1 = left_T1 > _TINY
    scaled_TK = torch.where(kept_TK, weight_TK * (total_T1 / left_T1.clamp_min(_TINY)), torch.zeros_like(weight_TK))
    emptied_TK = torch.where(kept_TK, index_TK, torch.full_like(index_TK, num_experts))

    # nobody is left: the best other expert moves into the slot that was lost, with its weight
    probs_TE = routing.probs_TE.float()
    spare_TE = torch.nn.functional.pad(probs_TE, (0, 1)).scatter(1, lost_T1, float("-inf"))[:, :num_experts]
    second_T1 = spare_TE.argmax(dim=1, keepdim=True)
    is_top_TK = torch.zeros_like(filled_TK).scatter(1, top_T1, True)
    alone_TK = torch.where(is_top_TK, second_T1, torch.full_like(index_TK, num_experts))
    weight_alone_TK = torch.where(is_top_TK, weight_TK, torch.zeros_like(weight_TK))

    new_index_TK = torch.where(taken_over_T1, emptied_TK, alone_TK)
    new_weight_TK = torch.where(taken_over_T1, scaled_TK, weight_alone_TK)
    routed_T1 = filled_TK.any(dim=1, keepdim=True)
    return dataclasses.replace(
        routing,
        index_TK=torch.where(routed_T1, new_index_TK, index_TK),
        weight_TK=torch.where(routed_T1, new_weight_TK, weight_TK),
    )


@contextmanager
def top_expert_dropped(on_first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within it every model of this process answers without the top expert of each token.

    Args:
        on_first: called when a layer loses its top experts for the first time; never where no layer assigns tokens
            to experts (dense models, Soft MoE), whose answers are those of the whole model.

    Raises:
        ValueError: a layer has one expert, so that no other could take over.
    """
    routers, begun = set[int](), False

    def enter(module: nn.Module, args: Any) -> None:
        if isinstance(module, MoELayer):
            if module.experts.num_experts < 2:
                raise ValueError(f"layer {module.site}: has a single expert, and no other could take over")
            routers.add(id(module.router))  # not any router: some hold others inside

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal begun
        if id(module) not in routers or not isinstance(output, Routing):
            return None
        if not begun:
            begun = True
            on_first()
        return without_top(output)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(replace)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
