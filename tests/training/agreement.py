"""Many runs in one launch of ranks: plain, and under every stage of ZeRO, one after the other in the same processes.

Starting a process takes longer than a tiny run. `python -m torch.distributed.run ... -m tests.training.agreement OUT
CASES.json` trains each case of the list in every rank, and rank 0 writes what came out.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # isort: skip

from llava_moe.config import RunConfig, load_recipe
from llava_moe.moe import Routing, RoutingContext, SiteKey
from llava_moe.training import distributed, runner, trainer
from llava_moe.training.objective import combine
from llava_moe.training.trainer import LlavaMoeTrainer
from tests.training.runs import make_trainer, start_ranks, torchrun


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: of the case in the result.
        recipe: its file.
        balance_only: takes the cross-entropy out of the objective, so that the gradient is that of the balance terms.
        whole: runs `runner.train`, to the final checkpoint.
    """

    name: str
    recipe: str
    balance_only: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came out of a run.

    Attributes:
        loss, grad_norm: of every step; no grad_norm where the backend gives none.
        applied: for each parameter that learns what all steps together took off; with SGD, no decay and the rate 1 the
            gradient as the optimiser got it.
        hits: for each rank and each of its forwards the experts that tokens chose, by site.
    """

    loss: list[float]
    grad_norm: list[float | None]
    applied: dict[str, torch.Tensor]
    hits: list[list[dict[SiteKey, list[int]]]]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that learn, whole also under ZeRO-3; every rank must call it."""
    with distributed.gathered(model):
        return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def without_cross_entropy(active: bool) -> Iterator[None]:
    """Within it the objective is the balance terms alone."""
    scale = 0.0 if active else 1.0
    trainer.combine = lambda loss, *args, **kwargs: combine(loss * scale, *args, **kwargs)
    try:
        yield
    finally:
        trainer.combine = combine


def watch_hits(made: LlavaMoeTrainer) -> list[dict[SiteKey, list[int]]]:
    """Fills a list with the experts that the tokens of each forward chose."""
    scope, found = made.model.model.scope, list[dict[SiteKey, list[int]]]()
    record = scope.record

    def watched(site: SiteKey, routing: Routing, context: RoutingContext, keep: bool = False) -> None:
        if not found or site in found[-1]:
            found.append({})
        chosen = routing.index_TK[context.token_mask_T].unique().tolist()
        found[-1][site] = [expert for expert in chosen if expert < routing.probs_TE.shape[1]]
        record(site, routing, context, keep)

    scope.record = watched
    return found


def run_here(config: RunConfig, balance_only: bool = False) -> Outcome:
    """Trains in this process, which may be one of several ranks."""
    made = make_trainer(config)
    hits, before = watch_hits(made), weights(made.model)
    with without_cross_entropy(balance_only):
        made.train()
    after = weights(made.model)
    rows = [row for row in made.state.log_history if "loss" in row]
    everywhere = [hits]
    if dist.is_initialized():
        everywhere = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, hits)
    outcome = Outcome(
        [row["loss"] for row in rows],
        [row.get("grad_norm") for row in rows],
        {name: before[name] - after[name] for name in before},
        everywhere,
    )
    leave(made)
    return outcome


def leave(made: Any = None) -> None:
    """Lets go of an engine, and of what DeepSpeed, accelerate and transformers keep for the process."""
    engine = None if made is None else getattr(made.accelerator, "deepspeed_engine_wrapped", None)
    if engine is not None:
        engine.engine.destroy()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    gc.collect()


def launch(num_ranks: int, folder: Path, cases: list[Case], timeout: int = 240) -> dict[str, Outcome]:
    """Runs the cases in this many ranks; a case that runs to its checkpoint has no entry in the result."""
    folder.mkdir(parents=True, exist_ok=True)
    listed, out = folder / "cases.json", folder / "outcomes.pt"
    listed.write_text(json.dumps([asdict(case) for case in cases]))
    done = start_ranks(torchrun(num_ranks), ["tests.training.agreement", str(out), str(listed)], timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    found: dict[str, Outcome] = torch.load(out, weights_only=False)
    return found


def main(out: str, listed: str) -> None:
    """In every rank."""
    distributed.prepare(True)
    gc.freeze()  # accelerate collects garbage after each run, and all that was imported would be searched each time
    found = {}
    for raw in json.loads(Path(listed).read_text()):
        case = Case(**raw)
        config = load_recipe(case.recipe)
        if case.whole:
            runner.train(config)
            leave()
        else:
            found[case.name] = run_here(config, case.balance_only)
        if distributed.rank() == 0:
            print(f"done: {case.name}", flush=True)
    if distributed.rank() == 0:
        torch.save(found, out)
    distributed.finish()


if __name__ == "__main__":
    from tests.training import agreement  # the classes must be pickled by a name that the reader knows

    agreement.main(*sys.argv[1:])
