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

from llava_moe.data.feature_store import FeatureStore, FeatureStoreWriter, image_key
from llava_moe.data.image import load_image
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.schema import Sample
from llava_moe.training import distributed
from llava_moe.training.data import Sources, samples_of
from llava_moe.training.rank_zero import on_first_rank

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


def feature_store(folder: str, model: Any, processor: LlavaMoeProcessor, sources: Sources) -> FeatureStore:
    """Opens the store for these pictures and this tower; rank 0 writes it first if it is not there."""
    if processor.tiling is not None:
        raise ValueError("data.feature_cache keeps features of whole images, but this model is shown tiles; omit it")
    keys: dict[str, tuple[Path, str]] = {}
    for path, sample_id in {path: sample.id for sample in samples_of(sources) for path in _files(sample)}.items():
        keys.setdefault(image_key(path), (path, sample_id))
    pictures = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()
    with distributed.gathered(model.model.vision_tower):
        mark = fingerprint(model, processor)
        path = Path(folder) / f"{mark[:12]}-{pictures[:12]}"
        on_first_rank(lambda: None if path.exists() else _write(path, mark, model, processor, keys))
    return FeatureStore(path, mark)


def _files(sample: Sample) -> tuple[Path, ...]:
    if not all(isinstance(image, Path) for image in sample.images):
        raise ValueError(f"data.feature_cache needs images as files, but those of {sample.source} lie in it; omit it")
    return sample.images


def _write(path: Path, mark: str, model: Any, processor: LlavaMoeProcessor, keys: dict[str, tuple[Path, str]]) -> None:
    names = list(keys)
    weight = next(model.model.vision_tower.parameters())
    # a projector may merge features, so their number is asked of the tower and not of the processor
    num_tokens, channels = tower_features(model, weight.new_zeros(1, *processor.image_shape)).shape[1:]
    writer = FeatureStoreWriter(path, mark, num_images=len(names), num_tokens=num_tokens, channels=channels)
    with writer:
        for start in track(range(0, len(names), _BATCH), description=f"Vision features of {len(names)} pictures"):
            batch = names[start : start + _BATCH]
            pixels = processor.encode_images([load_image(*keys[name]) for name in batch])
            writer.add(batch, tower_features(model, pixels.to(weight)).float().cpu())
