"""What the routing meter measures, against counts made token by token; and that it never makes the host wait."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_moe.config import RecipeError, TelemetrySection, load_recipe
from llava_moe.moe import ROUTERS, Routing, RoutingContext, RoutingScope, SiteKey
from llava_moe.moe.capacity import DROPPED
from llava_moe.training import runner, telemetry
from llava_moe.training.alarms import make_meter
from llava_moe.training.metrics import read_metrics
from llava_moe.training.telemetry import RoutingMeter
from tests.tiny import write_llava_json
from tests.training.runs import MOE_PARTS, losses, make_config

SECTIONS: dict[str, Any] = {"stage": {"learning_rates": MOE_PARTS}, "balance": {"losses": {"switch": 0.1}}}


def random_routing(num_tokens: int, num_experts: int, k: int, seed: int, empty: float = 0.2) -> Routing:
    """Softmax top-k, of whose slots a share is empty."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    probs = logits.softmax(-1)
    weight, index = probs.topk(k)
    off = torch.rand(num_tokens, k, generator=generator) < empty
    return Routing(logits, probs, index.masked_fill(off, num_experts), weight.masked_fill(off, 0.0))


def random_context(num_tokens: int, seed: int, part: str = "decoder") -> RoutingContext:
    """A third of the tokens is padding, and half of the rest stands for pictures."""
    generator = torch.Generator().manual_seed(seed)
    return RoutingContext(
        token_mask_T=torch.rand(num_tokens, generator=generator) > 0.33,
        sequence_T=torch.zeros(num_tokens, dtype=torch.int64),
        modality_T=(torch.rand(num_tokens, generator=generator) > 0.5).long() if part == "decoder" else None,
        part=part,
    )


def scope_of(contexts: dict[SiteKey, RoutingContext], routings: dict[SiteKey, Routing]) -> RoutingScope:
    scope = RoutingScope()
    for site, routing in routings.items():
        scope.record(site, routing, contexts[site])
    return scope


def by_hand(batches: list[tuple[Routing, RoutingContext]]) -> dict[str, Any]:
    """The row of one decoder layer, from loops over tokens and slots."""
    num_experts = batches[0][0].num_experts
    load, image_load = [0] * num_experts, [0] * num_experts
    tokens = images = slots = without = 0
    entropy = confidence = 0.0
    for routing, context in batches:
        for t in range(routing.num_tokens):
            if not context.token_mask_T[t]:
                continue
            is_image = context.modality_T is not None and bool(context.modality_T[t])
            tokens, images = tokens + 1, images + is_image
            used = [e for e in routing.index_TK[t].tolist() if e < num_experts]
            slots, without = slots + len(used), without + (not used)
            for expert in used:
                load[expert] += 1
                image_load[expert] += is_image
            shares = [p / sum(routing.probs_TE[t].tolist()) for p in routing.probs_TE[t].tolist()]
            entropy -= sum(p * math.log(p) for p in shares if p > 0)
            confidence += max(abs(w) for w in routing.weight_TK[t].tolist())
    share = [v / slots for v in load]
    mean = 1 / num_experts
    return {
        "load": share,
        "max_violation": max(share) / mean - 1,
        "load_cv": math.sqrt(sum((s - mean) ** 2 for s in share) / num_experts) / mean,
        "num_dead": sum(s < 0.1 * mean for s in share),
        "num_unused": sum(s == 0 for s in share),
        "experts_per_token": slots / tokens,
        "entropy": entropy / tokens,
        "entropy_share": entropy / tokens / math.log(num_experts),
        "confidence": confidence / tokens,
        "without_expert": without / tokens,
        "image_tokens": images / tokens,
        "image_share": [i / v if v else None for i, v in zip(image_load, load, strict=True)],
    }


