"""The experts of a layer, spread over ranks: what DeepSpeed's engine must find, and the way of tokens through it.

DeepSpeed's AutoEP replaces a whole MoE layer, the router included; ours would be gone, and with it every loss,
controller and line of telemetry that reads its routings. Here only the experts are spread. DeepSpeed makes the process
groups, plans and carries the exchange, reduces the gradients of experts over the ranks that hold the same ones (divided
by all ranks, so that they are those of the mean over all tokens), clips, and saves and restores each expert. The
kernels are ours.

Imported where a recipe asks for it only: it needs DeepSpeed.
Shapes: T tokens, D hidden, F expert width, O output width, E experts of the layer, L of them on this rank, K slots,
S slots that this rank fills, R rows that came to this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV, compute_split_plan
from torch import Tensor, nn

from llava_moe.moe import Experts
from llava_moe.moe.experts import StackedExperts
from llava_moe.moe.experts.base import ACTIVATIONS
from llava_moe.moe.kernels.base import ExpertWeights
from llava_moe.moe.kernels.slots import sort_slots


class Shard(AutoEPMoELayer):  # type: ignore[misc]  # DeepSpeed types it as Any
    """This rank's experts in the form that DeepSpeed's engine asks of a layer with expert parallelism.

    The engine goes by the class, and by `experts.w1`, `w2`, `w3` with the experts in front:
        w1 (L, 2F, D) or (L, F, D)   the first projection, gate rows first
        w2 (L, O, F)                 the second
        w3 (L, 1, 2F + O)            both biases of each expert in a row; (L, 1, 0) and frozen without biases

    Args:
        source: all experts; this rank's are copied.
        size: ranks that share them.
    """

    def __init__(self, source: StackedExperts, size: int) -> None:
        nn.Module.__init__(self)  # AutoEP's own would build a router
        self.num_experts, self.ep_size = source.num_experts, size
        self.num_local_experts = source.num_experts // size
        self.ep_group_name = f"ep_size_{size}"
        self.folding_group_handles = None
        self.set_deepspeed_parallelism()  # makes the groups unless they exist
        self.ep_rank = int(dist.get_rank(group=self.ep_group))
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, size
        )
        self.experts = nn.Module()
        first = "gate_up" if source.spec.gated else "up"
        biases = (f"{first}_bias", "down_bias") if source.spec.bias else ()
        names = {"w1": (f"{first}_proj",), "w2": ("down_proj",), "w3": biases}
        for (name, whole_names), whole_E in zip(names.items(), _stacks(source), strict=True):
            self.experts.register_parameter(name, self._local(whole_E, whole_names))

    def _local(self, whole_E: Tensor, names: tuple[str, ...]) -> nn.Parameter:
        first = self.ep_rank * self.num_local_experts
        own = whole_E.detach()[first : first + self.num_local_experts].clone()  # a view would keep the whole alive
        parameter: Any = nn.Parameter(own, requires_grad=own.numel() > 0)
        parameter.full_numel, parameter.whole_names = whole_E.numel(), names
        parameter.allreduce = False  # what DeepSpeed tells the parameters of experts by
        parameter.group_name = self.ep_group_name
        shape = list(whole_E.shape)
        placement = self.expert_placement_descriptor
        meta = {
            AUTOEP_EXPERT_PLACEMENT: placement,
            AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            AUTOEP_PARAM_EP_RANK: self.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
        }
        setattr(parameter, DS_AUTOEP_UC_META, meta)
        return parameter

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, token_S: Tensor, counts_E: Tensor, run: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Sends rows to the ranks of their experts, runs them there, and brings the results back, (S, O).

        Every rank of the group must call it, also one without a row. The host waits for the number of rows.

        Args:
            x_TD: tokens.
            token_S: the token of each row, sorted by expert; what is behind the last counted one stays.
            counts_E: rows of each expert.
            run: maps rows (R, D) and their experts on this rank (R,) to (R, O).
        """
        plan = compute_split_plan(
            counts_E,  # would be counted; given the counts, it is not read
            num_experts=self.num_experts,
            ep_size=self.ep_size,
            num_local_experts=self.num_local_experts,
            ep_group=self.ep_group,
            num_tokens_per_expert=counts_E,
        )
        sent, received = sum(plan.input_splits), sum(plan.output_splits)
        rows_SD = x_TD.index_select(0, token_S[:sent])
        rows_RD = _AllToAllV.apply(self.ep_group, rows_SD, plan.input_splits, plan.output_splits)
        local_L = torch.arange(self.num_local_experts, device=x_TD.device)
        counts = plan.local_counts_by_source.flatten().long()
        expert_R = local_L.repeat(self.ep_size).repeat_interleave(counts, output_size=received)
        if received == 0:
            # One row of padding in an empty slot: the parameters then have a gradient of zero on this rank too.
            rows_RD, expert_R = F.pad(rows_RD, (0, 0, 0, 1)), local_L.new_full((1,), self.num_local_experts)
        out_RO = run(rows_RD, expert_R)[:received]
        back_SO: Tensor = _AllToAllV.apply(self.ep_group, out_RO, plan.output_splits, plan.input_splits)
        return back_SO


