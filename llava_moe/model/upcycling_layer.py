"""The tensors of one MoE layer, from the dense block that it replaces.

The layer is built alone, so that everything it consists of is written: router, shared and special experts, side
branches, capacities. Its experts are built only one neuron wide where nothing else depends on their width: random
weights that the upcycler replaces would double the memory of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llava_moe.model.configuration import MoePart
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.sites import moe_layer
from llava_moe.moe import MlpSpec, Router, RoutingContext, RoutingScope
from llava_moe.moe.upcycling import (
    BranchTrainMix,
    Contract,
    Copy,
    DenseMlp,
    FromScratch,
    NeuronStatistics,
    Upcycler,
    split_shared,
)


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """One block to replace.

    Attributes:
        part: "decoder", "vision" or "projector".
        index: the layer's index in its part.
        path: the module path of the block, the same in the dense and in the sparse model.
        spec: the dense block.
        num_experts: feed-forward experts.
        shapes: of every tensor of the MoE layer, by its name in the layer.
    """

    part: str
    index: int
    path: str
    spec: MlpSpec
    num_experts: int
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def site(self) -> str:
        return self.part if self.part == "projector" else f"{self.part}.{self.index}"


@dataclasses.dataclass(frozen=True)
class MadeLayer:
    """The state of one layer.

    Attributes:
        tensors: by their names in the layer; whoever writes them takes them out, so that memory becomes free.
        exact: whether the layer equals the dense block at the start, except for rounding.
    """

    tensors: dict[str, Tensor]
    exact: bool


def make_layer(
    block: BlockPlan,
    part: MoePart,
    upcycler: Upcycler,
    parents: Callable[[], Iterator[DenseMlp]],
    generator: torch.Generator,
    statistics: NeuronStatistics | None = None,
) -> MadeLayer:
    """Makes one layer; everything random in it comes from the generator, so no two layers start alike.

    Args:
        parents: reads the dense blocks one by one, in the dtype of the checkpoint.

    Raises:
        ValueError: the upcycler refuses the block, the router or the kind of experts.
        CheckpointError: the upcycler returns other tensors than the layer has.
    """
    provided = _provided(block, part, upcycler)
    layer = _build(block, part, provided, generator)
    router = layer.router if isinstance(layer.router, Router) else None
    if router is None and upcycler.needs_router:
        raise ValueError(
            f"upcycler {type(upcycler).__name__} needs a router that assigns tokens, and {part.router.name!r} does not"
        )
    if router is not None:
        router.eval()
        router.reset_parameters(generator)
        upcycler.prepare_router(router)
    own = {name: tensor for name, tensor in layer.state_dict().items() if name not in provided}
    exact = router is not None and _keeps_function(layer, router, upcycler)
    if hasattr(layer.experts, "from_dense"):
        tensors = {f"experts.{name}": tensor for name, tensor in layer.experts.from_dense(next(parents())).items()}
    else:
        layer.experts.to("meta")
        tensors = _experts(block, upcycler, parents, generator, statistics, router)
    tensors = {**own, **_shared(layer, part, upcycler, parents), **tensors}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != block.shapes:
        wrong = sorted(name for name in found.keys() | block.shapes.keys() if found.get(name) != block.shapes.get(name))
        raise CheckpointError(
            f"{block.path}: upcycler {type(upcycler).__name__} and the layer do not agree on {wrong[:4]}: "
            f"{[found.get(name) for name in wrong[:4]]} and {[block.shapes.get(name) for name in wrong[:4]]}"
        )
    return MadeLayer(tensors, exact)


def _experts(
    block: BlockPlan,
    upcycler: Upcycler,
    parents: Callable[[], Iterator[DenseMlp]],
    generator: torch.Generator,
    statistics: NeuronStatistics | None,
    router: Router | None,
) -> dict[str, Tensor]:
    if isinstance(upcycler, BranchTrainMix):
        return {
            f"experts.{name}": tensor for name, tensor in _one_by_one(block, upcycler, parents(), generator).items()
        }
    # A router that also knows experts without computation counts more of them than the upcycler makes.
    given = router if upcycler.needs_router else None
    made = upcycler(next(parents()), block.spec, block.num_experts, generator, statistics, given)
    experts, shared = split_shared(made)
    return {f"experts.{n}": t for n, t in experts.items()} | {f"shared.block.{n}": t for n, t in shared.items()}


def _one_by_one(
    block: BlockPlan, upcycler: BranchTrainMix, parents: Iterator[DenseMlp], generator: torch.Generator
) -> dict[str, Tensor]:
    """Expert e is made of parent e alone, so all parents need not be in memory beside all experts."""
    made: dict[str, Tensor] = {}
    for number, dense in enumerate(parents):
        for name, tensor in upcycler(dense, block.spec, 1, generator).items():
            stacked = made.setdefault(name, tensor.new_empty(block.num_experts, *tensor.shape[1:]))
            stacked[number] = tensor[0]
    return made


def stacked_names(spec: MlpSpec) -> list[str]:
    """The parameter names of `StackedExperts`."""
    first = "gate_up" if spec.gated else "up"
    return [f"{first}_proj", "down_proj", *([f"{first}_bias", "down_bias"] if spec.bias else [])]


def _provided(block: BlockPlan, part: MoePart, upcycler: Upcycler) -> set[str]:
    """The tensors of the layer that do not come from building it."""
    if part.experts.name in ("stacked", "special"):
        names = {f"experts.{name}" for name in stacked_names(block.spec)}
    else:
        names = {name for name in block.shapes if name.startswith("experts.")}
    if upcycler.shared_width(block.spec, block.num_experts) is not None:
        names |= {f"shared.block.{name}" for name in stacked_names(block.spec)}
    return names


def _build(block: BlockPlan, part: MoePart, provided: set[str], generator: torch.Generator) -> Any:
    """The layer on the CPU, with every tensor that is not provided in its final shape."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    shared = part.shared
    if shared is not None:
        width = part.expert_width or block.spec.intermediate
        shared = {**shared, "width": shared.get("width") or width}
    narrow = dataclasses.replace(part, expert_width=1, shared=shared)
    for plan in (narrow, part):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer: Any = moe_layer(plan, block.spec, block.num_experts, block.index, block.part, RoutingScope())
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items() if name not in provided}
        fits = all(block.shapes.get(name) == shape for name, shape in shapes.items())
        if fits and not hasattr(layer.experts, "from_dense"):
            break
    return layer.eval()


