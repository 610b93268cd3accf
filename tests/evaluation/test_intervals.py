"""Intervals of F1, of sums over pairs and of means over categories: the score itself, coverage, degenerate cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_moe.evaluation import intervals

PAIRS = intervals.pairs("mme_perception_score", "mme_cognition_score")


def pope(kinds: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"f1": {"ground_truth": truth, "prediction": answer}} for truth, answer in kinds]


def test_f1_is_the_official_one() -> None:
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    kinds = [("yes", "yes")] * 5 + [("yes", "no")] * 2 + [("no", "yes")] + [("no", "no")] * 4 + [("yes", "maybe")] * 3
    samples = pope(kinds)
    value, interval = intervals.f1("f1")(samples)
    assert value == pytest.approx(pope_aggregate_f1_score([sample["f1"] for sample in samples]))
    assert value == pytest.approx(10 / 13)
    assert interval is None  # five questions whose answer is no
    value, (low, high) = intervals.f1("f1")(samples * 2)
    assert value == pytest.approx(10 / 13)
    assert 0.5 < low < value < high < 1
    assert intervals.f1("f1")(pope([("no", "no"), ("yes", "no")] * 10)) == (0.0, (0.0, 0.0))


def test_f1_interval_covers() -> None:
    rng = np.random.default_rng(0)
    kinds = [("yes", "yes"), ("no", "yes"), ("yes", "no"), ("no", "no")]
    truth, inside, values, widths = 2 * 0.4 / (2 * 0.4 + 0.1 + 0.15), 0, [], []
    for _ in range(80):
        drawn = rng.choice(4, size=300, p=[0.4, 0.1, 0.15, 0.35])
        value, (low, high) = intervals.f1("f1")(pope([kinds[number] for number in drawn]))
        inside += low <= truth <= high
        values.append(value)
        widths.append(high - low)
    assert inside >= 70  # 76 expected, 2 more or less
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.25)


def mme(rows: list[tuple[str, int, float, float]]) -> list[dict[str, Any]]:
    samples = []
    for category, picture, *scores in rows:
        metric = "mme_cognition_score" if category == "code_reasoning" else "mme_perception_score"
        samples += [{metric: {"question_id": str(picture), "category": category, "score": score}} for score in scores]
    return samples


def test_pairs_are_the_official_points() -> None:
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    rows = [("count", 1, 1.0, 1.0), ("count", 2, 1.0, 0.0), ("color", 1, 0.0, 0.0), ("code_reasoning", 1, 1.0, 1.0)]
    samples = mme(rows)
    value, interval = PAIRS(samples)
    official = sum(
        mme_aggregate_results([sample[metric] for sample in samples if metric in sample])
        for metric in ("mme_perception_score", "mme_cognition_score")
    )
    assert value == official == (200 + 50) / 2 + 0 + 200
    assert interval is None
    rows = [("count", number, 1.0, float(number % 2)) for number in range(40)]
    value, (low, high) = PAIRS(mme(rows))
    assert value == 125
    half = 1.96 * 75 / 40**0.5  # a pair has 50 or 200 points
    assert (low, high) == pytest.approx((125 - half, 125 + half), abs=3)


def test_mean_of_categories_is_the_official_one() -> None:
    from lmms_eval.tasks.mmstar.utils import mmstar_aggregate_results

    scores = {"a": [1.0, 1.0, 0.0, 1.0], "b": [0.0], "c": [1.0, 0.0]}
    rows = [{"l2_category": name, "score": score} for name, found in scores.items() for score in found]
    value, interval = intervals.mean_of_means("average", "l2_category")([{"average": row} for row in rows])
    assert interval is None
    assert value == pytest.approx(mmstar_aggregate_results(rows))
    assert value == pytest.approx((0.75 + 0 + 0.5) / 3)
    many = [{"average": row} for row in rows if row["l2_category"] != "b"] * 20
    value, (low, high) = intervals.mean_of_means("average", "l2_category")(many)
    assert value == pytest.approx(0.625)
    half = 1.96 * (0.75 * 0.25 / 80 + 0.25 / 40) ** 0.5 / 2
    assert (low, high) == pytest.approx((0.625 - half, 0.625 + half), abs=0.01)
