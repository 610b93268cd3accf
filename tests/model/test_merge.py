"""Sequences of tiles and frames, against an independent evaluation and against transformers' own models."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from llava_moe.data.image_grid import FramePooling, Tiling, parse_grid
from llava_moe.model.merge import (
    MergeRule,
    merge_images,
    merge_single,
    merge_tiles,
    merge_video,
    pool_frames,
    tile_grid,
)
from tests.reference import anyres

TILE, SIDE, WIDTH = 42, 3, 2  # patches of 14 pixels
GRIDS = {"llava-1.6": parse_grid("llava-1.6", TILE), "4x4": parse_grid("(1x1),...,(4x4)", TILE)}
RULES = [
    MergeRule("flat"),
    MergeRule("spatial"),
    MergeRule("spatial", base=False),
    MergeRule("spatial_maxpool2x2"),
    MergeRule("spatial_maxpool2x2", base=False),
    MergeRule(),
    MergeRule(unpad_rounding="llava"),
    MergeRule(base=False),
    MergeRule(max_tiles=1),
    MergeRule(max_tiles=2, unpad_rounding="llava"),
    MergeRule(max_tiles=9, base=False),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counts_of(size: tuple[int, int], grid: str) -> tuple[int, int]:
    return anyres.tile_counts(size, list(GRIDS[grid]), TILE)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_sequences_are_those_of_the_rules_and_as_long_as_data_code_says(grid: str, rule: MergeRule):
    newline = drawn(WIDTH, seed=1) if rule.has_newline else None
    counted = Tiling(TILE, SIDE, GRIDS[grid], rule.merge, rule.base, rule.max_tiles, "pad", rule.unpad_rounding)
    for size in anyres.ODD_SIZES:
        counts = counts_of(size, grid)
        assert tile_grid(size, GRIDS[grid], TILE) == counts == counted.tile_grid(size)
        features = drawn(1 + counts[0] * counts[1], SIDE**2, WIDTH)
        found = merge_tiles(features, counts, size, rule, newline)
        expected = anyres.sequence(
            features.numpy(),
            size,
            counts,
            rule.merge,
            base=rule.base,
            max_tiles=rule.max_tiles,
            rounding=rule.unpad_rounding,
            newline=None if newline is None else newline.numpy(),
        )
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12, err_msg=str(size))
        assert len(found) == counted.num_tokens(size)


def stock_config(grid: str) -> Any:
    vision = SimpleNamespace(image_size=TILE, patch_size=TILE // SIDE)
    return SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(pair) for pair in GRIDS[grid]])


def batch_of(grid: str) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """All odd sizes, and one image that was not cut."""
    features = []
    for index, size in enumerate(anyres.ODD_SIZES):
        rows, cols = counts_of(size, grid)
        features.append(drawn(1 + rows * cols, SIDE**2, WIDTH, seed=index).float())
    return [*features, drawn(1, SIDE**2, WIDTH).float()], [*anyres.ODD_SIZES, (50, 60)]


@pytest.mark.parametrize("grid", GRIDS)
def test_sequences_are_those_of_transformers_llava_next(grid: str):
    features, sizes = batch_of(grid)
    newline = drawn(WIDTH, seed=1).float()
    expected, lengths = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=stock_config(grid)), features, torch.tensor(sizes), "default", newline
    )
    found = merge_images(features, sizes, GRIDS[grid], TILE, MergeRule(), newline)
    assert [len(sequence) for sequence in found] == lengths.tolist()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("max_tiles", [2, 3, 9])
@pytest.mark.parametrize("grid", GRIDS)
def test_sequences_are_those_of_transformers_onevision(grid: str, max_tiles: int):
    features, sizes = batch_of(grid)
    newline = drawn(WIDTH, seed=1).float()
    expected, lengths = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=stock_config(grid)), features, torch.tensor(sizes), newline, f"anyres_max_{max_tiles}"
    )
    found = merge_images(features, sizes, GRIDS[grid], TILE, MergeRule(max_tiles=max_tiles), newline)
    assert [len(sequence) for sequence in found] == lengths.tolist()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_gradients_reach_every_feature_that_is_kept_and_the_newline():
    features = drawn(3, SIDE**2, WIDTH).requires_grad_()
    newline = drawn(WIDTH, seed=1).requires_grad_()
    merge_tiles(features, (1, 2), (20, 60), MergeRule(), newline).sum().backward()
    assert features.grad is not None
    assert newline.grad is not None
    # 20 x 60 pixels on 3 x 6 features: 2 rows hold the image, so none of the 3 can go in pairs
    assert features.grad.eq(1).all()
    assert newline.grad.eq(3).all()


def test_a_single_tile_ends_in_a_newline_where_there_are_newlines():
    features, newline = drawn(SIDE**2, WIDTH), drawn(WIDTH, seed=1)
    assert torch.equal(merge_single(features, MergeRule(), newline), torch.cat((features, newline[None])))
    assert torch.equal(merge_single(features, MergeRule("flat"), None), features)
    mode = Tiling(TILE, SIDE, GRIDS["4x4"])
    assert mode.num_single_tokens == len(merge_single(features, MergeRule(), newline))


@pytest.mark.parametrize("side", [2, 3, 5, 8])
def test_frames_are_pooled_as_in_transformers_onevision(side: int):
    frames = drawn(4, side**2, WIDTH).float()
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=side, patch_size=1))
    expected = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), frames)
    torch.testing.assert_close(pool_frames(frames), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["average", "max"])
def test_frames_are_pooled_by_whole_windows(mode: Any):
    frames = drawn(2, 25, WIDTH)
    pooled = pool_frames(frames, 2, mode).reshape(2, 2, 2, WIDTH)
    grid = frames.reshape(2, 5, 5, WIDTH)
    for row in range(2):
        for col in range(2):
            window = grid[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].reshape(2, 4, WIDTH)
            expected = window.mean(1) if mode == "average" else window.max(1).values
            torch.testing.assert_close(pooled[:, row, col], expected)


@pytest.mark.parametrize("newline", ["none", "video", "frame", "row"])
@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
def test_newlines_of_a_video_stand_where_they_belong(newline: Any, mode: Any):
    side, frames = 5, 3
    token = None if newline == "none" else torch.full((WIDTH,), math.inf, dtype=torch.float64)
    pooled = pool_frames(drawn(frames, side**2, WIDTH), 2, mode)
    per_frame, per_row = pooled.shape[1], math.isqrt(pooled.shape[1])
    found = merge_video(pooled, newline, token)
    expected: list[Tensor] = []
    for frame in pooled:
        for place, feature in enumerate(frame, start=1):
            expected.append(feature)
            if token is not None and (
                (newline == "row" and place % per_row == 0) or (newline == "frame" and place == per_frame)
            ):
                expected.append(token)
    expected += [token] if newline == "video" and token is not None else []
    assert torch.equal(found, torch.stack(expected))
    assert len(found) == FramePooling(2, mode, newline).num_tokens(frames, side)


def test_a_newline_takes_the_type_of_the_features():
    features = drawn(2, SIDE**2, WIDTH).bfloat16()
    newline = drawn(WIDTH, seed=1).float()
    assert merge_tiles(features, (1, 1), (9, 9), MergeRule(), newline).dtype == torch.bfloat16
    assert merge_single(features[0], MergeRule(), newline).dtype == torch.bfloat16
    assert merge_video(features, "frame", newline).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "unpad"}, "merge is 'unpad'; allowed: flat"),
        ({"unpad_rounding": "up"}, "unpad_rounding is 'up'"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"merge": "spatial", "max_tiles": 9}, "max_tiles is 9, but only"),
        ({"merge": "spatial", "unpad_rounding": "llava"}, "unpad_rounding is 'llava', but only"),
        ({"merge": "flat", "base": False}, "base is False"),
    ],
)
def test_bad_rules_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MergeRule(**options)


def test_what_does_not_fit_is_refused():
    features, newline = drawn(3, SIDE**2, WIDTH), drawn(WIDTH)
    with pytest.raises(ValueError, match="3 tiles for a grid of 2 x 2; expected 5"):
        merge_tiles(features, (2, 2), (9, 9), MergeRule(), newline)
    with pytest.raises(ValueError, match="the model has none"):
        merge_tiles(features, (1, 2), (9, 9), MergeRule(), None)
    with pytest.raises(ValueError, match="no place for it"):
        merge_tiles(features, (1, 2), (9, 9), MergeRule("spatial"), newline)
    with pytest.raises(ValueError, match="10 features of a tile are no square grid"):
        merge_tiles(drawn(3, 10, WIDTH), (1, 2), (9, 9), MergeRule(), newline)
    with pytest.raises(ValueError, match="stride is 4"):
        pool_frames(features, 4)
    with pytest.raises(ValueError, match="mode is 'min'"):
        pool_frames(features, 2, "min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="newline is 'end'"):
        merge_video(features, "end", newline)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="argument 2"):
        merge_images([features], [(TILE, 2 * TILE), (9, 9)], GRIDS["4x4"], TILE, MergeRule(), newline)
