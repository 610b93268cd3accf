"""What all methods share that divide the neurons of a dense block among experts (LLaMA-MoE, 2406.16554).

An expert takes the rows of gate and up, and the columns of down, of its neurons. Without overlap all experts together,
each with weight 1, are the dense block. A router gives k of E experts weights that sum to 1 instead, so the mean output
is the dense one / E, and a factor s on the down projections and their biases makes up for it:
    none        1            the sum of all experts is the dense block
    n_over_k    E / k        what LLaMA-MoE released; the norm comes out as sqrt(E) / k of the dense one
    sqrt_nk     sqrt(E k)    keeps the norm of the output where the outputs of the experts are uncorrelated
    n           E            keeps the projection on the dense output; equal to it when all experts have weight 1 / E
    calibrate   measured     makes the norm of the MoE output equal that of the dense block on given real inputs
The down bias of each expert is 1 / E of the dense one, so that all of them together count it once. With shared experts
the bias is theirs alone, and s acts on the routed experts only.
Shapes: T tokens, D hidden width, F dense width, M neurons of one expert, S neurons of the shared experts, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_moe.moe.types import MlpSpec
from llava_moe.moe.upcycling.base import (
    SHARED_PREFIX,
    Contract,
    DenseMlp,
    UpcycleJob,
    Upcycler,
    even_share,
    gates_of,
    stack,
)
from llava_moe.registry import near_misses

if TYPE_CHECKING:
    from llava_moe.moe.routers.base import Router

SCALES = ("none", "n_over_k", "sqrt_nk", "n", "calibrate")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which neurons go where: int64 indices (E, M), and those of the shared experts (S,), where there are any."""

    routed_EM: Tensor
    shared_S: Tensor | None = None


class Partition(Upcycler):
    """Base of the partitions; a subclass says which neurons an expert gets.

    Attributes:
        disjoint: whether each neuron is in exactly one expert; may depend on the options.
    """

    contract = Contract.EXACT_SUM_OF_ALL
    disjoint: bool = True

    @dataclasses.dataclass(frozen=True)
    class Config(Upcycler.Config):
        """Options.

        Attributes:
            output_scale: one of `SCALES`. With "none" a top-k router starts far below the scale of the dense block.
        """

        output_scale: str = "none"

    config: Partition.Config

    def __init__(self, config: Partition.Config) -> None:
        super().__init__(config)
        scale = config.output_scale
        if scale not in SCALES:
            hint = near_misses(scale, list(SCALES))
            raise ValueError(f"upcycler {type(self).__name__}: unknown output_scale {scale!r}; {hint}")
        self.needs_router = scale in ("n_over_k", "sqrt_nk", "calibrate")
        if scale == "calibrate":
            self.collects = (*self.collects, "inputs_ND")
            self.needs = "activations" if self.needs == "nothing" else self.needs
        self.contract = self._promise()

    def _promise(self) -> Contract:
        scale = self.config.output_scale
        if scale == "calibrate":
            return Contract.NORM_PRESERVING
        if not self.disjoint or scale == "n_over_k":
            return Contract.NONE
        if scale == "sqrt_nk":
            return Contract.NORM_PRESERVING
        return Contract.EXACT_UNIFORM_ROUTER if scale == "n" else Contract.EXACT_SUM_OF_ALL

    def contract_with(self, router: Router) -> Contract:
        if self.contract is Contract.EXACT_UNIFORM_ROUTER and not (
            router.normalised and router.active_experts == router.num_experts
        ):
            return Contract.NONE
        if self.config.output_scale == "sqrt_nk" and not router.normalised:
            return Contract.NONE
        return self.contract

    def expert_spec(self, spec: MlpSpec, num_experts: int) -> MlpSpec:
        return spec.with_width(even_share(f"upcycler {type(self).__name__}", spec.intermediate, num_experts))

    @abstractmethod
    def assign(self, job: UpcycleJob) -> Assignment:
        """Divides the neurons."""

    def experts(self, job: UpcycleJob) -> dict[str, Tensor]:
        self.expert_spec(job.spec, job.num_experts)
        split, shared = self.assign(job), None
        share = 1 / job.num_experts
        if split.shared_S is not None:
            shared, share = job.dense.take(split.shared_S, job.spec), 0.0
        routed = [job.dense.take(neurons, job.spec).scaled(1.0, share) for neurons in split.routed_EM]
        factor = self._factor(job, routed, shared)
        tensors = stack((expert.scaled(factor, factor) for expert in routed), len(routed), job.spec)
        if shared is not None:
            tensors |= {SHARED_PREFIX + name: tensor for name, tensor in stack([shared], 1, job.spec).items()}
        return tensors

    def _factor(self, job: UpcycleJob, routed: list[DenseMlp], shared: DenseMlp | None) -> float:
        scale, E = self.config.output_scale, job.num_experts
        if scale == "none":
            return 1.0
        if scale == "n":
            return float(E)
        k = job.given_router().active_experts
        if scale == "n_over_k":
            return E / k
        if scale == "sqrt_nk":
            return math.sqrt(E * k)
        return calibrated_factor(job, routed, shared)


def calibrated_factor(job: UpcycleJob, routed: list[DenseMlp], shared: DenseMlp | None) -> float:
    """The s > 0 with || shared(x) + s * routed(x) || = || dense(x) || over the sample of real inputs.

    Raises:
        ValueError: there is none: the routed experts return zeros, or the shared ones alone are already larger.
    """
    x_TD = job.measured("inputs_ND").to(job.dense.first.device)
    gates_TE = gates_of(job.given_router(), x_TD)
    routed_TD = torch.zeros(len(x_TD), job.spec.output, device=x_TD.device)
    for gate_T, expert in zip(gates_TE.unbind(-1), routed, strict=True):
        routed_TD += gate_T.unsqueeze(-1) * expert.output(x_TD, job.spec)
    dense_TD = job.dense.output(x_TD, job.spec)
    shared_TD = torch.zeros_like(routed_TD) if shared is None else shared.output(x_TD, job.spec)

    def inner(one: Tensor, other: Tensor) -> float:
        return float((one.double() * other.double()).sum())

    # a s^2 + 2 b s + c = 0
    a, b = inner(routed_TD, routed_TD), inner(shared_TD, routed_TD)
    c = inner(shared_TD, shared_TD) - inner(dense_TD, dense_TD)
    root = b * b - a * c
    factor = (-b + math.sqrt(root)) / a if a > 0 and root >= 0 else 0.0
    if factor <= 0:
        raise ValueError(
            "output_scale='calibrate': on these inputs no factor on the routed experts makes the norm of the "
            "output that of the dense block; choose another output_scale"
        )
    return factor


def members(labels_F: Tensor, num_experts: int) -> Tensor:
    """Equal-sized labels as the indices of each expert's neurons, (E, M), in ascending order."""
    return labels_F.argsort(stable=True).reshape(num_experts, -1)
