"""Runs a frozen tower once over all pictures of a data set and keeps the features on disk.

A frozen tower gives the same features in every epoch, stage and run; on a CPU it is most of the cost of a step.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from llava_moe.data.check import read_sources
from llava_moe.data.feature_store import FeatureStore, FeatureStoreWriter, image_key
from llava_moe.data.image import load_image
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.training import distributed

_BATCH = 32


def fingerprint(model: Any, processor: LlavaMoeProcessor) -> str:
    """Changes whenever the features of the same picture would."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    settings = {
        "layer": model.config.vision_feature_layer,
        "strategy": model.config.vision_feature_select_strategy,
        "tower": model.config.vision_config.to_dict(),
        "image_processor": processor.image_processor.to_dict(),
        "image_mode": processor.image_mode,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@torch.inference_mode()
def tower_features(model: Any, pixels: Tensor) -> Tensor:
    """What the projector reads: (images, 3, H, W) to (images, N, C)."""
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError("data.feature_cache works with one vision_feature_layer, not with several")
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    return hidden[:, 1:] if model.config.vision_feature_select_strategy == "default" else hidden


def feature_store(
    folder: str, model: Any, processor: LlavaMoeProcessor, sources: list[tuple[Path, Path]]
) -> FeatureStore:
    """Opens the store for these pictures and this tower; rank 0 writes it first if it is not there."""
    samples, _ = read_sources(sources)
    keys: dict[str, tuple[Path, str]] = {}
    for path, sample_id in {path: sample.id for sample in samples for path in sample.images}.items():
        keys.setdefault(image_key(path), (path, sample_id))
    pictures = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()
    with distributed.gathered(model.model.vision_tower):
        mark = fingerprint(model, processor)
        path = Path(folder) / f"{mark[:12]}-{pictures[:12]}"
        if distributed.rank() == 0 and not path.exists():
            _write(path, mark, model, processor, keys)
        distributed.barrier()
    return FeatureStore(path, mark)


def _write(path: Path, mark: str, model: Any, processor: LlavaMoeProcessor, keys: dict[str, tuple[Path, str]]) -> None:
    channels = model.config.vision_config.hidden_size
    writer = FeatureStoreWriter(
        path, mark, num_images=len(keys), num_tokens=processor.num_image_tokens, channels=channels
    )
    names = list(keys)
    weight = next(model.model.vision_tower.parameters())
    with writer:
        for start in track(range(0, len(names), _BATCH), description=f"Vision features of {len(names)} pictures"):
            batch = names[start : start + _BATCH]
            pixels = processor.encode_images([load_image(*keys[name]) for name in batch])
            writer.add(batch, tower_features(model, pixels.to(weight)).float().cpu())
