"""The contract of an upcycler: dense feed-forward weights in, the tensors of the experts out.

What drives one does this for each layer, in this order:
    upcycler = UPCYCLERS.get(name).build(args)
    build the layer with upcycler.expert_spec(spec, E) and upcycler.shared_width(spec, E)
    router.reset_parameters(generator); upcycler.prepare_router(router)
    statistics = collect_statistics(...)              only where upcycler.needs is not "nothing"
    tensors = upcycler(dense, spec, E, generator, statistics, router)
    experts, shared = split_shared(tensors)
Shapes: T tokens, D hidden width, O output width, F dense width, M neurons of one expert, E experts.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llava_moe.moe.component import Component
from llava_moe.moe.experts.base import ACTIVATIONS
from llava_moe.moe.types import MlpSpec, RoutingContext
from llava_moe.moe.upcycling.statistics import NeuronAccumulator, NeuronStatistics

if TYPE_CHECKING:
    from llava_moe.moe.routers.base import Router

SHARED_PREFIX = "shared."
Needs = Literal["nothing", "activations", "gradients"]


class Contract(Enum):
    """What an upcycled layer promises at step 0, in evaluation mode; the tests hold each upcycler to it.

    Exact means to 1e-5 in float32.
    """

    EXACT_ANY_ROUTER = "exact_any_router"  # equals the dense block for every routing whose weights sum to 1
    EXACT_UNIFORM_ROUTER = "exact_uniform_router"  # equals it when the router gives all experts the same probability
    EXACT_SUM_OF_ALL = "exact_sum_of_all"  # equals it when every expert is used with weight 1
    NORM_PRESERVING = "norm_preserving"  # keeps the scale of the output, not the output
    NONE = "none"


@dataclasses.dataclass(frozen=True)
class DenseMlp:
    """The weights of one dense block: first (2F, D) with gate rows first when gated, else (F, D); down (O, F).

    Attributes:
        first_bias, down_bias: (2F,) or (F,), and (O,); both None when the block has no biases.
    """

    first: Tensor
    down: Tensor
    first_bias: Tensor | None
    down_bias: Tensor | None

    @staticmethod
    def read(module: nn.Module, spec: MlpSpec) -> DenseMlp:
        """Takes the weights out of a live module by the names in its spec.

        Raises:
            ValueError: a child of that name is no Linear.
        """

        def child(name: str) -> nn.Linear:
            linear = module.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{name} is a {type(linear).__name__}, not a Linear")
            return linear

        firsts = [child(spec.up_name)]
        if spec.gated and not spec.fused_gate:
            firsts.insert(0, child(str(spec.gate_name)))
        down = child(spec.down_name)
        first_bias = torch.cat([f.bias for f in firsts]).detach() if spec.bias else None
        down_bias = down.bias.detach() if spec.bias else None
        return DenseMlp(torch.cat([f.weight for f in firsts]).detach(), down.weight.detach(), first_bias, down_bias)

    def check(self, spec: MlpSpec) -> None:
        """Raises ValueError unless the tensors have the shapes of the spec."""
        width = 2 * spec.intermediate if spec.gated else spec.intermediate
        wanted: dict[str, tuple[int, ...]] = {
            "first": (width, spec.hidden),
            "down": (spec.output, spec.intermediate),
            "first_bias": (width,),
            "down_bias": (spec.output,),
        }
        for name, shape in wanted.items():
            tensor: Tensor | None = getattr(self, name)
            if name.endswith("_bias") and not spec.bias:
                shape = ()
            found = () if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise ValueError(f"the dense block's {name} has the shape {found}, but its spec asks for {shape}")

    def take(self, neurons_M: Tensor, spec: MlpSpec) -> DenseMlp:
        """The block that has only these neurons; its down bias is still the whole one."""
        neurons_M = neurons_M.to(self.first.device)
        rows = torch.cat([neurons_M, neurons_M + spec.intermediate]) if spec.gated else neurons_M
        first_bias = None if self.first_bias is None else self.first_bias[rows]
        return DenseMlp(self.first[rows], self.down[:, neurons_M], first_bias, self.down_bias)

    def scaled(self, weight: float, bias: float) -> DenseMlp:
        """The same block with its down weight and its down bias multiplied, in float32."""

        def times(tensor: Tensor, factor: float) -> Tensor:
            return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)

        down_bias = None if self.down_bias is None else times(self.down_bias, bias)
        return dataclasses.replace(self, down=times(self.down, weight), down_bias=down_bias)

    def hidden(self, x_TD: Tensor, spec: MlpSpec) -> Tensor:
        """What the down projection is given, (T, F), in float32."""
        first_bias = None if self.first_bias is None else self.first_bias.float()
        z = linear(x_TD.float(), self.first.float(), first_bias)
        act = ACTIVATIONS[spec.activation]
        if not spec.gated:
            return act(z)
        gate_TF, up_TF = z.chunk(2, dim=-1)
        return act(gate_TF) * up_TF

    def output(self, x_TD: Tensor, spec: MlpSpec) -> Tensor:
        """The block itself, (T, O), in float32."""
        down_bias = None if self.down_bias is None else self.down_bias.float()
        return linear(self.hidden(x_TD, spec), self.down.float(), down_bias)


def stack(experts: Iterable[DenseMlp], num_experts: int, spec: MlpSpec) -> dict[str, Tensor]:
    """Blocks of one shape as the state dict of `StackedExperts`; the result owns its memory.

    One block after the other is copied into its place, so that a generator never holds two of them.
    """
    first = "gate_up" if spec.gated else "up"
    tensors: dict[str, Tensor] = {}
    for place, expert in enumerate(experts):
        pieces = {f"{first}_proj": expert.first, "down_proj": expert.down}
        if expert.first_bias is not None and expert.down_bias is not None:
            pieces |= {f"{first}_bias": expert.first_bias, "down_bias": expert.down_bias}
        for name, piece in pieces.items():
            if name not in tensors:
                tensors[name] = piece.new_empty(num_experts, *piece.shape)
            tensors[name][place] = piece
    return tensors


def split_shared(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An upcycler's result as the state dicts of the experts and of `SharedExperts.block`, which may be empty."""
    experts = {name: tensor for name, tensor in tensors.items() if not name.startswith(SHARED_PREFIX)}
    shared = {n.removeprefix(SHARED_PREFIX): t for n, t in tensors.items() if n.startswith(SHARED_PREFIX)}
    return experts, shared


