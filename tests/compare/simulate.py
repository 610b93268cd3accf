"""Answers of methods whose true scores are known: a latent ability, questions of different difficulty, and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from llava_moe.compare.answers import Answers

DIFFICULTY, TASTE, FLIP = 2.0, 0.5, 0.5  # sd over questions, of method x question, and of each single answer


def ability(score: float, seed_sd: float = 0.0, shared: float = 0.0) -> float:
    """The latent mean whose true score (over all seeds and questions) is this."""
    return NormalDist().inv_cdf(score) * math.sqrt(DIFFICULTY**2 + TASTE**2 + FLIP**2 + seed_sd**2 + shared**2)


def answers(
    rng: np.random.Generator,
    scores: Sequence[float],
    seeds: int,
    questions: int,
    seed_sd: Sequence[float] | float = 0.05,
    shared: float = 0.0,
    task: str = "task",
) -> Answers:
    """Answers to one task.

    Args:
        scores: the true score of each method; the first is the dense control.
        seed_sd: latent sd over seeds, of each method; 0.05 are about 0.8 points, 0.4 about 6.
        shared: latent sd of what a seed does to all methods alike (the data order).
    """
    M = len(scores)
    sd_M = np.broadcast_to(np.asarray(seed_sd, dtype=float), (M,))
    mean_M = np.array([ability(score, sd, shared) for score, sd in zip(scores, sd_M, strict=True)])
    latent = mean_M[:, None, None] + rng.normal(0, DIFFICULTY, questions) + rng.normal(0, TASTE, (M, 1, questions))
    latent = latent + (rng.normal(0, 1, (M, seeds)) * sd_M[:, None] + rng.normal(0, shared, seeds))[:, :, None]
    correct = (latent + rng.normal(0, FLIP, (M, seeds, questions)) > 0).astype(float)
    names = ("dense", "random", *(f"m{i}" for i in range(2, M)))[:M]
    return Answers(task, names, tuple(range(seeds)), tuple(f"q{i}" for i in range(questions)), correct)
