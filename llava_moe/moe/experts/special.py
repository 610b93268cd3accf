"""Feed-forward experts beside experts that compute next to nothing: the zero-computation experts of MoE++ (2410.07348).

    zero      E(x) = 0
    copy      E(x) = x
    constant  E(x) = a1 x + a2 v        (a1, a2) = softmax(W_c x)

They come after the feed-forward ones in this order. A slot that names one of them is an empty slot for the kernel, so
it costs no matrix product of the feed-forward kind; all of a token's copies and constants are one scaled x and one
small product. Shapes: T tokens, D hidden width, E experts, K slots, C constants.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.experts.stacked import StackedExperts
from llava_moe.moe.types import MlpSpec


class SpecialExperts(StackedExperts):
    """`StackedExperts` for the feed-forward ones, with its parameter names, and besides:

        constant_value (C, D)    v, the constants
        constant_mix (C, 2, D)   W_c

    An upcycler fills in what is feed-forward; the constants keep their initial values.

    Args:
        spec: the feed-forward block.
        num_ffn: how many experts are feed-forward; `num_experts` counts all, `kinds` tells them apart.

    Raises:
        ValueError: a number is negative, all are 0, or the spec's output is not as wide as its input.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(StackedExperts.Config):
        """Options; the numbers are those of MoE++ with 8 feed-forward experts.

        Attributes:
            kernel: as in `stacked`.
            num_zero, num_copy, num_constant: experts of each kind.
            constant_std: standard deviation of the initial constants; MoE++ takes 1, which is much beside the outputs
                of upcycled experts.
        """

        num_zero: int = 1
        num_copy: int = 1
        num_constant: int = 2
        constant_std: float = 0.002

    config: SpecialExperts.Config

    def __init__(self, spec: MlpSpec, num_ffn: int, config: SpecialExperts.Config | None = None) -> None:
        config = SpecialExperts.Config() if config is None else config
        counts = (config.num_zero, config.num_copy, config.num_constant)
        if min(counts) < 0 or sum(counts) == 0:
            raise ValueError(
                f"special experts: num_zero, num_copy, num_constant={counts} must not be negative, and one must be "
                "above 0; without any use the experts 'stacked'"
            )
        if config.constant_std < 0:
            raise ValueError(f"special experts: constant_std={config.constant_std} must not be negative")
        if spec.output != spec.hidden:
            raise ValueError(
                f"special experts: hand the input on, so the output must be as wide: {spec.hidden}, not {spec.output}"
            )
        super().__init__(spec, num_ffn, config)
        self.num_ffn = num_ffn
        self.num_experts = num_ffn + sum(counts)
        self.kinds = ("ffn",) * num_ffn + ("zero",) * counts[0] + ("copy",) * counts[1] + ("constant",) * counts[2]
        self._first_copy = num_ffn + counts[0]
        self._first_constant = self._first_copy + counts[1]
        self.constant_value: nn.Parameter | None = None
        self.constant_mix: nn.Parameter | None = None
        if config.num_constant:
            self.constant_value = nn.Parameter(torch.empty(config.num_constant, spec.hidden))
            self.constant_mix = nn.Parameter(torch.empty(config.num_constant, 2, spec.hidden))
            self._reset_constants(None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        super().reset_parameters(generator, std)
        self._reset_constants(generator)

    @torch.no_grad()
    def _reset_constants(self, generator: torch.Generator | None) -> None:
        # The base class draws its own parameters before the constants exist.
        value, mix = getattr(self, "constant_value", None), getattr(self, "constant_mix", None)
        if value is not None and mix is not None:
            nn.init.normal_(value, std=self.config.constant_std, generator=generator)
            nn.init.normal_(mix, std=0.02, generator=generator)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        ffn_TK = index_TK < self.num_ffn
        y_TD = super().forward(x_TD, index_TK.masked_fill(~ffn_TK, self.num_ffn), weight_TK.masked_fill(~ffn_TK, 0.0))
        copied_TK = (index_TK >= self._first_copy) & (index_TK < self._first_constant)
        scale_T1 = weight_TK.masked_fill(~copied_TK, 0.0).sum(dim=-1, keepdim=True)
        if self.constant_value is None or self.constant_mix is None:
            return y_TD + scale_T1.to(x_TD.dtype) * x_TD
        constants_C = torch.arange(self._first_constant, self.num_experts, device=x_TD.device)
        named_TKC = index_TK.unsqueeze(-1) == constants_C
        weight_TC = (named_TKC * weight_TK.unsqueeze(-1)).sum(dim=1)
        # (a1, a2) of every constant, weighted: a1 joins the factor of x, a2 that of v.
        mixed_TC2 = nn.functional.linear(x_TD, self.constant_mix.flatten(0, 1)).float().unflatten(-1, (-1, 2))
        share_TC2 = mixed_TC2.softmax(dim=-1) * weight_TC.unsqueeze(-1)
        scale_T1 = scale_T1 + share_TC2[..., 0].sum(dim=-1, keepdim=True)
        constant_TD = share_TC2[..., 1].to(x_TD.dtype) @ self.constant_value
        return y_TD + scale_T1.to(x_TD.dtype) * x_TD + constant_TD.to(x_TD.dtype)

    def belongs_to_one_expert(self, name: str) -> bool:
        return not name.startswith("constant_")

    def extra_repr(self) -> str:
        counts = ", ".join(f"{kind}={self.kinds.count(kind)}" for kind in ("zero", "copy", "constant"))
        return f"{super().extra_repr()}, {counts}"
