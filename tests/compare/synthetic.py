"""Everything a report shows, made up with known effects."""

from __future__ import annotations

import numpy as np

from llava_moe.compare.answers import Answers
from llava_moe.compare.report import Failure, MethodFacts, ReportInputs
from llava_moe.compare.stats import analyse
from tests.compare import simulate

NAMES = ("dense", "random", "top_k", "sigmoid_bias", "cosine", "remoe", "shared_expert", "noisy")
TRUE = (0.62, 0.60, 0.62, 0.69, 0.625, 0.62, 0.63, 0.55)
TASKS = (("gqa", 700), ("pope", 600), ("ai2d", 300))


def inputs() -> ReportInputs:
    """Eight methods, three seeds, three tasks; sigmoid_bias is better, noisy worse, and a cell of remoe failed."""
    rng = np.random.default_rng(0)
    answers = []
    for task, questions in TASKS:
        drawn = simulate.answers(rng, TRUE, 3, questions)
        drawn.scores_MSQ[NAMES.index("remoe"), 1] = np.nan
        answers.append(Answers(task, NAMES, drawn.seeds, drawn.questions, drawn.scores_MSQ))
    analysis = analyse(answers, "dense", "random")
    return ReportInputs(
        title="Routers on the quickstart's data",
        analysis=analysis,
        methods={name: facts(rng, index, analysis.overall.scores[name].by_seed) for index, name in enumerate(NAMES)},
        facts={"parent": "runs/quickstart/sft/model", "steps": "120", "machine": "2 CPU cores <simulated>"},
        failures=[Failure("remoe", 1, "train", "loss is nan at step 37\nTraceback: <lambda> & more")],
        notices=["Made-up answers: this page tests the report."],
    )


def facts(rng: np.random.Generator, index: int, by_seed: dict[int, float]) -> MethodFacts:
    name, sparse = NAMES[index], index > 0
    steps = range(1, 121, 2)
    return MethodFacts(
        about={"shared_expert": "top_k and one shared expert", "noisy": "noise on the logits"}.get(name, ""),
        parameters=40_000_000 if not sparse else 110_000_000,
        active_parameters=40_000_000 + 2_000_000 * sparse,
        unmatched=name == "shared_expert",
        flops_per_token=(0.08 + 0.01 * sparse + 0.01 * (name == "shared_expert")) * 1e9 + 1e4 * index,
        seconds_per_step=1.1 + 0.4 * sparse + 0.03 * index,
        peak_memory_gib=1.2 + 0.9 * sparse + 0.02 * index,
        max_violation=0.1 * index if sparse else None,
        entropy=0.98 - 0.06 * index if sparse else None,
        losses={
            seed: [(step, 0.5 + 2.5 * np.exp(-step / (20 + 3 * index)) + 0.05 * rng.normal()) for step in steps]
            for seed in by_seed
        },
        checkpoints={
            seed: [(step, score + 0.004 * rng.normal()) for step in (90, 100, 110, 120)]
            for seed, score in by_seed.items()
        },
        without_top={seed: (score, score - 0.03 * index) for seed, score in by_seed.items()} if sparse else {},
    )
