"""Which requests are answered together, and in which order.

Requests with other generation settings are never answered together. Within the same settings:

- Rows of similar length stand in one bucket, so at most an eighth of a batch (or 8 tokens a row) is padding. A bucket
  that would not fill a batch goes on with shorter rows, to half of its longest: many small batches would cost more.
- Buckets go from long to short, and the group of settings with the longest row comes first: a batch that does not fit
  into memory is the first one, not the last.
- Within a bucket, requests about the same pictures are neighbours, so that their features are still there
  (`vision_reuse.py`); the options of one question are a case of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

SLACK = 8  # a bucket spans an eighth of its longest row ...
MIN_SPAN = 8  # ... and at least so many tokens


@dataclass(frozen=True)
class Row:
    """What batching needs to know of one request.

    Attributes:
        index: place among the requests.
        length: tokens of its sequence, pictures included.
        new_tokens: so many more may be generated.
        settings: only rows with the same are answered together.
        pictures: content of its pictures; () for none.
        question: rows of one question, its options, stay together.
    """

    index: int
    length: int
    new_tokens: int = 0
    settings: Hashable = None
    pictures: tuple[str, ...] = ()
    question: Hashable = None

    @property
    def peak(self) -> int:
        """Tokens that are in memory when the answer is as long as it may be."""
        return self.length + self.new_tokens


def plan_batches(rows: Sequence[Row], batch_size: int, batch_tokens: int | None = None) -> list[list[int]]:
    """Batches of the places of requests, each place once.

    Args:
        rows: the requests, in any order.
        batch_size: rows of a batch at most.
        batch_tokens: rows times the longest row's `peak` at most; a row that is longer by itself goes alone.

    Raises:
        ValueError: a bound is below 1.
    """
    for name, bound in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {bound}")
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.settings, []).append(row)
    found: list[list[int]] = []
    for group in sorted(groups.values(), key=lambda group: -max(row.peak for row in group)):
        for bucket in _buckets(group, batch_size):
            found.extend(_cut(_neighbours(bucket), batch_size, batch_tokens))
    return found


def padding_share(rows: Sequence[Row], batches: Sequence[Sequence[int]]) -> float:
    """The share of the positions of all batches that is padding."""
    length = {row.index: row.length for row in rows}
    real = sum(length[index] for batch in batches for index in batch)
    total = sum(len(batch) * max(length[index] for index in batch) for batch in batches)
    return 1 - real / total if total else 0.0


def _buckets(group: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Rows of similar length, the longest first."""
    bucket: list[Row] = []
    for row in sorted(group, key=lambda row: (-row.length, row.index)):
        longest = bucket[0].length if bucket else 0
        is_similar = row.length >= longest - max(longest // SLACK, MIN_SPAN)
        is_needed = len(bucket) < batch_size and 2 * row.length >= longest
        if bucket and not (is_similar or is_needed):
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket


def _neighbours(bucket: Sequence[Row]) -> list[Row]:
    """The bucket's rows (longest first) so that those about the same pictures, and of the same question, are adjacent.

    A row without pictures has no neighbours to seek but those of its question.
    """
    by_picture: dict[Hashable, dict[Hashable, list[Row]]] = {}
    for row in bucket:
        question = ("row", row.index) if row.question is None else ("question", row.question)
        picture = ("pictures", row.pictures) if row.pictures else question
        by_picture.setdefault(picture, {}).setdefault(question, []).append(row)
    return [row for questions in by_picture.values() for rows in questions.values() for row in rows]


def _cut(rows: Sequence[Row], batch_size: int, batch_tokens: int | None) -> Iterator[list[int]]:
    batch: list[int] = []
    peak = 0
    for row in rows:
        widest = max(peak, row.peak)
        full = len(batch) == batch_size
        if batch and (full or (batch_tokens is not None and (len(batch) + 1) * widest > batch_tokens)):
            yield batch
            batch, widest = [], row.peak
        batch.append(row.index)
        peak = widest
    if batch:
        yield batch
