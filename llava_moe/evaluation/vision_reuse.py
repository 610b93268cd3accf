"""The features of a picture are computed once and serve all questions about it.

Tower and projector see the pictures of one visual at a time (those of one sample where the model cuts tiles, since how
a picture is cut may depend on its companions). So the features of a picture do not depend on the batch that it is
asked about in, whatever its router or its matrix products make of companions; answers with and without reuse are
equal to the bit, and what the tower's and the projector's experts did for a picture can be counted for each question
about it.

Pictures are known by content: mode, size and pixels, not by path or object.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_moe.data.visuals import Visual
from llava_moe.moe import Routing, SiteKey

MIB = 2**20
DEFAULT_MIB = 256


def content_key(visual: Visual) -> str:
    """The same for pictures (or videos, as lists of frames) of the same mode, size and pixels."""
    if not isinstance(visual, Image.Image):
        return "video:" + "+".join(content_key(frame) for frame in visual)
    digest = hashlib.blake2b(f"{visual.mode} {visual.size}".encode(), digest_size=16)
    if visual.mode == "P":  # the pixels are places in it
        digest.update(bytes(visual.getpalette() or ()))
    digest.update(visual.tobytes())
    return digest.hexdigest()


def can_reuse(model: Any) -> bool:
    """Whether a model takes features in the place of pixels: the LLaVA families of this package do."""
    return hasattr(getattr(model, "model", None), "picture_features")


@dataclass(frozen=True)
class Entry:
    """What is kept of one visual, or of the visuals of one sample.

    Attributes:
        features: of each visual or frame the sequence (M, D) that stands in the place of its placeholders.
        routing: what `summarise` made of the tower's and projector's routings; None without it.
    """

    features: tuple[Tensor, ...]
    routing: Any = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.features)


class VisionFeatures:
    """Encodes pictures, and keeps the features of those that were asked about last.

    Args:
        model: one for which `can_reuse` holds.
        processor: of its checkpoint.
        limit_mib: features that are kept, on the model's device; 0 keeps nothing.
        summarise: is given the routings of the tower and the projector for one entry, and returns what to keep of them.

    Attributes:
        hits, misses: entries that were there, and that had to be computed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        limit_mib: float = DEFAULT_MIB,
        summarise: Callable[[dict[SiteKey, Routing]], Any] | None = None,
    ) -> None:
        if limit_mib < 0:
            raise ValueError(f"vision_cache_mib must be 0 (nothing is kept) or more, not {limit_mib}")
        self.model = model
        self.processor = processor
        self.limit = int(limit_mib * MIB)
        self.summarise = summarise
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[str, ...], Entry] = OrderedDict()
        self._bytes = 0

    def encode(self, keys: Sequence[str], load: Callable[[], Sequence[Visual]]) -> list[Entry]:
        """The entries of one sample's visuals.

        Args:
            keys: their `content_key`s.
            load: gives the visuals; called only if some entry is missing.
        """
        units = self._units(len(keys))
        named = [tuple(keys[place] for place in unit) for unit in units]
        missing = any(name not in self._kept for name in named)
        visuals = list(load()) if missing else []
        found = []
        for unit, name in zip(units, named, strict=True):
            entry = self._kept.get(name)
            if entry is None:
                self.misses += 1
                # another unit of this very sample may have pushed it out, although it was there above
                visuals = visuals or list(load())
                entry = self._compute([visuals[place] for place in unit])
            else:
                self.hits += 1
            self._keep(name, entry)
            found.append(entry)
        return found

    def clear(self) -> None:
        """Lets go of the features; the counters stay."""
        self._kept.clear()
        self._bytes = 0

    def _units(self, count: int) -> list[list[int]]:
        """Which visuals of a sample are encoded together."""
        if self.processor.planner is not None:
            return [list(range(count))] if count else []
        return [[place] for place in range(count)]

    def _compute(self, visuals: list[Visual]) -> Entry:
        shown = self.processor.encode_visuals(visuals)
        inputs: dict[str, Any] = {"pixel_values": shown["pixel_values"].to(self.model.device, self.model.dtype)}
        if "num_tiles" in shown:
            inputs |= {key: shown[key] for key in ("image_sizes", "num_tiles")}
            inputs["batch_num_images"] = [len(visuals)]
            if any(shown["is_video"]):
                inputs["is_video"] = shown["is_video"]
        inner = self.model.model
        with torch.inference_mode(), inner.scope.recording() as routings:
            found = inner.get_image_features(**inputs, return_dict=True).pooler_output
        routing = None if self.summarise is None else self.summarise(routings)
        return Entry(tuple(found), routing)

    def _keep(self, name: tuple[str, ...], entry: Entry) -> None:
        if entry.num_bytes > self.limit:
            return
        if name not in self._kept:
            self._kept[name] = entry
            self._bytes += entry.num_bytes
        self._kept.move_to_end(name)
        while self._bytes > self.limit:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.num_bytes


def encoder_outputs(entries: Sequence[Entry]) -> dict[str, Any]:
    """The features of a batch's visuals, in the order of its rows, as inputs of forward or generate; {} for none."""
    features = [tensor for entry in entries for tensor in entry.features]
    if not features:
        return {}
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}  # type: ignore[arg-type]
