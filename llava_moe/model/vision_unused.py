"""Which parameters of a tower the selected features do not depend on: they would never get a gradient.

A trainable parameter without a gradient makes DDP wait or fail. What is left over differs from tower to tower (layers
and norms behind the features, DINOv2's mask token, the head norm of a ConvNet), so it is read off the autograd graph
of a hollow copy of the tower instead of a list of names.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel


def unused_parameters(vision_config: Any, feature_layer: int | list[int]) -> frozenset[str]:
    """Names inside the tower of the parameters that the features do not depend on.

    Nothing is computed and no memory is taken: the tower is built anew from its config, on the meta device. Experts do
    not exist in that copy and are never named; they may not sit behind the features anyway.

    Args:
        vision_config: of a tower with `image_size`.
        feature_layer: index into `hidden_states`, or several.
    """
    selected = (feature_layer,) if isinstance(feature_layer, int) else tuple(feature_layer)
    # by way of its values: the attention kernel that was chosen for the real tower may not run on the meta device
    kind: Any = type(vision_config)
    return _unused(kind, json.dumps(vision_config.to_dict(), default=str), selected)


@lru_cache(maxsize=16)  # a large tower takes seconds, and nothing but the config counts
def _unused(kind: Any, values: str, selected: tuple[int, ...]) -> frozenset[str]:
    config = kind.from_dict(json.loads(values))
    size = int(config.image_size)
    with torch.device("meta"), torch.enable_grad():
        tower = AutoModel.from_config(config).eval()
        states = tower(torch.zeros(1, 3, size, size), output_hidden_states=True).hidden_states
    reached = _leaves([states[layer] for layer in selected])
    return frozenset(name for name, parameter in tower.named_parameters() if id(parameter) not in reached)


def _leaves(outputs: list[Tensor]) -> set[int]:
    """The ids of the parameters that outputs depend on."""
    found: set[int] = set()
    seen: set[Any] = set()  # holds the nodes, so that no id is given twice
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found
