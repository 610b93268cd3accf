"""Batches: every request once, longest first, little padding, neighbours that share pictures."""

from __future__ import annotations

import itertools
import random

import pytest

from llava_moe.evaluation.batching import Row, padding_share, plan_batches


def rows(lengths: list[int], **options: object) -> list[Row]:
    return [Row(index, length, **options) for index, length in enumerate(lengths)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(1, None), (8, None), (64, 2048), (8, 300)])
def test_each_request_once_within_the_bounds_and_the_peak_first(batch_size: int, batch_tokens: int | None) -> None:
    draw = random.Random(0)
    given = [
        Row(i, draw.randint(5, 700), 16 + 100 * (i % 3), i % 3, (f"p{draw.randint(0, 30)}",) if i % 5 else ())
        for i in range(400)
    ]
    batches = plan_batches(given, batch_size, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(400))
    for batch in batches:
        assert len({given[index].settings for index in batch}) == 1
        assert len(batch) <= batch_size
        longest = max(given[index].peak for index in batch)
        assert batch_tokens is None or len(batch) == 1 or len(batch) * longest <= batch_tokens
    assert max(row.peak for row in given) == max(given[index].peak for index in batches[0])
    assert padding_share(given, batches) < 0.125


def test_order_of_the_requests_does_not_matter_to_the_padding() -> None:
    lengths = [40, 600] * 32
    given = rows(lengths)
    assert padding_share(given, plan_batches(given, 8)) == 0
    assert padding_share(given, [list(range(i, i + 8)) for i in range(0, 64, 8)]) == pytest.approx(1 - 320 / 600)


def test_a_batch_is_filled_with_shorter_rows_to_half_of_the_longest() -> None:
    """Thirty questions of thirty lengths: two batches of sixteen at most, not one for each eighth."""
    given = rows(list(range(60, 30, -1)))
    assert [len(batch) for batch in plan_batches(given, 16)] == [16, 14]
    assert [len(batch) for batch in plan_batches(rows([90, 45, 44]), 16)] == [2, 1]
    many = rows([100] * 16 + [60] * 16)  # full batches need nothing
    assert padding_share(many, plan_batches(many, 16)) == 0


def test_questions_about_one_picture_are_neighbours() -> None:
    given = [Row(i, 100 - i % 7, pictures=(f"p{i % 10}",)) for i in range(40)]
    order = [index for batch in plan_batches(given, 4) for index in batch]
    shown = [given[index].pictures for index in order]
    assert sum(a != b for a, b in itertools.pairwise(shown)) == 9  # each picture's four questions in a row


def test_options_of_a_question_without_picture_stay_together() -> None:
    given = [Row(i, 60 + i % 3, question=i % 5) for i in range(20)]
    assert [{index % 5 for index in batch} for batch in plan_batches(given, 4)].count({0}) == 1
    assert all(len({index % 5 for index in batch}) == 1 for batch in plan_batches(given, 4))


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="batch_tokens must be a whole number from 1 on, not 0"):
        plan_batches([], 1, 0)
    assert plan_batches([], 1) == []
    assert plan_batches(rows([900, 10]), 8, 100) == [[0], [1]]
