"""Hash routing (Roller et al., 2106.04426): a fixed table from token ids to experts; nothing is learned.

    S = table[id mod rows]        g = 1 / k

A picture's tokens share one id, so they go by their place: the p-th picture token of a sequence takes row p of a
second table. Where there are no ids at all, in a vision tower or projector, `by` position uses it for all tokens.
Shapes: T tokens, E experts, K slots of a token, V rows.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from llava_moe.moe.component import check_k
from llava_moe.moe.routers import hash_tables
from llava_moe.moe.routers.base import Router
from llava_moe.moe.types import Routing, RoutingContext

POSITIONS = 4096


class HashRouter(Router):
    """Tokens to experts by a table; `logits_TE` is 0, and `probs_TE` is 1 / k for the chosen experts.

    Only to tokens that go by their place do others matter: the earlier ones of the sequence are counted, not padding.

    Raises:
        ValueError: an option is refused, or positions are asked for in a decoder; in `forward`, ids are missing.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E; above 1 a row names k different ones (several hashes).
            by: "token" or "position", which is for towers and projectors: a decoder that generates with a cache sees a
                token without its position.
            table: "random" draws each row, "modulo" gives id v to the expert v mod E, "balanced" needs `frequencies`
                and gives the experts equal loads under them.
            seed: of the tables; None draws from the generator of the initial parameters, so that layers differ.
            rows: of the table; None takes 65536, or one for each frequency. Ids beyond it share rows.
            frequencies: of the ids 0, 1, ...: any numbers that are proportional to them.
        """

        k: int = 1
        by: str = "token"
        table: str = "random"
        seed: int | None = 42
        rows: int | None = None
        frequencies: tuple[float, ...] | None = None

    config: HashRouter.Config
    learned = False
    needs: ClassVar[tuple[str, ...]] = ("token_ids_T",)
    table_VK: Tensor
    position_table_VK: Tensor

    def __init__(self, hidden: int, num_experts: int, config: HashRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        check_k("hash router", config.k, num_experts)
        rows = hash_tables.num_rows(config.by, config.table, config.rows, config.frequencies)
        self.register_buffer("table_VK", torch.zeros(rows, config.k, dtype=torch.int64))
        self.register_buffer("position_table_VK", torch.zeros(POSITIONS, config.k, dtype=torch.int64))
        if config.by == "position":
            self.needs = ()  # type: ignore[misc]  # on the instance: it depends on the options
            self.token_choice = False
        self.reset_parameters()

    def check_part(self, part: str) -> None:
        if self.config.by == "position" and part == "decoder":
            raise ValueError("hash router: by='position' cannot be used in a decoder; use by='token'")

    @property
    def active_experts(self) -> float:
        return self.config.k

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Makes the tables on the CPU, so that they are the same on every device."""
        config, experts = self.config, self.num_experts
        if config.seed is not None:
            generator = torch.Generator(device="cpu").manual_seed(config.seed)
        source = torch.default_generator if generator is None else generator
        self.position_table_VK.copy_(hash_tables.shuffled_table(POSITIONS, config.k, experts, source))
        if config.frequencies is not None:
            self.table_VK.copy_(hash_tables.balanced_table(config.frequencies, config.k, experts))
        elif config.table == "modulo":
            self.table_VK.copy_(hash_tables.modulo_table(len(self.table_VK), config.k, experts))
        else:
            self.table_VK.copy_(hash_tables.random_table(len(self.table_VK), config.k, experts, source))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        index_TK = self._experts(context)
        zeros_TE, share = x_TD.new_zeros(x_TD.shape[0], self.num_experts, dtype=torch.float32), 1 / self.config.k
        weight_TK = torch.full_like(index_TK, share, dtype=torch.float32)
        return Routing(zeros_TE, zeros_TE.scatter(1, index_TK, share), index_TK, weight_TK)

    def _experts(self, context: RoutingContext) -> Tensor:
        if self.config.by == "position":
            self.check_part(context.part)
            return self._by_place(context, context.token_mask_T)
        if context.token_ids_T is None:
            raise ValueError("hash router: token_ids_T is missing; by='position' does without, outside the decoder")
        index_TK = self.table_VK[context.token_ids_T % self.table_VK.shape[0]]
        if context.modality_T is None:
            return index_TK
        picture_T = (context.modality_T == 1) & context.token_mask_T
        return torch.where(picture_T.unsqueeze(-1), self._by_place(context, picture_T), index_TK)

    def _by_place(self, context: RoutingContext, counted_T: Tensor) -> Tensor:
        return self.position_table_VK[hash_tables.place_in_sequence(context.sequence_T, counted_T) % POSITIONS]
