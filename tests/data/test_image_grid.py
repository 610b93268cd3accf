"""anyres in integers, against an independent evaluation of the rules and against transformers' own counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import llava_moe  # noqa: F401  before anything that may import torchvision

from llava_moe.data.image_grid import (  # isort: skip
    FramePooling,
    Tiling,
    fitted_size,
    parse_grid,
    parse_mode,
    select_resolution,
    unpadded,
)
from tests.reference import anyres  # isort: skip
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor  # isort: skip
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor  # isort: skip

SIZES = anyres.ODD_SIZES
GRIDS = {"llava-1.6": (336, 24), "(1x1),...,(6x6)": (384, 27)}  # grid: tile, side
MERGES: list[dict[str, Any]] = [
    {"merge": "flat"},
    {"merge": "spatial"},
    {"merge": "spatial", "base": False},
    {"merge": "spatial_maxpool2x2"},
    {"merge": "spatial_maxpool2x2", "base": False},
    {"merge": "spatial_unpad"},
    {"merge": "spatial_unpad", "unpad_rounding": "llava"},
    {"merge": "spatial_unpad", "base": False},
    {"merge": "spatial_unpad", "max_tiles": 1},
    {"merge": "spatial_unpad", "max_tiles": 4},
    {"merge": "spatial_unpad", "max_tiles": 9},
    {"merge": "spatial_unpad", "max_tiles": 9, "unpad_rounding": "llava", "base": False},
]


def tiling(grid: str, **options: Any) -> Tiling:
    tile, side = GRIDS[grid]
    return Tiling(tile=tile, side=side, resolutions=parse_grid(grid, tile), **options)


def test_there_are_enough_sizes():
    assert len(set(SIZES)) == len(SIZES) >= 40


@pytest.mark.parametrize("order", ["height_width", "width_height"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_resolution_is_that_of_the_rules(grid: str, order: Any):
    resolutions = parse_grid(grid, GRIDS[grid][0], order)
    flipped = [(width, height) for height, width in resolutions]
    for height, width in SIZES:
        expected = anyres.best_resolution((width, height), flipped)
        assert select_resolution((height, width), resolutions) == expected[::-1], (height, width)
        assert fitted_size((height, width), expected[::-1]) == anyres.resized((width, height), expected)[::-1]


@pytest.mark.parametrize("options", MERGES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_are_counted_as_the_rules_lay_them_out(grid: str, options: dict[str, Any]):
    mode, side = tiling(grid, **options), GRIDS[grid][1]
    rule = {key: value for key, value in options.items() if key != "unpad_rounding"}
    newline = np.zeros(1) if options["merge"] == "spatial_unpad" else None
    for size in SIZES:
        counts = anyres.tile_counts(size, list(mode.resolutions), mode.tile)
        features = np.zeros((1 + counts[0] * counts[1], side**2, 1))
        rounding = options.get("unpad_rounding", "exact")
        laid_out = anyres.sequence(features, size, counts, rounding=rounding, newline=newline, **rule)
        plan = mode.plan([size])[0]
        assert plan.num_tokens == len(laid_out), size
        assert plan.num_tiles == len(features)
        assert plan.resolution == (counts[0] * mode.tile, counts[1] * mode.tile)


def next_count(size: tuple[int, int], mode: Tiling, patch: int) -> int:
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in mode.resolutions])
    processor.patch_size, processor.num_additional_image_tokens = patch, 1
    return processor._get_number_of_features(*size, mode.tile, mode.tile) - 1  # the class token


def onevision_count(size: tuple[int, int], mode: Tiling) -> int:
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in mode.resolutions])
    processor.num_image_tokens, processor.vision_aspect_ratio = mode.side**2, f"anyres_max_{mode.max_tiles}"
    return processor._get_number_of_features(*size, mode.tile, mode.tile)


@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_are_those_of_the_llava_next_processor(grid: str):
    mode = tiling(grid)
    assert [mode.num_tokens(size) for size in SIZES] == [next_count(size, mode, 14) for size in SIZES]


@pytest.mark.parametrize("max_tiles", [1, 4, 9])
@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_are_those_of_the_onevision_processor(grid: str, max_tiles: int):
    mode = tiling(grid, max_tiles=max_tiles)
    assert [mode.num_tokens(size) for size in SIZES] == [onevision_count(size, mode) for size in SIZES]


def test_known_counts():
    assert tiling("llava-1.6").num_tokens((672, 672)) == 576 + 48 * 49
    assert tiling("llava-1.6").num_tokens((336, 1008)) == 576 + 24 * 73
    assert tiling("(1x1),...,(6x6)").num_tokens((384, 384)) == 729 + 27 * 28
    assert tiling("(1x1),...,(6x6)", max_tiles=9).num_tokens((2304, 2304)) == 729 + 81 * 82
    assert tiling("llava-1.6", merge="flat").num_tokens((672, 672)) == 5 * 576


def test_the_two_roundings_part_where_a_product_lies_just_below_a_whole_number():
    """transformers #35779 rounds, LLaVA does not; everywhere else they agree, so a checkpoint may change over."""
    grid = (48, 48)
    differ = [
        (height, width)
        for height in range(1, 200)
        for width in range(1, 200)
        if unpadded((height, width), grid, "exact") != unpadded((height, width), grid, "llava")
    ]
    assert differ
    for height, width in differ:
        long, short = max(height, width), min(height, width)
        assert 48 * short % long == 0
        exact, llava = (sum(unpadded((height, width), grid, rounding)) for rounding in ("exact", "llava"))
        assert exact - llava == 2


