"""What the upcycling tests run over: dense blocks, every registered upcycler with its options, and real routers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from llava_moe.moe import UPCYCLERS, MlpSpec, MoELayer, Router, SharedExperts, StackedExperts, Upcycler
from llava_moe.moe.experts import ACTIVATIONS
from llava_moe.moe.upcycling import DenseMlp, NeuronStatistics, collect_statistics, split_shared
from tests.moe.cases import make_router

# The width can be divided by 8 experts, and by 8 experts with 2 residual ones.
HIDDEN, WIDTH, NUM_EXPERTS = 8, 40, 8
SPECS = {
    "gated": MlpSpec(8, 40, "silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "gated-bias": MlpSpec(8, 40, "gelu", True, True, "gate_proj", "up_proj", "down_proj"),
    "plain": MlpSpec(8, 40, "relu2", False, False, None, "up_proj", "down_proj"),
    "plain-bias": MlpSpec(8, 40, "gelu", False, True, None, "fc1", "fc2"),
    "fused": MlpSpec(8, 40, "silu", True, False, "gate_up_proj", "gate_up_proj", "down_proj"),
}
Case = tuple[str, dict[str, Any]]
# Every upcycler appears with its defaults; a new one is added by itself.
_EXTRA: list[Case] = [
    ("noise", {"fraction": 0.0}),
    ("noise", {"std": 0.0}),
    ("drop", {"ratio": 0.0}),
    ("drop", {"indices": "independent"}),
    ("virtual_group", {"granularity": 1}),
    ("virtual_group", {"granularity": 2}),
    ("virtual_group", {"granularity": 2, "shuffle": True}),
    ("virtual_group", {"granularity": 4, "scaling": "cube_root"}),
    ("virtual_group", {"granularity": 4, "redraw": 0.5, "shuffle": True}),
    *(("partition_random", {"output_scale": scale}) for scale in ("n", "n_over_k", "sqrt_nk", "calibrate")),
    ("partition_cluster", {"metric": "cosine", "output_scale": "n"}),
    ("partition_coactivation", {"clamp": 1.0, "output_scale": "calibrate"}),
    ("partition_gradient", {"importance": "gradient", "output_scale": "n"}),
    ("sharing_inner", {"output_scale": "calibrate"}),
    ("sharing_inner", {"output_scale": "n"}),
    ("sharing_inter", {"output_scale": "n"}),
    ("sharing_inter", {"sharing": True}),
    ("sharing_inter", {"output_scale": "calibrate"}),
]
CASES: list[Case] = [(name, {}) for name in UPCYCLERS.names()] + _EXTRA
ROUTERS: list[Case] = [
    ("top_k", {"k": 2}),
    ("top_k", {"k": 4, "convention": "topk_softmax"}),
    ("top_k", {"k": 8}),
    ("top_k", {"k": 2, "convention": "softmax_topk"}),
]


class DenseBlock(nn.Module):
    """A block as transformers writes it, with the child names of its spec."""

    def __init__(self, spec: MlpSpec) -> None:
        super().__init__()
        self.spec = spec
        width = 2 * spec.intermediate if spec.fused_gate else spec.intermediate
        if spec.gated and not spec.fused_gate:
            self.add_module(str(spec.gate_name), nn.Linear(spec.hidden, width, bias=spec.bias))
        self.add_module(spec.up_name, nn.Linear(spec.hidden, width, bias=spec.bias))
        self.add_module(spec.down_name, nn.Linear(spec.intermediate, spec.output, bias=spec.bias))

    def forward(self, x: Tensor) -> Tensor:
        act, up = ACTIVATIONS[self.spec.activation], self.get_submodule(self.spec.up_name)(x)
        if self.spec.fused_gate:
            gate, up = up.chunk(2, dim=-1)
            up = act(gate) * up
        elif self.spec.gated:
            up = act(self.get_submodule(str(self.spec.gate_name))(x)) * up
        else:
            up = act(up)
        return self.get_submodule(self.spec.down_name)(up)


@dataclasses.dataclass
class Upcycled:
    """One upcycled layer with all that made it; `inputs` is the sample that a calibration saw."""

    upcycler: Upcycler
    blocks: list[DenseBlock]
    router: Router
    layer: MoELayer
    tensors: dict[str, Tensor]
    inputs: Tensor

    @property
    def dense(self) -> DenseBlock:
        return self.blocks[0]

    def equal_weights(self, x: Tensor) -> Tensor:
        """As under a router that gives all experts the same probability: k of them, in whole replicas."""
        E, k = self.router.num_experts, int(self.router.active_experts)
        group = getattr(self.upcycler.config, "granularity", 1)
        first = torch.stack([torch.randperm(E // group)[: k // group] for _ in x]) * group
        index = (first.unsqueeze(-1) + torch.arange(group)).reshape(len(x), k)
        y = self.layer.experts(x, index, torch.full((len(x), k), 1 / k if self.router.normalised else 1 / E))
        return y if self.layer.shared is None else self.layer.shared(x, y)

    def sum_of_all(self, x: Tensor) -> Tensor:
        """Every routed expert with weight 1, and the shared ones."""
        E = self.router.num_experts
        y = self.layer.experts(x, torch.arange(E).expand(len(x), E), torch.ones(len(x), E))
        return y if self.layer.shared is None else self.layer.shared(x, y)


def measure(upcycler: Upcycler, block: DenseBlock, inputs: Tensor, num_experts: int = NUM_EXPERTS) -> NeuronStatistics:
    """Statistics of random data in as many clusters as the upcycler wants, through the block's hooks."""
    accumulator = upcycler.new_accumulator(block.spec, num_experts)
    clusters = torch.arange(len(inputs)) % upcycler.num_clusters(num_experts)
    batches = list(zip(inputs.chunk(2), clusters.chunk(2), strict=True))
    (statistics,) = collect_statistics(
        [(block, block.spec)], [accumulator], batches, lambda b: block(b[0]).square().sum(), lambda b: b[1]
    )
    return statistics


def upcycle(
    case: Case, spec: MlpSpec, router_case: Case = ROUTERS[0], num_experts: int = NUM_EXPERTS, seed: int = 0
) -> Upcycled:
    """What a program does for one layer; the global seed decides the dense blocks, the router and the data."""
    upcycler = UPCYCLERS.get(case[0]).build(case[1])
    blocks = [DenseBlock(spec) for _ in range(upcycler.num_parents(num_experts))]
    router = make_router(router_case, spec.hidden, num_experts)
    inputs = torch.randn(48, spec.hidden)
    statistics = None if upcycler.needs == "nothing" else measure(upcycler, blocks[0], inputs, num_experts)
    upcycler.prepare_router(router)
    dense = [DenseMlp.read(block, spec) for block in blocks]
    generator = torch.Generator().manual_seed(seed)
    tensors = upcycler(dense[0] if len(dense) == 1 else dense, spec, num_experts, generator, statistics, router)
    routed, shared = split_shared(tensors)
    expert_spec = upcycler.expert_spec(spec, num_experts)
    experts = StackedExperts.build(expert_spec, num_experts, {"kernel": "loop"})
    experts.load_state_dict(routed)
    width = upcycler.shared_width(spec, num_experts)
    always = None if width is None else SharedExperts.build(expert_spec, {"width": width})
    assert (always is None) == (not shared)
    if always is not None:
        always.block.load_state_dict(shared)
    return Upcycled(upcycler, blocks, router, MoELayer(router, experts, shared=always), tensors, inputs)