@dataclasses.dataclass(frozen=True)
class UpcycleJob:
    """Everything that one call of an upcycler is given, checked.

    Attributes:
        parents: the dense blocks, as many as `num_parents` asks for.
        spec: that of every parent.
    """

    parents: tuple[DenseMlp, ...]
    spec: MlpSpec
    num_experts: int
    generator: torch.Generator
    statistics: NeuronStatistics | None
    router: Router | None

    @property
    def dense(self) -> DenseMlp:
        return self.parents[0]

    def measured(self, name: str) -> Tensor:
        """One of the statistics; ValueError where it was not collected."""
        if self.statistics is None:
            raise ValueError(f"{name} is needed, but no statistics were given")
        return self.statistics.require(name)

    def given_router(self) -> Router:
        """The router; ValueError where none was given."""
        if self.router is None:
            raise ValueError("a router is needed, but none was given")
        return self.router


class Upcycler(Component, ABC):
    """Makes experts out of a dense block. Everything it draws comes from the generator.

    Flags, which may depend on the options and are then set on the instance:
        contract: what the layer promises at step 0; `contract_with` says what is left of it with one router.
        needs: "nothing" but the weights; "activations", also samples of real data; or "gradients", also a loss on them.
        collects: which `NeuronStatistics` it reads; `new_accumulator` gives what collects them.
        needs_router: it must be given the prepared router.
    """

    kind: ClassVar[str] = "upcycler"
    contract: Contract = Contract.NONE
    needs: Needs = "nothing"
    collects: tuple[str, ...] = ()
    needs_router: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Upcycler:
        """Makes the upcycler from a recipe's mapping.

        Raises:
            ValueError: an option is unknown or refused.
        """
        return cls(cls.parse(args))

    def expert_spec(self, spec: MlpSpec, num_experts: int) -> MlpSpec:
        """What one routed expert looks like.

        Raises:
            ValueError: the dense block cannot be divided among so many experts.
        """
        return spec

    def shared_width(self, spec: MlpSpec, num_experts: int) -> int | None:
        """Total width of the shared experts that the layer must have, with `mix: sum`; None where it has none."""
        return None

    def num_parents(self, num_experts: int) -> int:
        """How many dense blocks the call takes."""
        return 1

    def num_clusters(self, num_experts: int) -> int:
        """Into how many clusters the data of the statistics must be divided."""
        return 1

    def accumulator_options(self) -> dict[str, Any]:
        """Options of `NeuronAccumulator` that the method's own options set."""
        return {}

    def new_accumulator(
        self, spec: MlpSpec, num_experts: int, max_inputs: int = 4096, seed: int = 0, device: str = "cpu"
    ) -> NeuronAccumulator:
        """An empty accumulator of just the statistics that it needs of one layer."""
        options = self.accumulator_options()
        options |= {"max_inputs": max_inputs, "seed": seed, "device": device}
        return NeuronAccumulator(spec, self.collects, self.num_clusters(num_experts), **options)

    def prepare_router(self, router: Router) -> None:
        """Changes the router's initial parameters where the method says how; called after they were drawn.

        Raises:
            ValueError: this router does not allow it.
        """

    def contract_with(self, router: Router) -> Contract:
        """What the layer promises with this router, prepared, in evaluation mode."""
        if self.contract is Contract.EXACT_ANY_ROUTER and not router.normalised:
            return Contract.NONE
        return self.contract

    def __call__(
        self,
        dense: DenseMlp | Sequence[DenseMlp],
        spec: MlpSpec,
        num_experts: int,
        generator: torch.Generator,
        statistics: NeuronStatistics | None = None,
        router: Router | None = None,
    ) -> dict[str, Tensor]:
        """The state dict of the experts, by the parameter names of `StackedExperts` built with `expert_spec`.

        Where `shared_width` is not None, those of `SharedExperts.block` follow with the prefix "shared.".

        Raises:
            ValueError: a shape, a number, the statistics or the router do not fit.
        """
        parents = (dense,) if isinstance(dense, DenseMlp) else tuple(dense)
        name = type(self).__name__
        if num_experts < 1:
            raise ValueError(f"upcycler {name}: num_experts={num_experts} must be at least 1")
        if len(parents) != self.num_parents(num_experts):
            wanted = self.num_parents(num_experts)
            raise ValueError(f"upcycler {name}: {num_experts} experts need {wanted} dense blocks, not {len(parents)}")
        for parent in parents:
            parent.check(spec)
        if self.needs != "nothing" and statistics is None:
            raise ValueError(f"upcycler {name} needs {self.needs}: give it statistics of real data")
        if self.needs_router and router is None:
            raise ValueError(f"upcycler {name} needs the router, which says how the outputs will be weighted")
        if router is not None and router.num_experts != num_experts:
            raise ValueError(f"upcycler {name}: the router knows {router.num_experts} experts, not {num_experts}")
        with torch.no_grad():
            return self.experts(UpcycleJob(parents, spec, num_experts, generator, statistics, router))

    @abstractmethod
    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        """Does the work of `__call__` on checked arguments."""


def even_share(what: str, width: int, parts: int) -> int:
    """width / parts; ValueError where it is not whole."""
    if width % parts:
        raise ValueError(f"{what}: {width} neurons cannot be divided into {parts} equal parts")
    return width // parts


@torch.no_grad()
def gates_of(router: Router, x_TD: Tensor) -> Tensor:
    """The combine weights (T, E) of a router in evaluation mode on tokens of which nothing else is known.

    Raises:
        ValueError: the router needs to know more about them.
    """
    if router.needs:
        raise ValueError(
            f"{type(router).__name__} cannot route hidden states alone: it needs {', '.join(router.needs)}"
        )
    training = router.training
    router.eval()
    try:
        device = next((p.device for p in router.parameters()), x_TD.device)
        routing = router(x_TD.to(device), RoutingContext.trivial(len(x_TD), device))
    finally:
        router.train(training)
    return routing.gates_TE().to(x_TD.device)