def assert_row(row: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, abs=2e-5), key


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_the_numbers_are_those_of_a_count_token_by_token(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of 4 experts and one of 6, over micro-batches of unequal size; measured together or one by one."""
    monkeypatch.setattr(telemetry, "_CHUNK", chunk)
    meter, seen = RoutingMeter(), {}
    for number, num_tokens in enumerate((40, 57)):
        context = random_context(num_tokens, number)
        routings = {
            ("decoder", layer): random_routing(num_tokens, num_experts, 2, 10 * number + layer)
            for layer, num_experts in ((0, 4), (1, 6), (2, 4))
        }
        contexts = dict.fromkeys(routings, context)
        meter.update({}, routings, scope_of(contexts, routings))
        for site, routing in routings.items():
            seen.setdefault(site, []).append((routing, context))
    layers = meter.flush()["layers"]
    assert list(layers) == ["0", "1", "2"]
    for site, batches in seen.items():
        assert_row(layers[str(site[1])], by_hand(batches))
        assert layers[str(site[1])]["without_expert"] > 0
    assert "layers" not in meter.flush()


def test_dead_experts_are_named() -> None:
    """Of 1000 tokens expert 1 gets 20 (below a tenth of an even 250) and expert 3 none."""
    index = torch.tensor([0] * 490 + [1] * 20 + [2] * 490).unsqueeze(1)
    probs = torch.full((1000, 4), 0.25)
    site: SiteKey = ("decoder", 5)
    routings = {site: Routing(probs, probs, index, torch.ones(1000, 1))}
    scope = scope_of({site: RoutingContext.trivial(1000)}, routings)
    for dead_share, dead in ((0.1, [1, 3]), (0.05, [3]), (0.0, [])):
        meter = RoutingMeter(dead_share=dead_share)
        meter.update({}, routings, scope)
        row = meter.flush()["layers"]["5"]
        assert row["num_dead"] == len(dead)
        assert row.get("dead", []) == dead
        assert row.get("unused", []) == [e for e in dead if e == 3]
        assert "image_share" not in row  # nobody said which tokens are pictures
        assert "without_expert" not in row


def test_outside_the_decoder_all_tokens_are_of_pictures() -> None:
    site: SiteKey = ("vision", 3)
    routings = {site: random_routing(50, 4, 2, 0)}
    meter = RoutingMeter()
    meter.update({}, routings, scope_of({site: random_context(50, 0, "vision")}, routings))
    row = meter.flush()["layers"]["vision.3"]
    assert row["image_tokens"] == 1.0
    assert "image_share" not in row
    assert sum(row["load"]) == pytest.approx(1, abs=1e-4)


def test_images_can_be_left_out() -> None:
    site: SiteKey = ("decoder", 0)
    routings = {site: random_routing(50, 4, 2, 0)}
    rows = []
    for images in (True, False):
        meter = RoutingMeter(images=images)
        meter.update({}, routings, scope_of({site: random_context(50, 0)}, routings))
        rows.append(meter.flush()["layers"]["0"])
    assert {"image_tokens", "image_share"} == rows[0].keys() - rows[1].keys()
    assert rows[1].items() <= rows[0].items()


def test_gates_that_do_not_sum_to_one_are_divided_by_their_sum() -> None:
    """ReLU gates: one expert alone, two alike, and a token that uses none."""
    probs = torch.tensor([[3.0, 0.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    weight, index = probs.sort(dim=-1, descending=True)
    routing = Routing(probs, probs, index.masked_fill(weight <= 0, 3), weight)
    site: SiteKey = ("decoder", 0)
    meter = RoutingMeter()
    meter.update({}, {site: routing}, scope_of({site: RoutingContext.trivial(3)}, {site: routing}))
    row = meter.flush()["layers"]["0"]
    assert row["entropy"] == pytest.approx(math.log(2) / 3, abs=1e-5)
    assert row["experts_per_token"] == 1.0
    assert row["without_expert"] == pytest.approx(1 / 3, abs=1e-5)
    assert row["load"] == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-5)


def test_where_every_token_uses_every_expert_the_load_is_by_probability() -> None:
    context = random_context(60, 1)
    logits = torch.randn(60, 4)
    probs = (logits + torch.tensor([2.0, 0, 0, 0]) * context.modality_T.unsqueeze(1)).softmax(-1)
    weight, index = probs.sort(dim=-1, descending=True)
    site: SiteKey = ("decoder", 0)
    routing = Routing(logits, probs, index, weight)
    meter = RoutingMeter()
    meter.update({}, {site: routing}, scope_of({site: context}, {site: routing}))
    row = meter.flush()["layers"]["0"]
    real, images = context.token_mask_T, context.token_mask_T & context.modality_T.bool()
    assert row["load"] == pytest.approx(probs[real].mean(0).tolist(), abs=2e-5)
    assert row["image_share"] == pytest.approx((probs[images].sum(0) / probs[real].sum(0)).tolist(), abs=2e-5)
    assert row["max_violation"] > 0.2
    assert row["experts_per_token"] == 4


def test_expert_choice_leaves_tokens_out_and_is_even() -> None:
    torch.manual_seed(0)
    router = ROUTERS.get("expert_choice").build(8, 4, {"capacity_factor": 1.0})
    context = RoutingContext.trivial(64)
    routing = router(torch.randn(64, 8), context)
    site: SiteKey = ("vision", 0)
    meter = RoutingMeter()
    meter.update({}, {site: routing}, scope_of({site: context}, {site: routing}))
    row = meter.flush()["layers"]["vision.0"]
    used = (routing.index_TK < 4).any(-1)
    assert row["max_violation"] == 0
    assert row["without_expert"] == pytest.approx(1 - used.float().mean().item(), abs=1e-5)
    assert 0 < row["without_expert"] < 1


def test_dropped_slots() -> None:
    """Of the real tokens' 5 slots, 3 are filled: 2 were dropped, and those of padding do not count."""
    probs = torch.full((4, 2), 0.5)
    index = torch.tensor([[0], [1], [0], [2]])
    dropped = torch.tensor([0, 1, 1, 7])
    routing = Routing(probs, probs, index, torch.ones(4, 1), {DROPPED: dropped})
    context = RoutingContext(torch.tensor([True, True, True, False]), torch.zeros(4, dtype=torch.int64))
    site: SiteKey = ("decoder", 0)
    meter = RoutingMeter()
    meter.update({}, {site: routing}, scope_of({site: context}, {site: routing}))
    assert meter.flush()["layers"]["0"]["drop_rate"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(("every", "counted"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (9, [0])])
def test_every_nth_micro_batch_is_measured(every: int, counted: list[int]) -> None:
    """The first of an interval always; the parts of the objective are means over all."""
    site: SiteKey = ("decoder", 0)
    batches = [(random_routing(30, 4, 2, seed), random_context(30, seed)) for seed in range(4)]
    meter = RoutingMeter(every)
    for _ in range(2):  # the count begins anew with each interval
        for number, (routing, context) in enumerate(batches):
            scope = scope_of({site: context}, {site: routing})
            meter.update({"cross_entropy": torch.tensor(float(number))}, {site: routing}, scope)
        row = meter.flush()
        assert row["cross_entropy"] == 1.5
        assert_row(row["layers"]["0"], by_hand([batches[number] for number in counted]))


def test_ranks_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank has seen the same: shares and means stay, in one collective."""
    site: SiteKey = ("decoder", 0)
    routing, context = random_routing(30, 4, 2, 0), random_context(30, 0)
    rows, calls = [], []

    def all_reduce(tensor: torch.Tensor) -> None:
        calls.append(tensor.numel())
        tensor.mul_(2)

    for world in (1, 2):
        meter = RoutingMeter()
        parts = {"cross_entropy": torch.tensor(2.0), "switch": torch.tensor(1.5)}
        meter.update(parts, {site: routing}, scope_of({site: context}, {site: routing}))
        if world == 2:
            monkeypatch.setattr(telemetry.dist, "is_initialized", lambda: True)
            monkeypatch.setattr(telemetry.dist, "get_world_size", lambda: 2)
            monkeypatch.setattr(telemetry.dist, "all_reduce", all_reduce)
        rows.append(meter.flush())
    assert rows[0] == rows[1]
    assert len(calls) == 1


class _Waits(TorchDispatchMode):
    """Counts operations, and collects those for which the host waits for a GPU."""

    names = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if any(name in func.name() for name in self.names):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits_between_two_log_lines() -> None:
    routings: dict[SiteKey, Routing] = {("decoder", layer): random_routing(40, 4, 2, layer) for layer in range(3)}
    routings[("vision", 1)] = random_routing(16, 4, 4, 9)
    contexts = {site: random_context(r.num_tokens, 0, site[0]) for site, r in routings.items()}
    scope, meter = scope_of(contexts, routings), RoutingMeter()
    term = torch.ones((), requires_grad=True)
    with _Waits() as waits:
        for _ in range(3):
            meter.update({"switch": term}, routings, scope, {"switch": term})
    assert waits.found == []
    with _Waits() as waits:  # that the probe sees such operations at all
        float(term.detach() * 2)
    assert waits.found
    assert set(meter.flush()["layers"]) == {"0", "1", "2", "vision.1"}


def test_many_layers_cost_no_more_launches_than_one() -> None:
    """On a GPU a small layer costs what its launches cost, so layers of a kind are measured together."""
    counts = []
    for layers in (1, 24):
        routings: dict[SiteKey, Routing] = {("decoder", i): random_routing(40, 4, 2, i) for i in range(layers)}
        scope = scope_of(dict.fromkeys(routings, random_context(40, 0)), routings)
        with _Waits() as seen:
            RoutingMeter().update({}, routings, scope)
        counts.append(seen.count)
    assert counts[0] == counts[1] < 70


def test_balance_terms_without_a_gradient_are_named() -> None:
    meter = RoutingMeter()
    learns, stuck = torch.ones((), requires_grad=True), torch.ones(())
    meter.update({}, {}, RoutingScope(), {"switch": learns, "z": stuck})
    assert meter.flush() == {"without_gradient": ["z"]}
    assert meter.flush() == {}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every": -1}, r"telemetry\.every=-1 must be at least 0"),
        ({"dead_share": 1.0}, r"telemetry\.dead_share=1\.0 must be at least 0 and below 1"),
        ({"on_collapse": "halt"}, r"telemetry\.on_collapse='halt' must be warn or stop"),
        ({"on_collapse": "stop", "every": 0}, r"needs a routing that is measured"),
    ],
)
def test_refused_values(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_meter(TelemetrySection(**section))


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\nstage: {name: a, learning_rates: {}}\ntelemetry: {evry: 2}\n")
    with pytest.raises(RecipeError, match=r"unknown key telemetry\.evry; did you mean 'every'"):
        load_recipe(recipe)


def test_a_run_with_and_without_it_is_the_same(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4, text_only_every=2)
    found, rows = [], []
    for name, section in (("on", {"every": 1}), ("off", {"every": 0})):
        config = make_config(tmp_path / name, moe_checkpoint, data, **SECTIONS, telemetry=section)
        runner.train(config)
        found.append(losses(config.output_dir))
        rows.append(read_metrics(config.output_dir))
    assert found[0] == found[1]
    for on, off in zip(*rows, strict=True):
        assert set(on["layers"]) == {"0", "2"}
        for layer in on["layers"].values():
            assert 0 < layer["image_tokens"] < 1
            slots = sum(f * share for f, share in zip(layer["load"], layer["image_share"], strict=True) if share)
            assert slots == pytest.approx(layer["image_tokens"], abs=1e-3)
        assert "load" not in str(off.get("layers", ""))
        assert off["switch"] == on["switch"]
