"""Orders in which samples of similar length come together: in mixed data most of a random batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def length_grouped_order(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, megabatch: int = 8
) -> list[int]:
    """All indices once, cut into batches of similar length, the batches in random order.

    Samples are drawn at random into megabatches, sorted inside each by length and cut into batches; then the batches of
    the whole epoch are shuffled. (transformers leaves them sorted inside each megabatch, so that the kind of sample
    would change periodically with the length.)

    Args:
        lengths: of the samples, in any unit.
        batch_size: samples that are grouped, those of one step.
        generator: of the order.
        megabatch: batches sorted together; more of them give less padding, and less variety within a batch.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    width = batch_size * megabatch
    batches: list[list[int]] = []
    for start in range(0, len(order), width):
        group = sorted(order[start : start + width], key=lambda i: lengths[i])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    # Only the very last batch can be short; it stays last, or every later batch would be cut across two groups.
    short = batches.pop() if batches and len(batches[-1]) < batch_size else []
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [i for index in shuffled for i in batches[index]] + short
