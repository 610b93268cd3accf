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


def modality_grouped_order(
    lengths: Sequence[int],
    has_image: Sequence[bool],
    batch_size: int,
    generator: torch.Generator,
    megabatch: int = 8,
) -> list[int]:
    """As `length_grouped_order`, and samples with and without images do not share a batch (LLaVA-1.5).

    A batch of text alone does not wait for the vision tower's work on another rank. What is left of both kinds when
    they have been cut into batches makes the last ones.

    Args:
        lengths, batch_size, generator, megabatch: as there.
        has_image: for each sample.
    """
    batches: list[list[int]] = []
    rest: list[int] = []
    for kind in (True, False):
        members = [index for index, found in enumerate(has_image) if bool(found) is kind]
        own = [lengths[index] for index in members]
        order = [members[place] for place in length_grouped_order(own, batch_size, generator, megabatch)]
        whole = len(order) - len(order) % batch_size
        batches += [order[start : start + batch_size] for start in range(0, whole, batch_size)]
        rest += order[whole:]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [index for place in shuffled for index in batches[place]] + rest
