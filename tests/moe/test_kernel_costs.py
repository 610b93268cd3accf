"""What kernels must not do: read memory that nobody wrote, compute empty slots or frozen weights, keep much."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_moe.moe import KERNELS, MlpSpec, StackedExperts
from llava_moe.moe.kernels import whole as whole_module
from llava_moe.moe.kernels.grouped import run_sorted
from llava_moe.moe.kernels.slots import sort_slots
from tests.moe.cases import NUM_EXPERTS, SPECS, expert_weights, make_experts, random_slots
from tests.moe.test_kernels import KERNEL_CASES, compare, every_kernel, fields_of, run

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, wherever torch takes it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("_poisoned_memory")
@every_kernel
@pytest.mark.parametrize("spec", ["gated-bias", "plain"])
@pytest.mark.parametrize("chosen", [[[0, 1], [5, 3], [5, 5]], [[5, 5], [5, 5]], [[1, 1], [5, 1]]])
def test_unwritten_memory_is_never_read(
    kernel: str, spec: str, chosen: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.empty(3).isnan().all()
    plain = whole_module.grouped_mm

    def poisoned(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        result = plain(a, b, offs=offs)
        if result.ndim == 2:
            result[int(offs[-1]) :] = float("nan")
        return result

    monkeypatch.setattr(whole_module, "grouped_mm", poisoned)
    weights, index = expert_weights(make_experts(SPECS[spec])), torch.tensor(chosen)
    x, weight = torch.randn(len(chosen), 8), torch.randn(index.shape)
    compare(run(kernel, x, index, weight, weights), run("loop", x, index, weight, weights))


class Products(TorchDispatchMode):
    """Multiplications in the matrix products, on the rows that a grouped product really visits."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            if name == "_grouped_mm":
                visited = int((kwargs.get("offs") if kwargs and "offs" in kwargs else args[2])[-1])
                self.total += visited * (left.shape[0 if right.ndim == 2 else 1]) * right.shape[-1]
            else:
                self.total += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def count(kernel: str, index: Tensor, frozen: tuple[str, ...] = (), spec: str = "gated") -> int:
    weights = expert_weights(make_experts(SPECS[spec]))
    with Products() as products:
        run(kernel, torch.randn(index.shape[0], 8), index, torch.rand(index.shape), weights, frozen)
    return products.total


@pytest.mark.parametrize("kernel", ["loop", "blocks", "whole"])
def test_empty_slots_cost_no_products(kernel: str) -> None:
    index, _ = random_slots(20, 2)
    padded = torch.cat([torch.full((20, 6), NUM_EXPERTS), index], dim=1)
    assert count(kernel, padded) == count(kernel, index) > 0
    assert count(kernel, index) == 3 * index.numel() * 3 * 8 * 12  # no more than forward, and twice that in backward


