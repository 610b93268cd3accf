"""How the neurons of a dense block behave on real data: what some upcyclers divide them by.

A neuron is one input of the down projection, h = act(gate) * up, or act(up) without a gate.
    importance    v_ci = sum over the tokens of cluster c of |h_i dL/dh_i|             LLaMA-MoE (2406.16554)
    co-activation A_ij = sum over batches of min(sum over tokens of h_i h_j, clamp)    MoEfication (2110.01786)
Shapes: T tokens, D hidden width, F neurons, C clusters of the data, N sampled tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llava_moe.moe.types import MlpSpec

COLLECTS = ("inputs_ND", "coactivation_FF", "importance_CF")
IMPORTANCES = ("change", "gradient")


@dataclasses.dataclass(frozen=True)
class NeuronStatistics:
    """What was collected about one block; None where it was not asked for. All float32.

    Attributes:
        inputs_ND: a uniform sample of the block's inputs.
        coactivation_FF: symmetric matrix of co-activations.
        importance_CF: importance of each neuron for each cluster of the data.
    """

    inputs_ND: Tensor | None = None
    coactivation_FF: Tensor | None = None
    importance_CF: Tensor | None = None

    def require(self, name: str) -> Tensor:
        """One of the three.

        Raises:
            ValueError: it was not collected.
        """
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            found = [name for name in COLLECTS if getattr(self, name) is not None]
            raise ValueError(f"{name} is needed, but only {found or 'nothing'} was collected")
        return tensor


class NeuronAccumulator:
    """Adds up the statistics of one block, batch by batch.

    Args:
        spec: the dense block.
        collects: which fields of `NeuronStatistics`; the co-activation takes F x F floats.
        num_clusters: C, clusters of the data.
        clamp: bound on what one batch adds to a co-activation; None for no bound.
        importance: "change" is |h dL/dh|, how much the loss would change without the neuron; "gradient" is |dL/dh|.
        max_inputs: size N of the sample of inputs.
        seed: of the sample.
        device: where the sums are held and added up.

    Raises:
        ValueError: an argument is not among what is allowed.
    """

    def __init__(
        self,
        spec: MlpSpec,
        collects: Sequence[str] = COLLECTS,
        num_clusters: int = 1,
        clamp: float | None = None,
        importance: str = "change",
        max_inputs: int = 4096,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        unknown = [name for name in collects if name not in COLLECTS]
        if unknown:
            raise ValueError(f"collects={unknown}: must be among {', '.join(COLLECTS)}")
        if num_clusters < 1 or max_inputs < 1:
            raise ValueError(f"num_clusters={num_clusters} and max_inputs={max_inputs} must be at least 1")
        if clamp is not None and clamp <= 0:
            raise ValueError(f"clamp={clamp} must be above 0")
        if importance not in IMPORTANCES:
            raise ValueError(f"importance={importance!r} must be one of {', '.join(IMPORTANCES)}")
        self.spec = spec
        self.collects = tuple(collects)
        self.num_clusters = num_clusters
        self.clamp = clamp
        self.importance = importance
        self.max_inputs = max_inputs
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        width = spec.intermediate
        self._coactivation_FF = torch.zeros(width, width, device=device) if "coactivation_FF" in collects else None
        self._importance_CF = torch.zeros(num_clusters, width, device=device) if "importance_CF" in collects else None
        self._inputs_ND = torch.zeros(0, spec.hidden, device=device) if "inputs_ND" in collects else None
        self._keys_N = torch.zeros(0)

    @property
    def wants_gradients(self) -> bool:
        return self._importance_CF is not None

    @torch.no_grad()
    def update(
        self,
        h_TF: Tensor,
        grad_TF: Tensor | None = None,
        cluster_T: Tensor | None = None,
        x_TD: Tensor | None = None,
    ) -> None:
        """Adds one batch.

        Args:
            h_TF: inputs of the down projection.
            grad_TF: gradient of the loss by them; needed for the importance.
            cluster_T: int64 cluster of each token, -1 for padding, which does not count; None is cluster 0 for all.
            x_TD: inputs of the block; needed for their sample.

        Raises:
            ValueError: something that is to be collected is missing, or a shape or a cluster does not fit.
        """
        if h_TF.ndim != 2 or h_TF.shape[1] != self.spec.intermediate:
            raise ValueError(f"h_TF has the shape {tuple(h_TF.shape)}, not (T, {self.spec.intermediate})")
        if cluster_T is None:
            cluster_T = torch.zeros(len(h_TF), dtype=torch.int64)
        cluster_T = cluster_T.to(self.device)
        if cluster_T.shape != h_TF.shape[:1]:
            raise ValueError(f"cluster_T has the shape {tuple(cluster_T.shape)}, but there are {len(h_TF)} tokens")
        if len(cluster_T) and not -1 <= int(cluster_T.min()) <= int(cluster_T.max()) < self.num_clusters:
            raise ValueError(f"cluster_T must lie between -1 and {self.num_clusters - 1}")
        real_T = cluster_T >= 0
        cluster_T = cluster_T[real_T]
        h_TF = h_TF.to(self.device, torch.float32)[real_T]
        if self._coactivation_FF is not None:
            product_FF = h_TF.t() @ h_TF
            self._coactivation_FF += product_FF if self.clamp is None else product_FF.clamp(max=self.clamp)
        if self._importance_CF is not None:
            if grad_TF is None:
                raise ValueError("the importance of neurons needs the gradient grad_TF")
            grad_TF = grad_TF.to(self.device, torch.float32)[real_T]
            value_TF = (grad_TF * h_TF if self.importance == "change" else grad_TF).abs()
            self._importance_CF.index_add_(0, cluster_T, value_TF)
        if self._inputs_ND is not None:
            if x_TD is None:
                raise ValueError("the sample of inputs needs x_TD")
            self._sample(x_TD.to(self.device, torch.float32)[real_T])

    def _sample(self, x_TD: Tensor) -> None:
        """Keeps the tokens with the largest random keys, which is a uniform sample of all that were seen."""
        assert self._inputs_ND is not None
        keys = torch.cat([self._keys_N, torch.rand(len(x_TD), generator=self._generator)])
        keep = keys.topk(min(self.max_inputs, len(keys))).indices
        self._inputs_ND = torch.cat([self._inputs_ND, x_TD])[keep.to(self.device)]
        self._keys_N = keys[keep]

    def result(self) -> NeuronStatistics:
        """The sums so far."""
        return NeuronStatistics(self._inputs_ND, self._coactivation_FF, self._importance_CF)


def collect_statistics(
    blocks: Sequence[tuple[nn.Module, MlpSpec]],
    accumulators: Sequence[NeuronAccumulator],
    batches: Iterable[Any],
    forward: Callable[[Any], Tensor],
    clusters: Callable[[Any], Tensor] | None = None,
) -> list[NeuronStatistics]:
    """Runs a model over batches and watches its dense blocks by hooks; parameters get no gradient.

    Args:
        blocks: the dense blocks inside the model, with their specs.
        accumulators: one for each.
        batches: whatever `forward` takes.
        forward: runs the model on one batch and returns its loss, a scalar; the loss is read only where an accumulator
            wants gradients.
        clusters: the cluster of every token of a batch in the order that the blocks see them, (T,), -1 for padding.

    Raises:
        ValueError: the loss does not depend on a block, or a batch does not fit an accumulator.
    """
    if len(blocks) != len(accumulators):
        raise ValueError(f"{len(blocks)} blocks need as many accumulators, not {len(accumulators)}")
    gradients = any(accumulator.wants_gradients for accumulator in accumulators)
    for batch in batches:
        inputs: list[list[Tensor]] = [[] for _ in blocks]
        hidden: list[list[Tensor]] = [[] for _ in blocks]
        with ExitStack() as hooks, torch.set_grad_enabled(gradients):
            for (block, spec), xs, hs in zip(blocks, inputs, hidden, strict=True):
                hooks.callback(block.register_forward_pre_hook(_keeper(xs)).remove)
                down = block.get_submodule(spec.down_name)
                hooks.callback(down.register_forward_pre_hook(_keeper(hs, leaf=gradients)).remove)
            loss = forward(batch)
        cluster_T = None if clusters is None else clusters(batch).reshape(-1)
        watched = [h for hs in hidden for h in hs]
        # Not loss.backward(): the parameters' own gradients are neither wanted nor paid for.
        grads = torch.autograd.grad(loss, watched, allow_unused=True) if gradients else [None] * len(watched)
        found = iter(grads)
        for accumulator, xs, hs in zip(accumulators, inputs, hidden, strict=True):
            for x, h in zip(xs, hs, strict=True):
                grad = next(found)
                if accumulator.wants_gradients and grad is None:
                    raise ValueError("the loss does not depend on one of the blocks")
                grad_TF = None if grad is None else grad.reshape(-1, h.shape[-1])
                accumulator.update(h.reshape(-1, h.shape[-1]), grad_TF, cluster_T, x.reshape(-1, x.shape[-1]))
    return [accumulator.result() for accumulator in accumulators]


def _keeper(kept: list[Tensor], leaf: bool = False) -> Callable[..., tuple[Tensor] | None]:
    """A forward pre-hook that keeps the input; `leaf` makes the graph start there in a frozen model."""

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        x = args[0]
        if leaf and not x.requires_grad:
            x = x.detach().requires_grad_()
            kept.append(x)
            return (x,)
        kept.append(x)
        return None

    return keep
