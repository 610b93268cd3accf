"""Expert kinds beside `stacked`: computation-free experts, LoRA on a frozen block, mixtures of vectors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe import EXPERTS, KERNELS, Experts, LayerPlan, MlpSpec, StackedExperts, build_layer
from llava_moe.moe.upcycling import DenseMlp
from tests.moe.cases import SPECS, random_slots
from tests.reference import oracles_special
from tests.reference.oracles import activation

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("special", {}),
    ("special", {"num_zero": 0, "num_copy": 2, "num_constant": 0}),
    ("special", {"num_zero": 2, "num_copy": 0, "num_constant": 1}),
    ("lora", {}),
    ("lora", {"rank": 3, "alpha": 5.0, "mix": "linear"}),
    ("mov", {}),
]
FROZEN = [case for case in KINDS if case[0] != "special"]
every_kind = pytest.mark.parametrize("case", KINDS, ids=str)
every_frozen = pytest.mark.parametrize("case", FROZEN, ids=str)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def make(case: tuple[str, dict[str, Any]], spec: MlpSpec, num_ffn: int = 3, random: bool = True) -> Experts:
    experts = EXPERTS.get(case[0]).build(spec, num_ffn, case[1])
    if random:
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_(std=0.3)
    return experts


def dense_block(spec: MlpSpec) -> tuple[nn.Module, DenseMlp]:
    """A random dense block and its weights."""
    names = [name for name in (spec.gate_name, spec.up_name) if name is not None]
    block = nn.Module()
    for name in names:
        setattr(block, name, nn.Linear(spec.hidden, spec.intermediate, bias=spec.bias))
    setattr(block, spec.down_name, nn.Linear(spec.intermediate, spec.output, bias=spec.bias))
    return block, DenseMlp.read(block, spec)


def run_dense(dense: DenseMlp, spec: MlpSpec, x: Tensor) -> Tensor:
    act = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda h: F.relu(h).square()}[spec.activation]
    hidden = F.linear(x, dense.first, dense.first_bias)
    if spec.gated:
        gate, up = hidden.chunk(2, dim=-1)
        return F.linear(act(gate) * up, dense.down, dense.down_bias)
    return F.linear(act(hidden), dense.down, dense.down_bias)


def arrays(experts: Experts) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in experts.state_dict().items()}


def normalised(weight: Tensor) -> Tensor:
    return weight / weight.sum(-1, keepdim=True)


@every_kind
@every_spec
def test_contract(case: tuple[str, dict[str, Any]], spec: MlpSpec) -> None:
    """Shape, dtype, empty slots, a gradient for all that learns and none for what is frozen, a state that travels."""
    experts = make(case, spec)
    x = torch.randn(30, spec.hidden, requires_grad=True)
    index, weight = random_slots(30, 3, experts.num_experts)
    y = experts(x, index, weight)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.requires_grad != name.startswith("base_")
        assert (parameter.grad is None) == name.startswith("base_")
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, name
    other = make(case, spec)
    other.load_state_dict(experts.state_dict())
    assert torch.equal(other(x, index, weight), y)
    order = torch.randperm(30)
    near = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, float(y.detach().abs().max()))}
    torch.testing.assert_close(experts(x[order], index[order], weight[order]), y[order], **near)
    slots = torch.stack([torch.randperm(3) for _ in range(30)])
    torch.testing.assert_close(experts(x, index.gather(1, slots), weight.gather(1, slots)), y, **near)
    padded = F.pad(index, (0, 2), value=experts.num_experts), F.pad(weight, (0, 2), value=7.0)
    torch.testing.assert_close(experts(x, *padded), y, **near)
    nothing = experts(x[:0], index[:0], weight[:0])
    assert nothing.shape == (0, spec.hidden)


@every_kind
def test_initial_values_come_from_the_generator(case: tuple[str, dict[str, Any]]) -> None:
    experts, states = make(case, SPECS["gated"], random=False), []
    for seed in (1, 1, 2):
        experts.reset_parameters(torch.Generator().manual_seed(seed))
        states.append({name: value.clone() for name, value in experts.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@every_kind
def test_bfloat16_and_autocast(case: tuple[str, dict[str, Any]]) -> None:
    experts, x = make(case, SPECS["gated-bias"]), torch.randn(20, 8)
    index, weight = random_slots(20, 2, experts.num_experts)
    expected = experts(x, index, weight).detach()
    scale = float(expected.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(x, index, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * scale)
    half = experts.to(torch.bfloat16)(x.bfloat16(), index, weight)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05 * scale)


@every_kind
def test_every_runs_one_expert_at_a_time(case: tuple[str, dict[str, Any]]) -> None:
    experts, x = make(case, SPECS["gated"]), torch.randn(6, 8)
    outputs = experts.every(x)
    for e in range(experts.num_experts):
        alone = experts(x, torch.full((6, 1), e), torch.ones(6, 1))
        torch.testing.assert_close(outputs[:, e], alone)


# Computation-free experts


@pytest.mark.parametrize("kernel", KERNELS.names())
def test_special_experts_do_what_their_names_say(kernel: str) -> None:
    experts = make(("special", {"kernel": kernel}), SPECS["gated-bias"])
    assert experts.kinds == ("ffn",) * 3 + ("zero", "copy", "constant", "constant")
    assert experts.num_experts == 7
    x = torch.randn(5, 8)
    outputs = experts.every(x)
    plain = StackedExperts.build(SPECS["gated-bias"], 3, {})
    plain.load_state_dict({n: v for n, v in experts.state_dict().items() if not n.startswith("constant_")})
    torch.testing.assert_close(outputs[:, :3], plain.every(x))
    assert torch.equal(outputs[:, 3], torch.zeros(5, 8))
    assert torch.equal(outputs[:, 4], x)
    for c in (0, 1):
        alpha = (x @ experts.constant_mix[c].t()).softmax(-1)
        expected = alpha[:, :1] * x + alpha[:, 1:] * experts.constant_value[c]
        torch.testing.assert_close(outputs[:, 5 + c], expected)
    index, weight = random_slots(5, 4, 7)
    mixed = (outputs[torch.arange(5).unsqueeze(1), index] * weight.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(experts(x, index, weight), mixed)


def test_constant_without_value_and_with_all_of_x_is_a_copy() -> None:
    experts, x = make(("special", {"num_constant": 1}), SPECS["gated"]), torch.rand(4, 8) + 0.1
    with torch.no_grad():
        experts.constant_value.zero_()
        experts.constant_mix[0, 0], experts.constant_mix[0, 1] = 1e3, -1e3
    outputs = experts.every(x)
    torch.testing.assert_close(outputs[:, 5], outputs[:, 4])


def test_special_experts_cost_the_kernel_nothing() -> None:
    experts, seen = make(("special", {}), SPECS["gated"]), []
    inner = experts.kernel

    def spy(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: Any) -> Tensor:
        seen.append(index_TK)
        return inner(x_TD, index_TK, weight_TK, weights)

    experts.kernel = spy
    index = torch.tensor([[0, 3], [4, 5], [6, 2], [7, 1]])  # 7 is empty, 3 and above are special
    experts(torch.randn(4, 8), index, torch.ones(4, 2))
    assert seen[0].tolist() == [[0, 3], [3, 3], [3, 2], [3, 1]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_zero": -1}, "must not be negative"),
        ({"num_zero": 0, "num_copy": 0, "num_constant": 0}, "use the experts 'stacked'"),
        ({"constant_std": -0.1}, "constant_std=-0.1"),
        ({"kernel": "lop"}, "did you mean 'loop'"),
    ],
)
def test_special_options_are_checked(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EXPERTS.get("special").build(SPECS["gated"], 2, args)


def test_special_experts_need_an_output_as_wide_as_the_input() -> None:
    with pytest.raises(ValueError, match="the output must be as wide: 8, not 6"):
        EXPERTS.get("special").build(dataclasses.replace(SPECS["gated"], out=6), 2, {})


def test_special_layer_takes_upcycled_weights_and_its_router() -> None:
    layer = build_layer(LayerPlan(3, router="moe_plus_plus", experts="special"), SPECS["gated"])
    assert layer.router.num_experts == 7
    layer.train()(torch.randn(2, 4, 8)).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# LoRA and mixtures of vectors: experts on a frozen block


@every_frozen
@every_spec
def test_start_point_is_the_dense_block(case: tuple[str, dict[str, Any]], spec: MlpSpec) -> None:
    """B = 0, or vectors of ones: exact for every routing whose weights sum to 1."""
    _, dense = dense_block(spec)
    experts = make(case, spec, random=False)
    experts.load_state_dict(experts.from_dense(dense))
    x = torch.randn(9, spec.hidden)
    for k in (1, 2, 3):
        index, weight = random_slots(9, k, 3)
        torch.testing.assert_close(experts(x, index, normalised(weight)), run_dense(dense, spec, x), rtol=0, atol=1e-5)


@every_frozen
@every_spec
def test_frozen_kinds_equal_their_oracle(case: tuple[str, dict[str, Any]], spec: MlpSpec) -> None:
    experts = make(case, spec)
    index, weight = random_slots(6, 2, 3, empty=True)
    weight = weight - 0.4  # signs too
    x = torch.randn(6, spec.hidden)
    y = experts(x, index, weight).detach().double().numpy()
    state, act = arrays(experts), activation(spec.activation)
    for t in range(6):
        token = x[t].double().numpy()
        slots = [(e, w) for e, w in zip(index[t].tolist(), weight[t].tolist(), strict=True) if e < 3]
        gates = [sum(w for e, w in slots if e == expert) for expert in range(3)]
        if case[0] == "mov":
            expected = oracles_special.vector_mixture(state, gates, token, act, spec.gated)
        elif experts.config.mix == "linear":
            expected = oracles_special.lora_mixture(state, gates, token, act, spec.gated, experts.scale)
        else:
            expected = np.zeros(spec.hidden)
            for e, w in slots:
                expected = expected + w * oracles_special.lora_expert(state, e, token, act, spec.gated, experts.scale)
        np.testing.assert_allclose(y[t], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mix", ["expert", "linear"])
def test_one_lora_expert_is_ordinary_lora(mix: str) -> None:
    spec = SPECS["gated-bias"]
    experts, x = make(("lora", {"mix": mix, "rank": 2, "alpha": 6.0}), spec, num_ffn=1), torch.randn(7, 8)
    state = experts.state_dict()

    def merged(name: str) -> Tensor:
        return state[f"base_{name}_proj"] + 3.0 * state[f"lora_{name}_b"][0] @ state[f"lora_{name}_a"][0]

    dense = DenseMlp(
        torch.cat([merged("gate"), merged("up")]),
        merged("down"),
        torch.cat([state["base_gate_bias"], state["base_up_bias"]]),
        state["base_down_bias"],
    )
    found = experts(x, torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1))
    torch.testing.assert_close(found, run_dense(dense, spec, x), rtol=1e-4, atol=1e-4)


def test_lora_initial_values() -> None:
    experts = EXPERTS.get("lora").build(SPECS["gated"], 4, {"rank": 6})
    for name, inputs in (("gate", 8), ("up", 8), ("down", 12)):
        assert (experts.get_parameter(f"lora_{name}_b") == 0).all()
        a = experts.get_parameter(f"lora_{name}_a")
        assert 0.8 * inputs**-0.5 < a.abs().max().item() <= inputs**-0.5
        assert a.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.2)


def test_lora_dropout_acts_in_training_only() -> None:
    experts = make(("lora", {"dropout": 0.5}), SPECS["gated"])
    x, (index, weight) = torch.randn(9, 8), random_slots(9, 2, 3)
    evaluated = experts.eval()(x, index, weight)
    assert torch.equal(evaluated, experts(x, index, weight))
    trained = experts.train()(x, index, weight)
    assert not torch.allclose(trained, evaluated)
    draws = torch.stack([experts(x, index, weight).detach() for _ in range(3)])
    assert not torch.allclose(draws[0], draws[1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"mix": "linaer"}, "unknown mix 'linaer'; did you mean 'linear'"),
    ],
)
def test_lora_options_are_checked(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EXPERTS.get("lora").build(SPECS["gated"], 2, args)


def test_one_vector_is_ordinary_ia3() -> None:
    spec = SPECS["plain-bias"]
    _, dense = dense_block(spec)
    experts = make(("mov", {}), spec, num_ffn=1, random=False)
    experts.load_state_dict(experts.from_dense(dense))
    with torch.no_grad():
        experts.vectors.normal_()
    x = torch.randn(5, 8)
    scaled = dataclasses.replace(dense, down=dense.down * experts.vectors.detach())
    found = experts(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    torch.testing.assert_close(found, run_dense(scaled, spec, x))


@every_frozen
def test_a_block_of_another_shape_is_refused(case: tuple[str, dict[str, Any]]) -> None:
    _, dense = dense_block(SPECS["plain-bias"])
    with pytest.raises(ValueError, match=r"the dense block has .* the experts' spec wants"):
        make(case, SPECS["plain"]).from_dense(dense)
    with pytest.raises(ValueError, match="activation 'silo'; did you mean 'silu'"):
        make(case, dataclasses.replace(SPECS["gated"], activation="silo"))


@every_frozen
def test_the_block_stays_frozen_when_all_is_unfrozen(case: tuple[str, dict[str, Any]]) -> None:
    """Loading a checkpoint makes new parameters, which ask for gradients."""
    experts = make(case, SPECS["gated-bias"]).requires_grad_(True)
    experts(torch.randn(9, 8), *random_slots(9, 2, 3)).square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert (parameter.grad is None) == name.startswith("base_"), name


@every_frozen
@pytest.mark.parametrize("router", ["top_k", "dense"])
def test_layers_on_a_frozen_block_train_the_small_part_only(case: tuple[str, dict[str, Any]], router: str) -> None:
    spec = SPECS["gated"]
    _, dense = dense_block(spec)
    layer = build_layer(LayerPlan(3, router=router, experts=case[0], experts_args=case[1]), spec).train()
    layer.experts.load_state_dict(layer.experts.from_dense(dense))
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(layer(x), run_dense(dense, spec, x), rtol=0, atol=1e-5)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):  # the first step moves B alone, and only then the router matters
        optimiser.zero_grad()
        layer(x).square().sum().backward()
        optimiser.step()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("experts.base_"), name


def test_output_of_another_width() -> None:
    """As in a projector, whose block leads from one width to another."""
    spec = dataclasses.replace(SPECS["plain-bias"], out=5)
    for case in FROZEN:
        experts = make(case, spec)
        index, weight = random_slots(4, 2, 3)
        assert experts(torch.randn(4, 8), index, weight).shape == (4, 5)
