"""Plain, DDP and ZeRO-0 to 3, with one rank and with two, compute the same run.

Every case trains on the same micro-batches; the judge is one process without DeepSpeed. With two ranks rank 0 has the
pictures and rank 1 text only, and of 16 experts for a handful of tokens some are hit on one rank and not on the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import load_recipe
from llava_moe.evaluation.run import evaluate
from tests.evaluation.fakes import write_records
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_moe, write_tiny_checkpoint
from tests.training.agreement import Case, Outcome, launch, run_here
from tests.training.runs import write_recipe

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # of losses and gradient norms in float32, relative
BF16_TOLERANCE = 3e-2
STEPS, NUM_EXPERTS, SCORED = 3, 16, "two-scored"
BACKENDS = {"ddp": None, **{f"zero{stage}": f"scripts/deepspeed/zero{stage}.json" for stage in range(4)}}
ZERO = tuple(name for name in BACKENDS if name != "ddp")
LATE = ("zero2", "zero3")  # those in which gradients or weights are split among ranks
RATES = {"vision_tower": 2e-3, "projector": 1e-2, "decoder": 1e-2, "embeddings": 1e-2}
EXPERTS = {"router": 1e-2, "experts": 1e-2}
BALANCE = {"losses": {"switch": 0.1, "z": 0.01}}
_RUN: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
}
_ADAM = {**_RUN, "adam_epsilon": 1e-4}  # see golden.py: rounding must not become a whole step
_SGD = {**_RUN, "max_steps": 1, "max_grad_norm": 0, "optim": "sgd", "lr_scheduler_type": "constant"}


class Cases:
    """The recipes of all runs, over one data file and one checkpoint of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_llava_json(folder / "data", 8, text_only_every=2)
        self.copies = write_llava_json(folder / "copies", 1)  # eight times the same record
        self.copies[0].write_text(json.dumps(json.loads(self.copies[0].read_text()) * 8))
        self.checkpoints = {
            "dense": write_tiny_checkpoint(folder / "dense"),
            "moe": write_tiny_checkpoint(folder / "moe", tiny_moe(num_experts=NUM_EXPERTS)),
        }

    def run(self, name: str, kind: str, backend: str, accumulation: int, /, **train: Any) -> Case:
        """Three steps of AdamW in which everything learns."""
        sections: dict[str, Any] = {
            "stage": {"learning_rates": RATES if kind == "dense" else {**RATES, **EXPERTS}, "weight_decay": 0.01},
            "balance": {} if kind == "dense" else BALANCE,
            "train": {**_ADAM, "gradient_accumulation_steps": accumulation, **train},
            "deepspeed": BACKENDS[backend],
        }
        return Case(name, str(write_recipe(self.folder / name, self.checkpoints[kind], self.data, **sections)))

    def gradient(self, name: str, backend: str, accumulation: int) -> Case:
        """One step of SGD with the rate 1 on the balance terms alone."""
        sections: dict[str, Any] = {
            "stage": {"learning_rates": dict.fromkeys((*RATES, *EXPERTS), 1.0)},
            "balance": BALANCE,
            "train": {**_SGD, "gradient_accumulation_steps": accumulation},
            "deepspeed": BACKENDS[backend],
        }
        recipe = write_recipe(self.folder / name, self.checkpoints["moe"], self.copies, **sections)
        return Case(name, str(recipe), balance_only=True)

    def scored(self, name: str, records: Path) -> Case:
        """A whole run on two ranks that is scored after its second and its last step."""
        recipe = write_recipe(
            self.folder / name,
            self.checkpoints["moe"],
            self.data,
            stage={"learning_rates": {**RATES, **EXPERTS}},
            train={**_RUN, "max_steps": 4},
            scoring={"data": str(records), "tasks": ["local_gqa", "local_pope"], "every": 2, "limit": 5},
            deepspeed=BACKENDS["zero2"],
        )
        return Case(name, str(recipe), whole=True)


Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("agreement"))


@pytest.fixture(scope="module")
def judges(cases: Cases) -> Outcomes:
    """One process without DeepSpeed, by kind and the number of micro-batches in a step."""
    wanted = (("dense", 1), ("dense", 2), ("moe", 2), ("moe", 4), ("moe", 8))
    alone = [cases.run(f"{kind}-{number}", kind, "ddp", number) for kind, number in wanted]
    alone.append(cases.gradient("gradient", "ddp", 1))
    return {case.name: run_here(load_recipe(case.recipe), case.balance_only) for case in alone}


@pytest.fixture(scope="module")
def one(cases: Cases) -> Outcomes:
    """One rank under DeepSpeed."""
    listed = [
        *(cases.run(f"one-dense-{zero}-1", "dense", zero, 1) for zero in ZERO),
        *(cases.run(f"one-moe-{zero}-4", "moe", zero, 4) for zero in ZERO),
        *(cases.gradient(f"one-gradient-{zero}-4", zero, 4) for zero in ZERO),
        *(cases.gradient(f"one-gradient-{zero}-1", zero, 1) for zero in LATE),
    ]
    return launch(1, cases.folder / "one", listed)


