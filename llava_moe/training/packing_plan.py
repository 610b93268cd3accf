"""What a dry run can say of a step: how many samples or rows, how many tokens, and how full packed rows will be."""

from __future__ import annotations

from pathlib import Path

from llava_moe.config import RunConfig
from llava_moe.data.index import RecordIndex
from llava_moe.data.packing import PackPlan, plan_packs
from llava_moe.data.schema import DataError


def step_lines(config: RunConfig, sequences: int, devices: int) -> list[str]:
    """Comment lines.

    Args:
        sequences: samples, or rows if packed, of one optimiser step on all devices.
    """
    length = config.data.max_length
    if not config.data.packing:
        return [
            f"# samples per step and device: {sequences // devices}",
            f"# tokens per step: at most {sequences * length:,} ({sequences:,} samples of up to {length:,} tokens)",
        ]
    plan, reason = _plan(config)
    rows = f"# rows per step and device: {sequences // devices}, each of as many samples as fit"
    if plan is None:
        return [
            rows,
            f"# tokens per step: about {sequences * length:,} ({sequences:,} rows of {length:,} tokens)",
            f"# useful share of the rows: unknown here, {reason}",
        ]
    samples, packs = sum(map(len, plan.packs)), max(1, len(plan.packs))
    useful = round(sequences * length * plan.share)
    return [
        f"{rows}: {samples / packs:.2f} in the mean, {samples / packs * sequences:.0f} samples in a step",
        f"# tokens per step: about {useful:,} ({sequences:,} rows of {length:,} places)",
        f"# useful share of the rows: {100 * plan.share:.1f} %; {samples:,} samples make {len(plan.packs):,} rows, "
        f"{-(-len(plan.packs) // sequences):,} steps for an epoch",
    ]


def pictures(config: RunConfig, tiles: int, image_tokens: int) -> int:
    """Pictures, or tiles, that go through the tower for one sequence, at the most.

    Args:
        tiles: of one image, at the most.
        image_tokens: of one picture or tile.
    """
    return max(tiles, config.data.max_length // image_tokens) if config.data.packing else tiles


def _plan(config: RunConfig) -> tuple[PackPlan | None, str]:
    """The rows of an epoch as the run would make them; or why they are not known."""
    if config.data.index is None:
        return None, "the recipe names no data.index (llava-moe check-data writes one)"
    if not Path(config.data.index).is_dir():
        return None, f"{config.data.index} is not there yet"
    try:
        lengths = RecordIndex(config.data.index).lengths
    except DataError as error:
        return None, str(error)
    if lengths is None:
        return None, f"{config.data.index} holds no lengths"
    return plan_packs(lengths, config.data.max_length, config.seed), ""
