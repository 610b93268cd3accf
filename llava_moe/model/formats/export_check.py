"""Whether an export computes what its source does: both models on one picture and some text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_moe.model.assemble import load_model
from llava_moe.model.formats.export_rules import STOCK
from llava_moe.model.formats.exporting import ExportPlan
from llava_moe.model.measuring import TOLERANCE
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import WHOLE_MODEL_BYTES


@torch.no_grad()
def check_export(plan: ExportPlan, folder: Path, whole_bytes: int = WHOLE_MODEL_BYTES) -> float | None:
    """The largest difference of the logits of the two models on one picture and some text; None if they are too large.

    Raises:
        CheckpointError: the stock class misses a tensor, or computes something else.
    """
    if plan.stored.reader.float32_bytes > whole_bytes:
        return None
    stock_class = STOCK[plan.stored.config.model_type][1]
    stock, info = stock_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    state = stock.state_dict()
    missing = sorted(key for key in info["missing_keys"] if key not in state or state[key].numel())
    wrong = [*missing, *sorted(info["unexpected_keys"])]
    if wrong:
        raise CheckpointError(f"{folder}: transformers misses or does not know {', '.join(wrong[:4])}")
    ours: Any = load_model(plan.stored.path)
    inputs = _sample(ours, plan.config)
    expected, found = ours(**inputs).logits, stock.eval()(**inputs).logits
    error = float((found - expected).abs().max())
    if error > TOLERANCE * max(1.0, float(expected.abs().max())):
        raise CheckpointError(f"{plan.stored.path}: the export's logits differ by {error:.2e}; nothing was written")
    return error


def _sample(ours: Any, config: Any) -> dict[str, Any]:
    """Stock inputs: 4 tokens, a picture as large as a tile is (so that both cut it alike), 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    size, token = config.vision_config.image_size, config.image_token_index
    shown: dict[str, Any] = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    if plan_is_tiled(config):
        height, width = config.image_grid_pinpoints[0]
        tiles = 1 + (height // size) * (width // size)
        shown["pixel_values"] = torch.randn(1, tiles, 3, size, size, generator=generator)
        shown["image_sizes"] = torch.tensor([[height, width]])
    features = ours.model.get_image_features(**shown, return_dict=True).pooler_output[0]
    text = torch.randint(0, min(config.text_config.vocab_size, token), (1, 16), generator=generator)
    ids = torch.cat([text[:, :4], torch.full((1, len(features)), token), text[:, 4:]], dim=1)
    return {"input_ids": ids, **shown}


def plan_is_tiled(config: Any) -> bool:
    """Whether a stock config is that of a model of tiles."""
    return hasattr(config, "image_grid_pinpoints")