class ParallelExperts(Experts):
    """Stands for `StackedExperts` in a layer; each rank holds and computes its part of the experts.

    Args:
        source: all experts, with the same values on every rank.
        size: ranks that share them; divides their number and the number of ranks.
    """

    def __init__(self, source: StackedExperts, size: int) -> None:
        super().__init__(source.spec, source.num_experts, source.config)
        self.kinds = source.kinds
        self.kernel = source.kernel
        self.shard = Shard(source, size)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Refuses: ranks would have to draw the same numbers for all experts and keep a part.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("experts that are spread over ranks take their values from whole ones; reset those first")

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """As any experts; every rank of the group must call it."""
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        slots = sort_slots(index_TK, self.num_experts)
        counts_E = slots.ends_E.diff(prepend=slots.ends_E.new_zeros(1))
        weights = self._weights(dtype)

        def run(rows_RD: Tensor, expert_R: Tensor) -> Tensor:
            index_R1 = expert_R.unsqueeze(-1)
            return self.kernel(rows_RD, index_R1, torch.ones_like(index_R1, dtype=dtype), weights)

        out_SO = self.shard(x_TD.to(dtype), slots.token_S, counts_E, run)
        filled = out_SO.shape[0]
        weight_S = weight_TK.reshape(-1)[slots.slot_S[:filled]].to(dtype)
        y_TO = x_TD.new_zeros(x_TD.shape[0], self.spec.output, dtype=dtype)
        y_TO = y_TO.index_add(0, slots.token_S[:filled], out_SO * weight_S.unsqueeze(-1))
        return y_TO.to(x_TD.dtype)

    def _weights(self, dtype: torch.dtype) -> ExpertWeights:
        """This rank's experts for a kernel."""
        w1, w2, w3 = (p.to(dtype) for p in self.shard.experts.parameters())
        width = w1.shape[1]
        return ExpertWeights(
            first_EFD=w1,
            down_EDF=w2,
            first_bias_EF=w3[:, 0, :width] if self.spec.bias else None,
            down_bias_ED=w3[:, 0, width:] if self.spec.bias else None,
            activation=ACTIVATIONS[self.spec.activation],
            gated=self.spec.gated,
        )

    def idle_parameters(self, active: float) -> float:
        """So that a count of what this rank holds, less this, is what a token uses; negative where that is more."""
        parameters: list[Any] = list(self.shard.experts.parameters())
        used = min(1.0, active / self.num_experts) * sum(p.full_numel for p in parameters)
        return sum(p.numel() for p in parameters) - used

    @torch.no_grad()
    def gathered(self, keep: bool) -> dict[str, Tensor]:
        """The whole stacks by the names of `StackedExperts`, in the memory of the host.

        Every rank of the group must call it; a device holds one stack at a time.

        Args:
            keep: whether this rank wants them; the result is empty otherwise.
        """
        whole = []
        for parameter in self.shard.experts.parameters():
            parts = [torch.empty_like(parameter) for _ in range(self.shard.ep_size)]
            if parameter.numel():
                dist.all_gather(parts, parameter.detach().contiguous(), group=self.shard.ep_group)
            whole.append(torch.cat(parts).cpu() if keep else None)
        first, down, biases = whole
        if first is None or down is None or biases is None:
            return {}
        name = "gate_up" if self.spec.gated else "up"
        found = {f"{name}_proj": first, "down_proj": down}
        if self.spec.bias:
            width = first.shape[1]
            found[f"{name}_bias"] = biases[:, 0, :width].contiguous()
            found["down_bias"] = biases[:, 0, width:].contiguous()
        return found


def _stacks(source: StackedExperts) -> tuple[Tensor, Tensor, Tensor]:
    """w1, w2 and w3 for all experts."""
    name = "gate_up" if source.spec.gated else "up"
    first, down = getattr(source, f"{name}_proj"), source.down_proj
    if source.down_bias is None:
        return first, down, first.new_empty(source.num_experts, 1, 0)
    return first, down, torch.cat([getattr(source, f"{name}_bias"), source.down_bias], dim=1).unsqueeze(1)
