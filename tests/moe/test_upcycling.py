"""Every registered upcycler is held to the contract that it declares, with real routers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from llava_moe.moe import ROUTERS as ALL_ROUTERS
from llava_moe.moe import UPCYCLERS, MlpSpec, MoELayer, Router, StackedExperts
from llava_moe.moe.upcycling import Contract, DenseMlp, NeuronStatistics
from llava_moe.moe.upcycling.base import stack
from tests.moe.cases import ROUTER_CASES, FullScope, case_id, make_layer, make_router
from tests.moe.cases import SPECS as FEW_EXPERTS
from tests.moe.upcycling_cases import CASES, HIDDEN, NUM_EXPERTS, ROUTERS, SPECS, Case, DenseBlock, measure, upcycle

every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_upcycler = pytest.mark.parametrize("name", UPCYCLERS.names())
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_registry_holds_the_known_upcyclers() -> None:
    partitions = {f"partition_{rule}" for rule in ("random", "cluster", "coactivation", "gradient")}
    others = {"copy", "noise", "drop", "virtual_group", "branch_train_mix", "from_scratch"}
    assert partitions | others | {"sharing_inner", "sharing_inter"} <= set(UPCYCLERS.names())
    assert UPCYCLERS.get("copy").contract is Contract.EXACT_ANY_ROUTER


# Every kind of block with two routers, every router with one kind of block.
PAIRS = [(spec, router) for spec in SPECS for router in (ROUTERS if spec == "gated-bias" else ROUTERS[:2])]


@every_case
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{case_id(pair[1])}")
def test_keeps_its_contract(case: Case, pair: tuple[str, Case]) -> None:
    spec, router = SPECS[pair[0]], pair[1]
    made = upcycle(case, spec, router)
    made.layer.eval()
    contract = made.upcycler.contract_with(made.router)
    x = torch.randn(30, HIDDEN, requires_grad=True)
    expected = made.dense(x)
    if contract is Contract.EXACT_ANY_ROUTER:
        found = made.layer(x)
        grown, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
        torch.testing.assert_close(grown, wanted, rtol=1e-4, atol=1e-5)
    elif contract is Contract.EXACT_UNIFORM_ROUTER:
        with torch.no_grad():  # nearly equal probabilities, but no ties that top-k would have to break
            for parameter in made.router.parameters():
                parameter *= 1e-4
        torch.testing.assert_close(made.layer(x), expected, rtol=0.01, atol=0.005)
        found = made.equal_weights(x)
    elif contract is Contract.EXACT_SUM_OF_ALL:
        found = made.sum_of_all(x)
    elif contract is Contract.NORM_PRESERVING:
        exactly = case[1]["output_scale"] == "calibrate"
        y = made.layer(made.inputs) if exactly else made.equal_weights(made.inputs)
        ratio = float(y.detach().norm() / made.dense(made.inputs).detach().norm())
        assert abs(ratio - 1) < 1e-4 if exactly else 0.5 < ratio < 2, ratio
        return
    else:
        whole = made.router.normalised and made.router.active_experts % 4 == 0
        homogeneous = case[1].get("scaling") == "cube_root" and spec.activation == "relu2" and whole
        off = float((made.layer(x) - expected).detach().norm() / expected.detach().norm())
        assert (off < 1e-4) if homogeneous else (off > 1e-3), "a contract of none is not kept by accident"
        return
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@every_upcycler
def test_class_declares_the_contract_of_its_default_options(name: str) -> None:
    upcycler = UPCYCLERS.get(name).build({})
    assert UPCYCLERS.get(name).contract is upcycler.contract
    assert UPCYCLERS.get(name).needs == upcycler.needs


@every_case
def test_needs_what_it_collects(case: Case) -> None:
    """A wrong flag would let a program skip the data, or read it for nothing."""
    upcycler = UPCYCLERS.get(case[0]).build(case[1])
    wanted = "nothing" if not upcycler.collects else "activations"
    assert upcycler.needs == ("gradients" if "importance_CF" in upcycler.collects else wanted)
    accumulator = upcycler.new_accumulator(SPECS["gated"], NUM_EXPERTS)
    assert accumulator.wants_gradients == (upcycler.needs == "gradients")
    block = DenseBlock(SPECS["gated"])
    statistics = measure(upcycler, block, torch.randn(20, HIDDEN))
    found = {name for name, value in dataclasses.asdict(statistics).items() if value is not None}
    assert found == set(upcycler.collects)


@every_case
@pytest.mark.parametrize("spec", [SPECS["gated-bias"], SPECS["plain"]], ids=["gated-bias", "plain"])
def test_tensors_fit_the_experts_and_keep_their_dtype(case: Case, spec: MlpSpec) -> None:
    """`upcycle` has loaded them strictly; here in bfloat16, as checkpoints are."""
    upcycler = UPCYCLERS.get(case[0]).build(case[1])
    blocks = [DenseBlock(spec) for _ in range(upcycler.num_parents(NUM_EXPERTS))]
    statistics = None if upcycler.needs == "nothing" else measure(upcycler, blocks[0], torch.randn(48, HIDDEN))
    dense = [DenseMlp.read(block.to(torch.bfloat16), spec) for block in blocks]
    router = make_router(ROUTERS[0], HIDDEN, NUM_EXPERTS)
    tensors = upcycler(dense if len(dense) > 1 else dense[0], spec, NUM_EXPERTS, torch.Generator(), statistics, router)
    wanted = StackedExperts(upcycler.expert_spec(spec, NUM_EXPERTS), NUM_EXPERTS).state_dict()
    width = upcycler.shared_width(spec, NUM_EXPERTS)
    if width is not None:
        shared = StackedExperts(spec.with_width(width), 1).state_dict()
        wanted |= {f"shared.{name}": tensor for name, tensor in shared.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in wanted.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("case", ROUTER_CASES, ids=case_id)
def test_copies_are_the_dense_block_times_the_sum_of_the_weights(case: Case) -> None:
    """Under every router; what a side branch or experts without computation add is another matter."""
    spec, layer = FEW_EXPERTS["gated-bias"], make_layer(case, "gated-bias").eval()
    block, x = DenseBlock(spec), torch.randn(3, 10, HIDDEN)
    upcycler = UPCYCLERS.get("copy").build({})
    promised = upcycler.contract_with(layer.router) is Contract.EXACT_ANY_ROUTER
    assert promised == layer.router.normalised
    if type(layer.experts) is not StackedExperts or layer.side is not None:
        assert set(layer.experts.kinds) != {"ffn"} or layer.side is not None
        return
    layer.experts.load_state_dict(upcycler(DenseMlp.read(block, spec), spec, 5, torch.Generator()))
    with layer.scope.recording() as routings:
        found = layer(x)
    total = routings[layer.site].gates_TE().sum(-1).reshape(3, 10, 1)
    torch.testing.assert_close(found, block(x) * total, rtol=1e-4, atol=1e-5)
    if promised:
        torch.testing.assert_close(found, block(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL_ROUTERS.names())
def test_virtual_groups_keep_their_promise_under_every_router_that_can_be_tied(name: str) -> None:
    upcycler = UPCYCLERS.get("virtual_group").build({"granularity": 2})
    router = make_router((name, {}), HIDDEN, NUM_EXPERTS).eval()
    if not _tied(router):
        assert name not in ("top_k", "scored", "sigmoid", "cosine", "deepseek_v3")
        return
    upcycler.prepare_router(router)
    contract = upcycler.contract_with(router)
    if name in ("top_k", "scored", "cosine", "dense"):
        assert contract is Contract.EXACT_ANY_ROUTER
    if contract is not Contract.EXACT_ANY_ROUTER:
        return
    spec, block, x = SPECS["gated-bias"], DenseBlock(SPECS["gated-bias"]), torch.randn(3, 10, HIDDEN)
    experts = StackedExperts(upcycler.expert_spec(spec, NUM_EXPERTS), NUM_EXPERTS)
    dense = DenseMlp.read(block, spec)
    experts.load_state_dict(upcycler(dense, spec, NUM_EXPERTS, torch.Generator(), None, router))
    layer = MoELayer(router, experts, scope=FullScope()).eval()
    layer.side = None  # what a side branch adds is another matter
    torch.testing.assert_close(layer(x), block(x), rtol=0, atol=1e-5)


def _tied(router: Router) -> bool:
    try:
        router.tie_rows(2)
    except ValueError as error:
        message = str(error)
    else:
        return True
    assert "tied" in message
    return False


@every_case
def test_is_repeatable_and_leaves_global_randomness_alone(case: Case) -> None:
    spec = SPECS["gated"]
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(upcycle(case, spec, seed=3).tensors)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    upcycler = UPCYCLERS.get(case[0]).build(case[1])
    blocks = [DenseBlock(spec) for _ in range(upcycler.num_parents(NUM_EXPERTS))]
    dense = [DenseMlp.read(block, spec) for block in blocks]
    statistics = measure(upcycler, blocks[0], torch.randn(48, HIDDEN))
    router = make_router(ROUTERS[0], HIDDEN, NUM_EXPERTS)
    state = torch.get_rng_state()
    upcycler(dense if len(dense) > 1 else dense[0], spec, NUM_EXPERTS, torch.Generator(), statistics, router)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["noise", "drop", "partition_random", "from_scratch"])
def test_the_seed_decides_what_is_drawn(name: str) -> None:
    dense = DenseMlp.read(DenseBlock(SPECS["gated"]), SPECS["gated"])
    upcycler = UPCYCLERS.get(name).build({})
    one, two = (
        upcycler(dense, SPECS["gated"], NUM_EXPERTS, torch.Generator().manual_seed(seed))["gate_up_proj"]
        for seed in (0, 1)
    )
    assert not torch.equal(one, two)


@every_case
def test_experts_own_their_memory(case: Case) -> None:
    """Training one expert must move neither another nor the dense block."""
    made = upcycle(case, SPECS["gated"])
    before = made.dense.down_proj.weight.clone()
    others = made.tensors["down_proj"][1:].clone()
    made.tensors["down_proj"][0] += 1
    assert torch.equal(made.dense.down_proj.weight, before)
    assert torch.equal(made.tensors["down_proj"][1:], others)


def test_reading_a_dense_block_puts_gate_rows_first() -> None:
    spec = SPECS["gated-bias"]
    block = DenseBlock(spec)
    dense = DenseMlp.read(block, spec)
    assert torch.equal(dense.first[: spec.intermediate], block.gate_proj.weight)
    assert torch.equal(dense.first[spec.intermediate :], block.up_proj.weight)
    assert torch.equal(dense.first_bias[: spec.intermediate], block.gate_proj.bias)
    assert torch.equal(dense.down, block.down_proj.weight)
    assert not any(t.requires_grad for t in dataclasses.astuple(dense))


@every_spec
def test_dense_weights_compute_what_the_module_computes(spec: MlpSpec) -> None:
    block, x = DenseBlock(spec), torch.randn(9, HIDDEN)
    torch.testing.assert_close(DenseMlp.read(block, spec).output(x, spec), block(x), rtol=1e-6, atol=1e-7)


def test_reading_something_else_than_a_linear_is_refused() -> None:
    block = DenseBlock(SPECS["gated"])
    block.up_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="up_proj is a Identity, not a Linear"):
        DenseMlp.read(block, SPECS["gated"])


def test_a_block_with_another_output_width_can_be_upcycled() -> None:
    """The second block of a projector maps D to O."""
    spec = dataclasses.replace(SPECS["gated-bias"], out=6)
    dense = DenseMlp.read(DenseBlock(spec), spec)
    x = torch.randn(7, HIDDEN)
    for name in ("copy", "partition_random"):
        upcycler = UPCYCLERS.get(name).build({})
        tensors = upcycler(dense, spec, NUM_EXPERTS, torch.Generator())
        assert tensors["down_proj"].shape[:2] == (NUM_EXPERTS, 6)
        narrow = upcycler.expert_spec(spec, NUM_EXPERTS)
        names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        experts = [DenseMlp(*(tensors[name][e] for name in names)) for e in range(NUM_EXPERTS)]
        total = torch.stack([expert.output(x, narrow) for expert in experts]).sum(0)
        expected = dense.output(x, spec) * (NUM_EXPERTS if name == "copy" else 1)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        again = stack(experts, NUM_EXPERTS, narrow)
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@every_upcycler
def test_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no option 'noize'"):
        UPCYCLERS.get(name).build({"noize": 0.1})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("noise", {"std": -0.1}), r"std=-0.1 must be at least 0"),
        (("noise", {"fraction": 1.5}), r"fraction=1.5 must be between 0 and 1"),
        (("drop", {"ratio": -0.5}), r"ratio=-0.5 must be between 0 and 1"),
        (("drop", {"indices": "share"}), r"unknown indices 'share'; did you mean 'shared'"),
        (("from_scratch", {"std": 0.0}), r"std=0.0 must be above 0"),
        (("virtual_group", {"granularity": 0}), r"granularity=0 must be at least 1"),
        (("virtual_group", {"scaling": "cube"}), r"unknown scaling 'cube'"),
        (("virtual_group", {"redraw": 2.0}), r"redraw=2.0 must be between 0 and 1"),
        (("partition_random", {"output_scale": "n_k"}), r"unknown output_scale 'n_k'"),
        (("partition_cluster", {"rows": "down"}), r"unknown rows 'down'"),
        (("partition_cluster", {"metric": "l1"}), r"unknown metric 'l1'"),
        (("partition_cluster", {"max_iter": 0}), r"max_iter=0 must be at least 1"),
        (("partition_coactivation", {"clamp": 0.0}), r"clamp=0.0 must be above 0"),
        (("partition_coactivation", {"sweeps": -1}), r"sweeps=-1 must be at least 0"),
        (("partition_gradient", {"importance": "grad"}), r"unknown importance 'grad'"),
        (("sharing_inter", {"num_residual": 0}), r"num_residual=0 must be at least 1"),
    ],
    ids=lambda value: case_id(value) if isinstance(value, tuple) else "",
)
def test_bad_values_are_refused_at_construction(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UPCYCLERS.get(case[0]).build(case[1])


def test_calls_that_do_not_fit_are_refused() -> None:
    spec, generator = SPECS["gated"], torch.Generator()
    dense = DenseMlp.read(DenseBlock(spec), spec)
    router = make_router(("top_k", {}), HIDDEN, 4)

    def call(case: Case, num_experts: int = NUM_EXPERTS, **kwargs: object) -> None:
        UPCYCLERS.get(case[0]).build(case[1])(dense, spec, num_experts, generator, **kwargs)

    with pytest.raises(ValueError, match="num_experts=0 must be at least 1"):
        call(("copy", {}), 0)
    with pytest.raises(ValueError, match="8 experts need 8 dense blocks, not 1"):
        call(("branch_train_mix", {}))
    with pytest.raises(ValueError, match="needs gradients"):
        call(("partition_gradient", {}))
    with pytest.raises(ValueError, match="needs the router"):
        call(("virtual_group", {}))
    with pytest.raises(ValueError, match="the router knows 4 experts, not 8"):
        call(("copy", {}), router=router)
    with pytest.raises(ValueError, match="40 neurons cannot be divided into 7 equal parts"):
        call(("partition_random", {}), 7)
    with pytest.raises(ValueError, match="granularity=8 must divide the number of experts, 4"):
        call(("virtual_group", {}), 4, router=router)
    with pytest.raises(ValueError, match="coactivation_FF is needed, but only"):
        call(("partition_coactivation", {}), statistics=NeuronStatistics(inputs_ND=torch.zeros(1, HIDDEN)))
    with pytest.raises(ValueError, match=r"importances have the shape \(1, 40\), not \(8, 40\)"):
        call(("partition_gradient", {}), statistics=NeuronStatistics(importance_CF=torch.zeros(1, 40)))
    with pytest.raises(ValueError, match=r"first has the shape \(80, 8\), but its spec asks for \(40, 8\)"):
        UPCYCLERS.get("copy").build({})(dense, SPECS["plain"], 4, generator)
    plain = DenseMlp.read(DenseBlock(SPECS["plain"]), SPECS["plain"])
    with pytest.raises(ValueError, match="rows='gate', but the dense block has no gate"):
        UPCYCLERS.get("partition_cluster").build({"rows": "gate"})(plain, SPECS["plain"], 4, generator)


@pytest.mark.parametrize("k", [1, 2])
def test_router_learns_nothing_from_the_task_at_an_exact_copy(k: int) -> None:
    """All experts agree there; with unequal experts and k = 2 the same loss does teach it."""
    made = upcycle(("copy", {}), SPECS["gated"], ("top_k", {"k": k}))
    layer, x, target = made.layer, torch.randn(40, HIDDEN), torch.randn(40, HIDDEN)
    F.mse_loss(layer(x), target).backward()
    assert float(layer.router.scorer.weight.grad.abs().max()) < 1e-7
    experts_gradient = layer.experts.down_proj.grad
    assert not torch.equal(experts_gradient[0], experts_gradient[1]), "routing alone breaks the symmetry of experts"
    with torch.no_grad():
        layer.experts.down_proj.add_(torch.randn_like(layer.experts.down_proj) * 0.1)
    layer.zero_grad()
    F.mse_loss(layer(x), target).backward()
    largest = float(layer.router.scorer.weight.grad.abs().max())
    assert (largest > 1e-5) if k == 2 else (largest < 1e-7)