def _shared(
    layer: Any, part: MoePart, upcycler: Upcycler, parents: Callable[[], Iterator[DenseMlp]]
) -> dict[str, Tensor]:
    """What shared experts start with that the upcycler does not make itself: so that they change nothing.

    A mean needs a copy of the dense block; a sum needs a block that returns zero, whose down projection learns first.

    Raises:
        ValueError: a mean of a block that is not as wide as the dense one.
    """
    spec = layer.experts.spec
    if layer.shared is None or isinstance(upcycler, FromScratch):
        return {}
    block: nn.Module = layer.shared.block
    if layer.shared.config.mix != "mean":
        names = [name for name in ("down_proj", "down_bias") if getattr(block, name) is not None]
        return {f"shared.block.{name}": torch.zeros_like(getattr(block, name)) for name in names}
    dense = next(parents())
    width = dense.down.shape[1]
    if layer.shared.spec.intermediate != width:
        raise ValueError(
            f"upcycle.{layer.site[0]}.shared: with mix: mean the shared experts start as the dense block, so their "
            f"total width must be {width}, not {layer.shared.spec.intermediate}; set width, or take mix: sum"
        )
    copied = Copy.build({})(dense, spec.with_width(width), 1, torch.Generator())
    return {f"shared.block.{name}": tensor for name, tensor in copied.items()}


@torch.no_grad()
def _keeps_function(layer: Any, router: Router, upcycler: Upcycler) -> bool:
    """Whether the whole layer equals the dense block: the contract of the upcycler is about the routed experts only."""
    if getattr(layer, "side", None) is not None or set(layer.experts.kinds) != {"ffn"}:
        return False
    if hasattr(layer.experts, "from_dense"):
        return router.normalised
    contract = upcycler.contract_with(router)
    if contract is Contract.EXACT_UNIFORM_ROUTER:
        return starts_uniform(router)
    return contract is Contract.EXACT_ANY_ROUTER


def starts_uniform(router: Router) -> bool:
    """Whether a router in evaluation mode gives all experts the same probability on random tokens."""
    if router.needs or router.needs_experts:
        return False
    x_TD = torch.randn(64, router.hidden, generator=torch.Generator().manual_seed(0))
    probs_TE = router(x_TD, RoutingContext.trivial(len(x_TD))).probs_TE
    return bool((probs_TE.amax(-1) - probs_TE.amin(-1) < 1e-6).all())
