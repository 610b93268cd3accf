"""What the papers, or arithmetic, say about the partitions and the statistics that they use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llava_moe.moe import UPCYCLERS, MlpSpec
from llava_moe.moe.upcycling import DenseMlp, NeuronAccumulator, NeuronStatistics, collect_statistics
from llava_moe.moe.upcycling.partition import Partition
from llava_moe.moe.upcycling.partition_cluster import balanced_kmeans, balanced_labels
from llava_moe.moe.upcycling.partition_coactivation import balanced_graph_partition
from llava_moe.moe.upcycling.partition_gradient import greedy_assignment
from llava_moe.moe.upcycling.sharing_inter import most_wanted
from tests.moe.cases import make_router
from tests.moe.upcycling_cases import HIDDEN, NUM_EXPERTS, SPECS, WIDTH, DenseBlock, measure, upcycle
from tests.reference import oracles_upcycling as oracles

GATED = SPECS["gated"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def neurons_of(tensors: dict[str, Tensor], dense: DenseMlp, name: str = "down_proj") -> list[set[int]]:
    """Which neurons of the dense block each expert has, by its down columns (unscaled)."""
    column = {tuple(values): i for i, values in enumerate(dense.down.t().tolist())}
    return [{column[tuple(values)] for values in expert.t().tolist()} for expert in tensors[name]]


# Partitions (LLaMA-MoE)


@pytest.mark.parametrize("name", ["random", "cluster", "coactivation", "gradient"])
def test_partition_is_disjoint_complete_and_even(name: str) -> None:
    made = upcycle((f"partition_{name}", {}), SPECS["gated-bias"])
    dense = DenseMlp.read(made.dense, SPECS["gated-bias"])
    parts = neurons_of(made.tensors, dense)
    assert [len(part) for part in parts] == [WIDTH // NUM_EXPERTS] * NUM_EXPERTS
    assert sorted(i for part in parts for i in part) == list(range(WIDTH))
    for e, part in enumerate(parts):  # gate rows, up rows and biases belong to the same neurons
        first = {tuple(row) for row in made.tensors["gate_up_proj"][e].tolist()}
        assert first == {tuple(dense.first[row].tolist()) for i in part for row in (i, WIDTH + i)}
        wanted = {float(dense.first_bias[row]) for i in part for row in (i, WIDTH + i)}
        assert set(made.tensors["gate_up_bias"][e].tolist()) == wanted


def test_order_of_the_neurons_of_an_expert_does_not_matter() -> None:
    spec = SPECS["gated-bias"]
    dense, x = DenseMlp.read(DenseBlock(spec), spec), torch.randn(9, HIDDEN)
    shuffled = dense.take(torch.randperm(WIDTH), spec)
    torch.testing.assert_close(shuffled.output(x, spec), dense.output(x, spec), rtol=1e-5, atol=1e-6)


def test_gradients_of_the_parts_are_those_of_the_dense_block() -> None:
    made = upcycle(("partition_random", {}), GATED)
    x, target = torch.randn(20, HIDDEN), torch.randn(20, HIDDEN)
    (made.dense(x) - target).square().sum().backward()
    (made.sum_of_all(x) - target).square().sum().backward()
    parts = neurons_of(made.tensors, DenseMlp.read(made.dense, GATED))
    for e, part in enumerate(parts):
        columns = made.dense.down_proj.weight.grad[:, sorted(part)]
        torch.testing.assert_close(made.layer.experts.down_proj.grad[e], columns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "k", "ratio"), [(16, 4, 0.5), (16, 2, 1.414), (8, 2, 1.0)], ids=["4/16", "2/16", "2/8"]
)
def test_output_scales_on_random_weights(num_experts: int, k: int, ratio: float) -> None:
    """Norm ratios of n_over_k are the reference's; sqrt_nk keeps the norm; n keeps the projection."""
    spec = MlpSpec(64, 1024, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    block, x = DenseBlock(spec), torch.randn(200, 64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.1)
    dense, expected = DenseMlp.read(block, spec), block(x).detach()
    router = make_router(("top_k", {"k": k}), 64, num_experts)
    index = torch.stack([torch.randperm(num_experts)[:k] for _ in x])

    def scaled(name: str) -> Tensor:
        upcycler = UPCYCLERS.get("partition_random").build({"output_scale": name})
        tensors = upcycler(dense, spec, num_experts, torch.Generator().manual_seed(0), None, router)
        narrow = upcycler.expert_spec(spec, num_experts)
        stacked = zip(tensors["gate_up_proj"], tensors["down_proj"], strict=True)
        every = torch.stack([DenseMlp(first, down, None, None).output(x, narrow) for first, down in stacked], 1)
        return every.gather(1, index.unsqueeze(-1).expand(-1, -1, 64)).mean(1)

    def norm_ratio(y: Tensor) -> float:
        return float(y.norm() / expected.norm())

    assert norm_ratio(scaled("n_over_k")) == pytest.approx(ratio, rel=0.06)
    assert norm_ratio(scaled("sqrt_nk")) == pytest.approx(1.0, rel=0.06)
    assert norm_ratio(scaled("none")) == pytest.approx(ratio * k / num_experts, rel=0.06)
    projection = float((scaled("n") * expected).sum() / expected.square().sum())
    assert projection == pytest.approx(1.0, rel=0.1)


def test_scale_and_bias_are_folded_into_the_down_projection() -> None:
    """The bias is in every part: E of them with weight 1 / E and the factor E are the bias once."""
    spec = SPECS["plain-bias"]
    made = upcycle(("partition_random", {"output_scale": "n"}), spec)
    bias = made.dense.fc2.bias.detach()
    torch.testing.assert_close(made.tensors["down_bias"], bias.expand(NUM_EXPERTS, -1), rtol=1e-6, atol=0)
    plain = upcycle(("partition_random", {}), spec)
    bias = plain.dense.fc2.bias.detach()
    torch.testing.assert_close(plain.tensors["down_bias"], bias.expand(NUM_EXPERTS, -1) / 8, rtol=1e-6, atol=0)


def test_calibration_without_a_solution_is_refused() -> None:
    upcycler = UPCYCLERS.get("partition_random").build({"output_scale": "calibrate"})
    dense = DenseMlp.read(DenseBlock(GATED), GATED)
    router = make_router(("top_k", {}), HIDDEN, NUM_EXPERTS)
    nothing = NeuronStatistics(inputs_ND=torch.zeros(3, HIDDEN))
    with pytest.raises(ValueError, match="no factor on the routed experts"):
        upcycler(dense, GATED, NUM_EXPERTS, torch.Generator(), nothing, router)


def test_balanced_kmeans_finds_planted_clusters() -> None:
    planted = torch.arange(4).repeat(8)[torch.randperm(32)]
    for cosine in (False, True):
        points = nn.functional.normalize(torch.eye(4, 6)[planted] + 0.1 * torch.randn(32, 6), dim=-1)
        labels = balanced_kmeans(points, 4, torch.Generator().manual_seed(0), cosine, 500)
        assert len({(int(a), int(b)) for a, b in zip(planted, labels, strict=True)}) == 4


def test_balanced_labels_are_even_and_never_worse_than_before() -> None:
    cost = torch.rand(30, 5)
    labels = balanced_labels(cost)
    assert labels.bincount().tolist() == [6] * 5
    start = torch.arange(5).repeat(6)
    better = balanced_labels(cost, start)
    assert better.bincount().tolist() == [6] * 5

    def total(labels: Tensor) -> float:
        return float(cost.gather(1, labels.unsqueeze(1)).sum())

    assert total(better) < total(start)
    lower = cost.min(dim=1).values.sum()
    assert float(lower) <= total(labels) <= 1.5 * float(lower)


def test_balanced_labels_of_two_clusters_are_optimal() -> None:
    """With two clusters the exchange step is the whole problem: those with the largest difference move."""
    cost = torch.rand(12, 2)
    order = (cost[:, 0] - cost[:, 1]).argsort()
    best = cost[order[:6], 0].sum() + cost[order[6:], 1].sum()
    found = cost.gather(1, balanced_labels(cost, torch.arange(2).repeat(6)).unsqueeze(1)).sum()
    torch.testing.assert_close(found, best)


def test_clusters_use_the_rows_that_are_asked_for() -> None:
    """Gate and up rows with different planted clusters give different experts."""
    spec = MlpSpec(4, 16, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    gate, up = torch.arange(16) // 4, torch.arange(16) % 4
    first = torch.cat([torch.eye(4)[gate], torch.eye(4)[up]]) + 0.01 * torch.randn(32, 4)
    dense = DenseMlp(first, torch.randn(4, 16), None, None)
    for rows, planted in (("gate", gate), ("up", up)):
        upcycler = UPCYCLERS.get("partition_cluster").build({"rows": rows})
        parts = neurons_of(upcycler(dense, spec, 4, torch.Generator().manual_seed(0)), dense)
        wanted = [set((planted == c).nonzero().flatten().tolist()) for c in range(4)]
        assert sorted(parts, key=min) == sorted(wanted, key=min)


def test_graph_partition_finds_planted_blocks() -> None:
    planted = torch.arange(4).repeat(6)[torch.randperm(24)]
    graph = (planted[:, None] == planted[None, :]).float() + 0.3 * torch.rand(24, 24)
    labels = balanced_graph_partition(graph + graph.t(), 4, sweeps=10)
    assert len({(int(a), int(b)) for a, b in zip(planted, labels, strict=True)}) == 4


def test_exchanges_keep_parts_even_and_raise_the_weight_inside() -> None:
    """Against all partitions of small graphs: never above the best, and close to it."""
    shares = []
    for _ in range(10):
        graph = torch.rand(10, 10)
        graph = graph + graph.t()
        weights = []
        for sweeps in (0, 10):
            labels = balanced_graph_partition(graph, 2, sweeps)
            assert labels.bincount().tolist() == [5, 5]
            parts = [set((labels == part).nonzero().flatten().tolist()) for part in (0, 1)]
            weights.append(oracles.inside_weight(graph.tolist(), parts))
        best = oracles.best_halves(graph.tolist())
        assert weights[0] - 1e-6 <= weights[1] <= best + 1e-4
        shares.append(weights[1] / best)
    assert min(shares) > 0.95


def test_no_single_exchange_helps_in_the_end() -> None:
    """All pairs of neurons of three parts, also where edges are negative; parts larger than the first look at them."""
    for shift in (0.0, 0.5):
        graph = torch.rand(150, 150, dtype=torch.float64) - shift
        graph = (graph + graph.t()).fill_diagonal_(0)
        labels = balanced_graph_partition(graph, 3, sweeps=100)
        tie = graph @ torch.nn.functional.one_hot(labels, 3).double()
        own = tie.gather(1, labels.unsqueeze(1))
        pull = tie[:, labels] - own  # of each neuron to the part of each other one
        gain = pull + pull.t() - 2 * graph
        assert float(gain[labels.unsqueeze(1) != labels].max()) < 1e-6


def test_gradient_assignment_takes_the_largest_pairs() -> None:
    scores = torch.rand(4, 20)
    found = greedy_assignment(scores, 5)
    assert [set(row) for row in found.tolist()] == oracles.greedy_pairs(scores.tolist(), 5)
    taken = torch.zeros(20, dtype=torch.bool)
    taken[:8] = True
    found = greedy_assignment(scores, 3, taken)
    assert [set(row) for row in found.tolist()] == oracles.greedy_pairs(scores.tolist(), 3, set(range(8)))


def test_sharing_inner_takes_each_clusters_best_neurons() -> None:
    made = upcycle(("sharing_inner", {}), GATED)
    torch.manual_seed(0)
    again = upcycle(("sharing_inner", {}), GATED)
    statistics = measure(again.upcycler, again.dense, again.inputs)
    parts = neurons_of(made.tensors, DenseMlp.read(made.dense, GATED))
    wanted = statistics.require("importance_CF").topk(WIDTH // NUM_EXPERTS).indices.tolist()
    assert parts == [set(row) for row in wanted]
    assert sum(len(part) for part in parts) > len(set.union(*parts)), "these neurons overlap"


@pytest.mark.parametrize("sharing", [False, True])
def test_sharing_inter_divides_residual_and_routed(sharing: bool) -> None:
    made = upcycle(("sharing_inter", {"sharing": sharing}), SPECS["plain-bias"])
    dense = DenseMlp.read(made.dense, SPECS["plain-bias"])
    routed = neurons_of(made.tensors, dense)
    (residual,) = neurons_of(made.tensors, dense, "shared.down_proj")
    assert len(residual) == 2 * WIDTH // 10
    assert not residual & set.union(*routed)
    assert [len(part) for part in routed] == [WIDTH // 10] * NUM_EXPERTS
    assert (residual | set.union(*routed) == set(range(WIDTH))) == (not sharing)
    assert not made.tensors["down_bias"].any()
    assert torch.equal(made.tensors["shared.down_bias"][0], made.dense.fc2.bias)


def test_most_wanted_neurons_are_those_of_the_oracle() -> None:
    for seed in range(5):
        scores = torch.rand(6, 30, generator=torch.Generator().manual_seed(seed))
        scores[:, :4] += 0.5  # a few that everybody wants
        found = set(most_wanted(scores, 4, 6).nonzero().flatten().tolist())
        assert found == oracles.residual_set(scores.tolist(), 4, 6)
        assert len(found) == 6


# Statistics


def test_statistics_follow_their_formulas() -> None:
    hidden, gradient = torch.randn(2, 7, WIDTH), torch.randn(2, 7, WIDTH)
    clusters = torch.tensor([0, 1, 2, -1, 0, 1, 2])
    accumulator = NeuronAccumulator(GATED, num_clusters=3, clamp=0.8)
    for h, g in zip(hidden, gradient, strict=True):
        accumulator.update(h, g, clusters, torch.randn(7, HIDDEN))
    found = accumulator.result()
    wanted = torch.tensor(
        oracles.importance(*(t.reshape(14, WIDTH).tolist() for t in (hidden, gradient)), clusters.tolist() * 2, 3)
    )
    torch.testing.assert_close(found.importance_CF, wanted, rtol=1e-5, atol=1e-5)
    real = [h[clusters >= 0].tolist() for h in hidden]
    wanted = torch.tensor(oracles.coactivation(real, 0.8))
    torch.testing.assert_close(found.coactivation_FF, wanted, rtol=1e-5, atol=1e-5)
    assert found.inputs_ND.shape == (12, HIDDEN), "padding is no sample"


def test_sample_of_inputs_is_uniform_over_all_batches() -> None:
    accumulator = NeuronAccumulator(GATED, ["inputs_ND"], max_inputs=400, seed=1)
    for batch in range(4):
        accumulator.update(torch.zeros(500, WIDTH), x_TD=torch.full((500, HIDDEN), float(batch)))
    sample = accumulator.result().inputs_ND[:, 0]
    assert len(sample) == 400
    counts = sample.long().bincount(minlength=4)
    assert ((counts - 100).abs() < 40).all(), counts


@pytest.mark.parametrize("frozen", [False, True])
def test_hooks_see_every_block_and_leave_nothing_behind(frozen: bool) -> None:
    """Two blocks with a residual stream; the importances equal those of an autograd run by hand."""
    blocks = [DenseBlock(GATED), DenseBlock(SPECS["plain-bias"])]
    for block in blocks:
        block.requires_grad_(not frozen)

    def loss(x: Tensor) -> Tensor:
        for block in blocks:
            x = x + block(x)
        return x.square().sum()

    data = torch.randn(2, 3, 5, HIDDEN)  # two batches of three sequences
    accumulators = [NeuronAccumulator(block.spec, ["importance_CF", "inputs_ND"]) for block in blocks]
    watched = [(block, block.spec) for block in blocks]
    found = collect_statistics(watched, accumulators, data, loss)
    assert not any(module._forward_pre_hooks for block in blocks for module in block.modules())
    assert all(parameter.grad is None for block in blocks for parameter in block.parameters())
    rows, wanted = data.reshape(-1, HIDDEN), [torch.zeros(WIDTH), torch.zeros(WIDTH)]
    first, second = (DenseMlp.read(block, block.spec) for block in blocks)
    h0 = first.hidden(rows, GATED).requires_grad_()
    middle = rows + h0 @ first.down.t()
    h1 = second.hidden(middle, SPECS["plain-bias"])
    ((middle + h1 @ second.down.t() + second.down_bias).square().sum()).backward(inputs=[h0])
    wanted[0] = (h0 * h0.grad).abs().sum(0)
    torch.testing.assert_close(found[0].importance_CF[0], wanted[0].detach(), rtol=1e-4, atol=1e-5)
    h1 = h1.detach().requires_grad_()
    ((middle.detach() + h1 @ second.down.t() + second.down_bias).square().sum()).backward()
    torch.testing.assert_close(found[1].importance_CF[0], (h1 * h1.grad).abs().sum(0).detach(), rtol=1e-4, atol=1e-5)
    assert {tuple(row) for row in found[0].inputs_ND.tolist()} == {tuple(row) for row in rows.tolist()}


def test_statistics_refuse_what_does_not_fit() -> None:
    for options, message in [
        ({"collects": ["inputs"]}, r"collects=\['inputs'\]"),
        ({"num_clusters": 0}, "num_clusters=0"),
        ({"clamp": -1.0}, "clamp=-1.0 must be above 0"),
        ({"importance": "grad"}, "importance='grad' must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            NeuronAccumulator(GATED, **options)
    accumulator, h = NeuronAccumulator(GATED), torch.zeros(2, WIDTH)
    with pytest.raises(ValueError, match=r"h_TF has the shape \(2, 3\)"):
        accumulator.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="between -1 and 0"):
        accumulator.update(h, h, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="needs the gradient"):
        accumulator.update(h)
    with pytest.raises(ValueError, match="needs x_TD"):
        accumulator.update(h, h)
    block = DenseBlock(GATED)
    with pytest.raises(ValueError, match="does not depend on one of the blocks"):
        collect_statistics([(block, GATED)], [accumulator], [torch.zeros(2, HIDDEN)], _unrelated_loss(block))


def _unrelated_loss(block: DenseBlock) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        block(x)
        return torch.ones((), requires_grad=True) * 2

    return loss


def test_every_partition_is_a_partition() -> None:
    """The battery above would miss one that is registered under another prefix."""
    names = [name for name in UPCYCLERS.names() if issubclass(UPCYCLERS.get(name), Partition)]
    assert set(names) == {n for n in UPCYCLERS.names() if n.startswith(("partition_", "sharing_"))}