@pytest.fixture(scope="module")
def two(cases: Cases) -> Outcomes:
    """Two ranks."""
    both = [(backend, number) for backend in BACKENDS for number in (1, 4)]
    listed = [
        *(cases.run(f"two-dense-{backend}-1", "dense", backend, 1) for backend in BACKENDS),
        *(cases.run(f"two-moe-{backend}-{number}", "moe", backend, number) for backend, number in both),
        *(cases.gradient(f"two-gradient-{backend}-{number}", backend, number) for backend, number in both[2:]),
        *(cases.run(f"two-checkpointed-{zero}-1", "moe", zero, 1, activation_checkpointing=True) for zero in LATE),
        *(cases.run(f"two-bf16-{zero}-1", "moe", zero, 1, bf16=True) for zero in LATE),
        cases.scored(SCORED, write_records(cases.folder / "records")),
    ]
    return launch(2, cases.folder / "two", listed)


def assert_same_run(outcome: Outcome, judge: Outcome, tolerance: float = TOLERANCE) -> None:
    assert outcome.loss == pytest.approx(judge.loss, rel=tolerance)
    if outcome.grad_norm[0] is not None:
        assert outcome.grad_norm == pytest.approx(judge.grad_norm, rel=tolerance)
    assert outcome.applied.keys() == judge.applied.keys()
    for name, wanted in judge.applied.items():
        torch.testing.assert_close(
            outcome.applied[name], wanted, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(outcomes: Outcomes, judges: Outcomes, kind: str, start: str, num: int) -> None:
    """Holds the runs whose names start so, `num` of them, against one process with as many micro-batches in a step."""
    found = {name: outcome for name, outcome in outcomes.items() if name.startswith(start)}
    assert len(found) == num
    for name, outcome in found.items():
        micro_batches = int(name.rsplit("-", 1)[1]) * (2 if start.startswith("two") else 1)
        assert_same_run(outcome, judges[f"{kind}-{micro_batches}"])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_zero_with_one_rank_is_the_plain_run(kind: str, one: Outcomes, judges: Outcomes) -> None:
    check(one, judges, kind, f"one-{kind}-", len(ZERO))


@pytest.mark.parametrize(("kind", "num"), [("dense", len(BACKENDS)), ("moe", 2 * len(BACKENDS))])
def test_two_ranks_are_the_plain_run(kind: str, num: int, two: Outcomes, judges: Outcomes) -> None:
    check(two, judges, kind, f"two-{kind}-", num)


def test_experts_were_hit_on_one_rank_alone(two: Outcomes) -> None:
    """What the cases are there for; without it they would show less than they say."""
    for backend in BACKENDS:
        pictures, texts = two[f"two-moe-{backend}-1"].hits
        assert len(pictures) == len(texts) == STEPS
        pairs = [(set(one[site]), set(other[site])) for one, other in zip(pictures, texts, strict=True) for site in one]
        assert all(one - other for one, other in pairs)
        assert any(len(one | other) < NUM_EXPERTS for one, other in pairs)  # and some nowhere


def test_checkpointing_is_the_plain_run(two: Outcomes, judges: Outcomes) -> None:
    check(two, judges, "moe", "two-checkpointed-", len(LATE))


def test_bfloat16_is_near(two: Outcomes, judges: Outcomes) -> None:
    judge = judges["moe-2"]
    for zero in LATE:
        outcome = two[f"two-bf16-{zero}-1"]
        assert outcome.loss == pytest.approx(judge.loss, rel=BF16_TOLERANCE)
        assert outcome.loss != pytest.approx(judge.loss, rel=10 * TOLERANCE)  # it was bfloat16


def check_gradients(outcomes: Outcomes, wanted: dict[str, torch.Tensor], num: int) -> None:
    routers = [name for name in wanted if ".router." in name]
    assert routers
    assert all(wanted[name].abs().max() > 1e-4 for name in routers)
    cases = {name: outcome for name, outcome in outcomes.items() if "-gradient-" in name}
    assert len(cases) == num
    for case, outcome in cases.items():
        assert outcome.applied.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(
                outcome.applied[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=f"{case} {name}": f"{n}: {m}"
            )


def test_the_balance_gradient_of_one_rank_is_free_of_accumulation(one: Outcomes, judges: Outcomes) -> None:
    check_gradients(one, judges["gradient"].applied, len(ZERO) + len(LATE))


def test_the_balance_gradient_is_free_of_ranks_and_accumulation(two: Outcomes, judges: Outcomes) -> None:
    check_gradients(two, judges["gradient"].applied, 2 * len(ZERO))


@pytest.mark.usefixtures("two")
def test_two_ranks_score_as_the_saved_model_is_scored(cases: Cases, tmp_path: Path) -> None:
    out = cases.folder / SCORED / "out"
    results = evaluate(out / "model", cases.folder / "records", ["local_gqa", "local_pope"], tmp_path, limit=5)
    scored = json.loads((out / "scores" / "step-4" / "results.json").read_text())
    for name, task in results["tasks"].items():
        assert task["n"] == scored["tasks"][name]["n"] == 5
        assert scored["tasks"][name]["score"] == task["score"]
    answers = [
        [json.loads(line)["answer"] for line in (folder / "samples_local_gqa.jsonl").read_text().splitlines()]
        for folder in (tmp_path, out / "scores" / "step-4", out / "scores" / "step-2")
    ]
    assert answers[0] == answers[1] != answers[2]