def test_images_no_larger_than_a_tile_depend_on_the_order_of_the_grid():
    ours, llavas = (parse_grid("llava-1.6", 336, order) for order in ("height_width", "width_height"))
    for size in SIZES:
        differs = select_resolution(size, ours) != select_resolution(size, llavas)
        # of a line of one pixel nothing is left at any resolution, so all of them are equally good
        assert differs == (max(size) <= 336 or size in ((1, 3000), (3000, 1))), size
    stock, original = (Tiling(tile=336, side=24, resolutions=grid) for grid in (ours, llavas))
    assert (stock.tile_grid((100, 200)), stock.num_tokens((100, 200))) == ((1, 2), 576 + 24 * 49)
    assert (original.tile_grid((100, 200)), original.num_tokens((100, 200))) == ((2, 1), 576 + 12 * 25)
    full = [parse_grid("(1x1),...,(6x6)", 384, order) for order in ("height_width", "width_height")]
    assert all(select_resolution(size, full[0]) == select_resolution(size, full[1]) for size in SIZES)


def test_several_images_are_padded_or_all_cut():
    sizes = [(100, 200), (500, 300)]
    padded = tiling("llava-1.6").plan(sizes)
    assert [(plan.size, plan.resolution, plan.num_tiles, plan.num_tokens) for plan in padded] == [
        (size, None, 1, 577) for size in sizes
    ]
    assert [plan.num_tokens for plan in tiling("llava-1.6", merge="flat").plan(sizes)] == [576, 576]
    cut = tiling("llava-1.6", several_images="anyres")
    assert cut.plan(sizes) == [*cut.plan(sizes[:1]), *cut.plan(sizes[1:])]
    assert cut.plan([]) == []


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 32 * 196 + 1),  # as in LLaVA-OneVision's paper
        ({"newline": "none"}, 32 * 196),
        ({"newline": "frame"}, 32 * 197),
        ({"newline": "row"}, 32 * 14 * 15),
        ({"mode": "average"}, 32 * 169 + 1),
        ({"mode": "max", "stride": 4}, 32 * 36 + 1),
        ({"stride": 1}, 32 * 729 + 1),
    ],
)
def test_video_tokens(options: dict[str, Any], tokens: int):
    assert tiling("(1x1),...,(6x6)", frames=FramePooling(**options)).num_video_tokens(32) == tokens


def test_grids_are_read_in_all_their_forms():
    assert parse_grid("llava-1.6", 336) == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert parse_grid("[[336, 672], [672, 336]]", 336, "width_height") == ((672, 336), (336, 672))
    assert parse_grid([[336, 672], (672, 336)], 336) == ((336, 672), (672, 336))
    square = parse_grid("(1x1),...,(6x6)", 384)
    assert square == tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7))
    assert parse_grid("(1x1), (1x2),(2x1),(2x2)", 10) == ((10, 10), (10, 20), (20, 10), (20, 20))
    assert parse_grid("(1x2),...,(1x3)", 10, "width_height") == ((20, 10), (30, 10))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("llava-1.5", "'llava-1.5'; allowed are"),
        ("(1x2),(2x1)", "reads as the range"),
        ("1x2", r"'1x2'; write a range"),
        ("[]", "is empty"),
        ([(336, 500)], r"\(336, 500\); both sides must be positive multiples of 336"),
        ([(0, 336)], r"\(0, 336\)"),
        ([(336.0, 336)], "336.0; allowed are whole numbers"),
        ([336, 672], "pairs of pixels"),
    ],
)
def test_bad_grids_are_refused(value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        parse_grid(value, 336)


def test_modes_are_read():
    assert (parse_mode("anyres"), parse_mode("anyres_max_9"), parse_mode("anyres_max_12")) == (None, 9, 12)
    for name in ("anyres_max_0", "anyres_max", "anyres_max_", "pad", "anyres_max_9x"):
        with pytest.raises(ValueError, match=name):
            parse_mode(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile is 0"),
        ({"side": 0}, "side is 0"),
        ({"merge": "unpad"}, "merge is 'unpad'; allowed: flat"),
        ({"several_images": "crop"}, "several_images is 'crop'"),
        ({"unpad_rounding": "up"}, "unpad_rounding is 'up'"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"merge": "spatial", "max_tiles": 9}, "max_tiles is 9, but only"),
        ({"merge": "spatial", "unpad_rounding": "llava"}, "unpad_rounding is 'llava', but only"),
        ({"merge": "flat", "base": False}, "base is False"),
        ({"merge": "flat", "frames": FramePooling()}, "frames.newline is 'video'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Tiling(**{"tile": 336, "side": 24, "resolutions": ((336, 336),), **options})


def test_other_bad_values_are_refused():
    for options in ({"stride": 0}, {"mode": "min"}, {"newline": "end"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            FramePooling(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 frames"):
        FramePooling().num_tokens(0, 27)
    with pytest.raises(ValueError, match="stride is 28"):
        FramePooling(stride=28).num_tokens(1, 27)
    with pytest.raises(ValueError, match="no videos"):
        tiling("llava-1.6").num_video_tokens(3)
    with pytest.raises(ValueError, match="0 pixels high"):
        tiling("llava-1.6").plan([(0, 3)])
    with pytest.raises(ValueError, match="grid order"):
        parse_grid("llava-1.6", 336, "wh")  # type: ignore[arg-type]
