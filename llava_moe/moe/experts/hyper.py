"""HyperMoE's side branch (2402.12656): a small expert whose weights are made from the experts that a token did not use.

    r = sum of R_e over the unselected experts        r' = W2 relu(W1 r)        u = relu(trunk r')
    E(x) = up(u) relu(down(u) x + b(u)) + c(u)        up, down, b, c linear in u

The weights depend on the set of selected experts only, so they are made once for each set that can occur and not for
each token: all sets of at most k of E experts (a capacity may empty slots). Tokens are then dispatched to their set's
weights by the grouped kernel; no tensor of size T x weights is made and the host is not asked which sets occurred.

The paper shares one hypernetwork between all layers and adds a layer embedding to r'. Here every layer has its own, as
layers know nothing of each other, and needs no layer embedding. Its size is therefore counted in every layer, and the
trunk is narrower than the paper's 128 by default.
Shapes: T tokens, D hidden width, O output width, E experts, K slots, S sets, Z embedding, U trunk, B bottleneck.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from llava_moe.moe.kernels import KERNELS
from llava_moe.moe.kernels.base import ExpertWeights
from llava_moe.moe.types import MlpSpec, Routing

_HEAD_SCALE = 1e-3


class HyperExpert(nn.Module):
    """(x_TD, routing) -> y_TO, which the layer adds to the output of the experts.

    Parameters: table (E, Z); first, second (Z, Z) with biases; trunk (U, Z) with bias; heads without bias:
    down_head (B D, U), hidden_head (B, U), up_head (O B, U), output_head (O, U).
    """

    def __init__(self, spec: MlpSpec, num_experts: int, k: int, embedding: int, trunk: int, bottleneck: int) -> None:
        super().__init__()
        D, Z, U, B = spec.hidden, embedding, trunk, bottleneck
        self.num_experts, self.k = num_experts, k
        self.hidden, self.output, self.bottleneck = D, spec.output, B
        self.table = nn.Parameter(torch.empty(num_experts, Z))
        # Plain parameters and no nn.Linear: a model that draws the weights of all its nn.Linear again would miss these.
        self.first, self.first_bias = nn.Parameter(torch.empty(Z, Z)), nn.Parameter(torch.empty(Z))
        self.second, self.second_bias = nn.Parameter(torch.empty(Z, Z)), nn.Parameter(torch.empty(Z))
        self.trunk, self.trunk_bias = nn.Parameter(torch.empty(U, Z)), nn.Parameter(torch.empty(U))
        self.down_head, self.hidden_head = nn.Parameter(torch.empty(B * D, U)), nn.Parameter(torch.empty(B, U))
        self.up_head = nn.Parameter(torch.empty(self.output * B, U))
        self.output_head = nn.Parameter(torch.empty(self.output, U))
        self._tables: dict[torch.device, SetTables] = {}
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws everything. The heads follow "hyperfan-in", scaled so that the branch starts at nearly nothing."""
        nn.init.normal_(self.table, generator=generator)
        for weight, bias in (
            (self.first, self.first_bias),
            (self.second, self.second_bias),
            (self.trunk, self.trunk_bias),
        ):
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
            nn.init.zeros_(bias)
        for head, inputs in (
            (self.down_head, self.hidden),
            (self.hidden_head, self.hidden),
            (self.up_head, self.bottleneck),
            (self.output_head, self.bottleneck),
        ):
            bound = _HEAD_SCALE * (3 / (head.shape[1] * inputs)) ** 0.5
            head.uniform_(-bound, bound, generator=generator)

    def weights_of(self, unselected_SE: Tensor, dtype: torch.dtype) -> ExpertWeights:
        """The generated weights for each set, given as its complement: 1 for every unselected expert."""
        r_SZ = linear(unselected_SE.to(self.table.dtype), self.table.t())
        mixed_SZ = linear(relu(linear(r_SZ, self.first, self.first_bias)), self.second, self.second_bias)
        u_SU = relu(linear(mixed_SZ, self.trunk, self.trunk_bias))
        down_SBD = linear(u_SU, self.down_head).unflatten(-1, (self.bottleneck, self.hidden))
        up_SOB = linear(u_SU, self.up_head).unflatten(-1, (self.output, self.bottleneck))
        hidden_SB, output_SO = linear(u_SU, self.hidden_head), linear(u_SU, self.output_head)
        return ExpertWeights(
            first_EFD=down_SBD.to(dtype),
            down_EDF=up_SOB.to(dtype),
            first_bias_EF=hidden_SB.to(dtype),
            down_bias_ED=output_SO.to(dtype),
            activation=relu,
            gated=False,
        )

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        if x_TD.device not in self._tables:
            self._tables[x_TD.device] = SetTables.make(self.num_experts, self.k, x_TD.device)
        tables = self._tables[x_TD.device]
        weights = self.weights_of(tables.complement_SE, dtype)
        set_T1 = tables.numbers(routing.index_TK).unsqueeze(-1)
        ones_T1 = torch.ones_like(set_T1, dtype=torch.float32)
        return KERNELS.get("grouped")(x_TD.to(dtype), set_T1, ones_T1, weights).to(x_TD.dtype)


def count_sets(num_experts: int, k: int) -> int:
    """Sets of 0..k of E experts."""
    return sum(math.comb(num_experts, size) for size in range(k + 1))


@dataclasses.dataclass(frozen=True)
class SetTables:
    """Numbers for the sets of at most k of E experts, on one device.

    Smaller sets come first; among those of one size the members e_1 < e_2 < ... stand for sum_i comb(e_i, i), the
    combinatorial number system.

    Attributes:
        complement_SE: float32, 1 for the experts outside of the set.
        binomial_EK: comb(e, place) for e = 0..E and place = 1..k; e = E, an empty slot, counts nothing.
        start_K: for each size 0..k the number of smaller sets.
    """

    complement_SE: Tensor
    binomial_EK: Tensor
    start_K: Tensor

    @staticmethod
    def make(num_experts: int, k: int, device: torch.device) -> SetTables:
        rows = [[1.0] * num_experts for _ in range(count_sets(num_experts, k))]
        starts = [count_sets(num_experts, size - 1) for size in range(k + 1)]
        for size in range(k + 1):
            for members in itertools.combinations(range(num_experts), size):
                number = sum(math.comb(e, place) for place, e in enumerate(members, start=1))
                for e in members:
                    rows[starts[size] + number][e] = 0.0
        table = [[math.comb(e, place) for place in range(1, k + 1)] for e in range(num_experts)]
        return SetTables(
            complement_SE=torch.tensor(rows, dtype=torch.float32, device=device),
            binomial_EK=torch.tensor([*table, [0] * k], device=device),
            start_K=torch.tensor(starts, device=device),
        )

    def numbers(self, index_TK: Tensor) -> Tensor:
        """The number of each token's set of experts, int64 (T,)."""
        num_experts, k = self.binomial_EK.shape[0] - 1, self.binomial_EK.shape[1]
        sorted_TK = index_TK.sort(dim=-1).values  # empty slots hold E and come last
        size_T = (index_TK < num_experts).sum(dim=-1)
        return self.start_K[size_T] + self.binomial_EK[sorted_TK, torch.arange(k, device=index_TK.device)].sum(dim=-1)
