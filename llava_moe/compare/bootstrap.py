"""The hierarchical percentile bootstrap; `stats.py` says why no verdict is drawn from it.

Legend: M methods, S seeds, Q questions, B resamples, N = M S.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_moe.evaluation.stats import Interval

NUM_RESAMPLES = 2000
_CHUNK = 100  # resamples at a time: the weights of 2000 x 12,578 questions (GQA) would take 200 MB


def bootstrap_intervals(tables: Sequence[np.ndarray], seed: int = 0) -> list[Interval]:
    """95 % percentile intervals of the hierarchical bootstrap: seeds, then questions, the same ones for all methods.

    Args:
        tables: (M, S, Q) for each task; NaN in the rows of missing cells. A resample without any seed of a method
            does not count for it.

    Returns:
        One interval for each method.
    """
    rng = np.random.default_rng(seed)
    have_MS = ~np.isnan(np.sum([table.mean(axis=2) for table in tables], axis=0))
    M, S = have_MS.shape
    drawn_BM = []
    for _ in range(NUM_RESAMPLES // _CHUNK):
        mean_BMS = np.zeros((_CHUNK, M, S))
        for table in tables:
            Q = table.shape[2]
            chosen_BQ = rng.integers(0, Q, (_CHUNK, Q)) + Q * np.arange(_CHUNK)[:, None]
            times_BQ = np.bincount(chosen_BQ.ravel(), minlength=_CHUNK * Q).reshape(_CHUNK, Q)
            x_QN = np.where(have_MS[:, :, None], table, 0.0).reshape(M * S, Q).T
            mean_BMS += (times_BQ.astype(float) @ x_QN).reshape(_CHUNK, M, S) / (Q * len(tables))
        weight_BMS = rng.multinomial(S, [1 / S] * S, _CHUNK)[:, None, :] * have_MS
        with np.errstate(invalid="ignore"):
            drawn_BM.append((weight_BMS * mean_BMS).sum(axis=2) / weight_BMS.sum(axis=2))
    low_M, high_M = np.nanpercentile(np.concatenate(drawn_BM), [2.5, 97.5], axis=0)
    return [(float(low), float(high)) for low, high in zip(low_M, high_M, strict=True)]