@pytest.mark.parametrize("kernel", ["loop", "blocks", "whole", "batched"])
def test_what_is_frozen_costs_no_products(kernel: str) -> None:
    index = torch.arange(20).remainder(NUM_EXPERTS).unsqueeze(1)  # even loads: nothing is padded
    one = index.numel() * 8 * 12
    everything = ("x", "weight", "first_EFD", "down_EDF")
    cost = {name: count(kernel, index, tuple(n for n in everything if n != name)) // one for name in everything}
    # By the combine weights: the sorted kernels do one product in place of keeping the output of the experts.
    by_weight = 3 + (kernel in ("blocks", "whole"))
    assert cost == {"x": 3 + 3, "weight": by_weight, "first_EFD": 3 + 3, "down_EDF": 3 + 1}
    assert count(kernel, index, ("first_EFD", "down_EDF")) == (3 + 3) * one  # frozen experts, a router that learns


def test_padding_is_bounded_however_lopsided_the_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[torch.Size, torch.Size]] = []
    plain = torch.bmm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        sizes.append((a.shape, b.shape))
        return plain(a, b)

    monkeypatch.setattr(torch, "bmm", spy)
    weights = expert_weights(make_experts(SPECS["gated"], num_experts=40))
    skewed = torch.cat([torch.zeros(300, dtype=torch.int64), torch.arange(1, 40)]).unsqueeze(1)
    for index in (skewed, torch.zeros_like(skewed), torch.arange(300).unsqueeze(1) // 20, torch.zeros_like(skewed[:1])):
        sizes.clear()
        KERNELS.get("batched")(torch.randn(index.shape[0], 8), index, torch.ones(index.shape), weights)
        for rows, stack in sizes:
            assert rows[0] * rows[1] <= 3 * index.numel() + 40
            assert stack[0] <= 60


@pytest.mark.parametrize("spec", ["gated", "plain-bias"])
def test_the_body_for_gpus_asks_the_device_nothing(spec: str) -> None:
    """Fake tensors have shapes and no values: a host read fails, as it does for the bodies that need one."""
    wide = dataclasses.replace(SPECS[spec], hidden=16, intermediate=24)
    real = expert_weights(make_experts(wide).bfloat16())
    index, weight = random_slots(20, 2, empty=True)
    detached = {name: t.detach() for name, t in fields_of(real).items()}
    fake = FakeTensorMode()
    named = {name: fake.from_tensor(t).requires_grad_() for name, t in detached.items()}
    x, index, weight = (fake.from_tensor(t) for t in (torch.randn(20, 16).bfloat16(), index, weight))
    weights = dataclasses.replace(real, **named)
    with fake:
        run_sorted(x.requires_grad_(), index, weight, weights, "whole").sum().backward()
        assert x.grad.shape == x.shape
        assert all(t.grad.shape == t.shape for t in named.values())
        for kernel in ("blocks", "batched"):
            with pytest.raises(DataDependentOutputException):
                KERNEL_CASES[kernel](x, index, weight, weights)


class Largest(TorchDispatchMode):
    """Numbers in the largest memory that an operation asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_inference_holds_the_hidden_states_of_one_expert_at_a_time() -> None:
    weights, x = expert_weights(make_experts(SPECS["gated"])), torch.randn(200, 8)
    index = torch.arange(400).remainder(NUM_EXPERTS).reshape(200, 2)
    with torch.no_grad(), Largest() as largest:
        run_sorted(x, index, torch.rand(200, 2), weights, "blocks")
    assert largest.numel == max(200 * 8, 80 * 24)


def saved_bytes(output_of: Any, own: list[Tensor]) -> int:
    """Bytes that wait for the backward, inputs and parameters left out."""
    inputs = {t.untyped_storage().data_ptr() for t in own}
    found: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        if t.untyped_storage().data_ptr() not in inputs:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output_of()
    return sum(found.values())


@pytest.mark.parametrize("kernel", ["blocks", "whole"])
@pytest.mark.parametrize("num_experts", [8, 32])
def test_little_is_kept_for_the_backward(kernel: str, num_experts: int) -> None:
    """At most 0.6 of a dense block of as much work, and no more for finer experts."""
    k, width = num_experts // 4, 384 // (num_experts // 4)
    spec = MlpSpec(64, width, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    weights = expert_weights(make_experts(spec, num_experts=num_experts))
    x = torch.randn(256, 64, requires_grad=True)
    index, weight = random_slots(256, k, num_experts)
    up, gate, down = (nn.Parameter(torch.randn(shape)) for shape in ((384, 64), (384, 64), (64, 384)))

    def dense() -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    sparse = saved_bytes(
        lambda: KERNEL_CASES[kernel](x, index, weight, weights), [x, weight, *fields_of(weights).values()]
    )
    assert 0 < sparse <= 0.6 * saved_bytes(dense, [x, up, gate, down])


def test_gradients_that_a_gpu_does_not_write_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """On newer GPUs the product over the rows of an expert without rows holds anything; played here on a CPU."""
    plain = whole_module.grouped_mm

    class OnGpu(Tensor):
        device = torch.device("cuda")

    def unwritten(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        result = plain(a, b, offs=offs)
        result[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return result.as_subclass(OnGpu)

    monkeypatch.setattr(whole_module, "grouped_mm", unwritten)
    slots = sort_slots(torch.tensor([[0, 2], [2, 4]]), NUM_EXPERTS)
    left, right = torch.randn(4, 4), torch.randn(4, 8)
    for writes, expected in ((True, True), (False, False)):
        monkeypatch.setattr(whole_module, "_zeroes_empty_groups", lambda device, answer=writes: answer)
        found = whole_module._by_expert(left, right, slots).as_subclass(Tensor)
        assert bool(found[[1, 3]].isnan().all()) == expected
        assert expected or (found[[1, 3]] == 0).all()
        assert torch.isfinite(found[[0, 2, 4]]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", ["gated", "gated-bias"])
def test_on_a_gpu_the_host_does_not_wait(spec: str) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("torch has no fused grouped_mm for this GPU and reads the offsets back")
    shape = dataclasses.replace(SPECS[spec], hidden=64, intermediate=96)
    experts = make_experts(shape, kernel="grouped").to("cuda", torch.bfloat16)
    index, weight = (t.cuda() for t in random_slots(100, 2, empty=True))
    x = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    experts(x, index, weight).sum().backward()  # the first call may synchronise to load kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(x, index, weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x.grad).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", KERNELS.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_numbers_are_the_same(kernel: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(SPECS["gated-bias"], hidden=64, intermediate=96)
    experts = make_experts(spec, num_experts=8)
    index, weight = random_slots(200, 2, 6, empty=True)  # two experts without tokens
    index = torch.where(index == 6, 8, index)
    x = torch.randn(200, 64)
    expected = run("loop", x, index, weight, expert_weights(experts))
    there = expert_weights(experts.to("cuda", dtype))
    found = run(kernel, x.to("cuda", dtype), index.cuda(), weight.cuda(), there)
    again = run(kernel, x.to("cuda", dtype), index.cuda(), weight.cuda(), there)
    for name in expected:
        scale, share = float(expected[name].abs().max()), 0.05 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(found[name].float().cpu(), expected[name], rtol=share, atol=share * scale)
        assert kernel != "grouped" or torch.equal(found[name], again[name])


@pytest.mark.slow
def test_the_default_is_not_far_from_a_dense_block() -> None:
    """64 experts, 8 of a token, one thread: the median of paired rounds. The bound leaves room for a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = MlpSpec(256, 64, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    experts = StackedExperts.build(spec, 64, {})
    block = nn.ModuleDict(
        {n: nn.Linear(i, o, bias=False) for n, i, o in (("g", 256, 512), ("u", 256, 512), ("d", 512, 256))}
    )
    x = torch.randn(4096, 256, requires_grad=True)
    weight, index = torch.randn(4096, 64).softmax(-1).topk(8)

    def seconds(output_of: Any) -> float:
        start = time.process_time()
        output_of().sum().backward()
        return time.process_time() - start

    try:
        ratios = []
        for _ in range(8):
            dense = seconds(lambda: block["d"](F.silu(block["g"](x)) * block["u"](x)))
            ratios.append(seconds(lambda: experts(x, index, weight)) / dense)
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(ratios[1:]) < 2.0
