"""The contract of a grower: the tensors of a small trained decoder in, those of a larger one out (2408.06567).

Width follows a map g from the places of each axis of the target to those of the source, and n(g), how often it is hit:
    an axis that a matrix makes         W'[i, .] = W[g(i), .]
    an axis that it sums over           W'[., j] = W[., g(j)] / n(g(j))
so each new place is a copy, and sums over copies come out the same. g(i) = i mod size. Heads count as places; with
grouped queries, g maps key-value heads to key-value heads and the query heads of each group to those of its source.
Embeddings, biases and the gains of RMSNorm are copied. A tied head sums over the copies of the hidden width without
being divided, so the gain of the last norm is divided in its place.
Depth follows a map from target layers to source layers.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from llava_moe.moe.component import Component
from llava_moe.moe.growth.shape import LLAMA_NAMES, Axis, DecoderNames, DecoderShape, Entry, size_keys

Read = Callable[[str], Tensor]
WIDTHS = ("hidden", "intermediate", "kv_heads", "group")
KEPT = ("head_dim", "vocabulary", "tied_head", "gated", "qkv_bias", "out_bias", "mlp_bias", "qk_norm")


class Contract(Enum):
    """What the grown decoder promises."""

    EXACT = "exact"  # the logits of the source, to 1e-5 in float32
    NONE = "none"


@dataclasses.dataclass(frozen=True)
class Places:
    """How one axis grows: for each place of the target its source, how often that is used, and whether it is new."""

    source: Tensor
    count: Tensor
    new: Tensor

    @staticmethod
    def modulo(target: int, source: int) -> Places:
        """g(i) = i mod source."""
        places = torch.arange(target)
        return Places.of(places % source, places >= source)

    @staticmethod
    def of(source: Tensor, new: Tensor) -> Places:
        """Counts the copies."""
        return Places(source, torch.bincount(source)[source], new)

    @property
    def trivial(self) -> bool:
        return not bool(self.new.any())


def head_places(target: DecoderShape, source: DecoderShape) -> tuple[Places, Places]:
    """The axes of the queries and of the keys and values, a head at a time.

    Query heads are stored group by group: head h belongs to the key-value head h // group.
    """
    groups = Places.modulo(target.kv_heads, source.kv_heads)
    inside = Places.modulo(target.group, source.group)
    heads = (groups.source[:, None] * source.group + inside.source[None, :]).flatten()
    new = (groups.new[:, None] | inside.new[None, :]).flatten()

    def widen(heads: Tensor, new: Tensor) -> Places:
        offsets = torch.arange(source.head_dim)
        places = (heads[:, None] * source.head_dim + offsets[None, :]).flatten()
        return Places.of(places, new.repeat_interleave(source.head_dim))

    return widen(heads, new), widen(groups.source, groups.new)


class Grower(Component, ABC):
    """Makes each tensor of the target from few tensors of the source, so that a program can stream them.

    Args:
        config: its options.
        source, target: the two decoders.
        names: the tensor names of both.

    Attributes:
        contract: what it promises for these two.

    Raises:
        ValueError: the target is smaller somewhere, or differs in something that does not grow.
    """

    kind: ClassVar[str] = "grower"

    def __init__(
        self, config: Any, source: DecoderShape, target: DecoderShape, names: DecoderNames = LLAMA_NAMES
    ) -> None:
        where = f"grower {type(self).__name__}"
        for key in KEPT:
            if getattr(source, key) != getattr(target, key):
                raise ValueError(f"{where}: {key}={getattr(target, key)} must stay {getattr(source, key)}")
        for key in (*WIDTHS, "layers"):
            if getattr(target, key) < getattr(source, key):
                label = "heads / kv_heads" if key == "group" else key
                raise ValueError(f"{where}: {label}={getattr(target, key)} must be at least {getattr(source, key)}")
        self.config = config
        self.source = source
        self.target = target
        self.contract = Contract.EXACT if self.exact(source, target) else Contract.NONE
        self._names = names
        self._entries = names.entries(target)
        query, key_value = head_places(target, source)
        self._places: dict[Axis, Places] = {
            "hidden": Places.modulo(target.hidden, source.hidden),
            "intermediate": Places.modulo(target.intermediate, source.intermediate),
            "query": query,
            "key_value": key_value,
            "vocabulary": Places.modulo(target.vocabulary, source.vocabulary),
            "head_dim": Places.modulo(target.head_dim, source.head_dim),
        }

    @classmethod
    def build(
        cls, args: Mapping[str, Any], source: DecoderShape, target: DecoderShape, names: DecoderNames = LLAMA_NAMES
    ) -> Grower:
        """Makes the grower from a recipe's mapping; raises ValueError as the constructor and `Component.parse` do."""
        return cls(cls.parse(args), source, target, names)

    @staticmethod
    @abstractmethod
    def exact(source: DecoderShape, target: DecoderShape) -> bool:
        """Whether the target has the logits of the source."""

    @abstractmethod
    def source_layer(self, layer: int) -> int:
        """The source layer that a target layer is made from."""

    def tensor_names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the target with its shape."""
        return {n: tuple(self.target.size(axis) for axis in entry.axes) for n, entry in self._entries.items()}

    def target_tensor(self, name: str, read: Read) -> Tensor:
        """One tensor of the target, in the dtype of the source's.

        Args:
            name: one of `tensor_names`.
            read: returns a tensor of the source by its name.

        Raises:
            ValueError: the target has no such tensor, or the source's has another shape than it should have.
        """
        if name not in self._entries:
            raise ValueError(f"the grown decoder has no tensor {name!r}")
        entry = self._entries[name]
        layer = None if entry.layer is None else self.source_layer(entry.layer)
        return self.widen(entry, layer, read)

    def widen(self, entry: Entry, layer: int | None, read: Read) -> Tensor:
        """The tensor of one source layer (None outside the layers) in the width of the target."""
        tensor = self._copied(self._divided(entry, layer, read), entry, 0)
        if entry.kind == "embedding":
            tensor = self._copied(tensor, entry, 1)
        if self.target.tied_head and entry.name(None) == f"{self._names.norm}.weight":
            tensor = _over(tensor, self._places["hidden"].count)
        return tensor.clone()

    def _divided(self, entry: Entry, layer: int | None, read: Read) -> Tensor:
        """Reads the source's tensor and expands the axis that it sums over."""
        name = entry.name(layer)
        tensor = read(name)
        wanted = tuple(self.source.size(axis) for axis in entry.axes)
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but the source's shape asks for {wanted}")
        if entry.kind != "matrix" or self._places[entry.axes[1]].trivial:
            return tensor
        return _over(self._copied(tensor, entry, 1), self._places[entry.axes[1]].count)

    def _copied(self, tensor: Tensor, entry: Entry, dim: int) -> Tensor:
        places = self._places[entry.axes[dim]]
        return tensor if places.trivial else tensor.index_select(dim, places.source.to(tensor.device))

    def grow_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A transformers config of the target from that of the source; a list with one item a layer grows with it."""
        grown = {**config, **size_keys(self.target)}
        for key, value in config.items():
            if isinstance(value, list) and key == "layer_types":
                grown[key] = [value[self.source_layer(layer)] for layer in range(self.target.layers)]
        return grown


def _over(tensor: Tensor, count: Tensor) -> Tensor:
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (exact / count.to(tensor.device)).to(tensor.dtype)
