"""What the methods of a comparison answered, question by question.

Legend: M methods, S seeds, Q questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llava_moe.evaluation import EvaluationError


@dataclass(frozen=True)
class Answers:
    """What the methods answered to the questions of a task.

    Attributes:
        task: its name.
        methods: M names, the controls among them.
        seeds: S seeds.
        questions: Q names, the same for every cell.
        scores_MSQ: float64 in [0, 1]; the whole row of a cell (method, seed) that failed is NaN.
    """

    task: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    questions: tuple[str, ...]
    scores_MSQ: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.methods), len(self.seeds), len(self.questions))
        if self.scores_MSQ.shape != shape:
            raise EvaluationError(f"task {self.task!r}: scores of shape {self.scores_MSQ.shape}, expected {shape}")
        if shape[2] < 2:
            raise EvaluationError(f"task {self.task!r} has {shape[2]} questions; an interval needs at least 2")
        missing_MS = np.isnan(self.scores_MSQ).any(axis=2)
        for method, seed in zip(*np.nonzero(missing_MS != np.isnan(self.scores_MSQ).all(axis=2)), strict=True):
            cell = f"{self.methods[method]!r}, seed {self.seeds[seed]}"
            raise EvaluationError(f"task {self.task!r}: {cell} has answers to some questions only; score it again")
        found = self.scores_MSQ[~missing_MS]
        if found.size and not (found.min() >= 0 and found.max() <= 1):
            limits = f"{found.min():g} to {found.max():g}"
            raise EvaluationError(f"task {self.task!r}: scores go from {limits}; a question's score lies in 0 to 1")

    @classmethod
    def from_cells(
        cls,
        task: str,
        cells: Mapping[tuple[str, int], Mapping[str, float]],
        methods: Sequence[str],
        seeds: Sequence[int],
    ) -> Answers:
        """From {(method, seed): {question: score}}; cells of the matrix that failed are left out of it.

        Raises:
            EvaluationError: there is no cell, one is not of the matrix, or two answered different questions.
        """
        if not cells:
            raise EvaluationError(f"task {task!r}: no cell has answers; look at the logs of the failed cells")
        if foreign := [cell for cell in cells if cell[0] not in methods or cell[1] not in seeds]:
            raise EvaluationError(f"task {task!r}: {foreign[0][0]!r}, seed {foreign[0][1]} is no cell of the matrix")
        (first, answered), *rest = cells.items()
        for cell, scores in rest:
            if odd := sorted(scores.keys() ^ answered.keys()):
                raise EvaluationError(
                    f"task {task!r}: {first[0]!r} (seed {first[1]}) and {cell[0]!r} (seed {cell[1]}) answered "
                    f"different questions ({len(odd)} in one only, e.g. {odd[0]!r}); score both on the same data"
                )
        table = np.full((len(methods), len(seeds), len(answered)), np.nan)
        for (method, seed), scores in cells.items():
            table[list(methods).index(method), list(seeds).index(seed)] = [scores[q] for q in answered]
        return cls(task, tuple(methods), tuple(seeds), tuple(answered), table)

    def aligned(self, parent: Mapping[str, float]) -> np.ndarray:
        """The {question: score} of one checkpoint in the order of these questions, (Q,).

        Raises:
            EvaluationError: it answered other questions.
        """
        if odd := sorted(parent.keys() ^ set(self.questions)):
            raise EvaluationError(
                f"task {self.task!r}: the parent and the methods answered different questions ({len(odd)} in one only, "
                f"e.g. {odd[0]!r}); score both on the same data"
            )
        return np.array([parent[question] for question in self.questions], dtype=float)
