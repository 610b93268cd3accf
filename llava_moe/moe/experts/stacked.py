"""Experts as stacked 3-D weights; the computation is chosen by name.

Stacked weights have no idle sub-modules, so nothing has to be touched for ZeRO-3 when an expert gets no token, and
every kernel can read them in place.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.experts.base import ACTIVATIONS, Experts
from llava_moe.moe.kernels import KERNELS
from llava_moe.moe.kernels.base import ExpertWeights
from llava_moe.moe.types import MlpSpec
from llava_moe.registry import near_misses


class StackedExperts(Experts):
    """E copies of one feed-forward shape.

    Parameters on the module, in the layout of transformers' own fused experts:
        gate_up_proj (E, 2F, D), gate rows first; up_proj (E, F, D) in its place where the spec has no gate
        down_proj (E, D, F), or (E, O, F) where the spec has another output width
        gate_up_bias (E, 2F) or up_bias (E, F), and down_bias (E, D), where the spec has biases

    Raises:
        ValueError: the activation or the kernel is unknown.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Experts.Config):
        """Options.

        Attributes:
            kernel: a name of `llava_moe.moe.KERNELS`; all compute the same.
        """

        kernel: str = "grouped"

    config: StackedExperts.Config

    def __init__(self, spec: MlpSpec, num_experts: int, config: StackedExperts.Config | None = None) -> None:
        config = StackedExperts.Config() if config is None else config
        super().__init__(spec, num_experts, config)
        if spec.activation not in ACTIVATIONS:
            hint = near_misses(spec.activation, list(ACTIVATIONS))
            raise ValueError(f"experts cannot use the activation {spec.activation!r}; {hint}")
        self.kernel_name = config.kernel
        self.kernel = KERNELS.get(config.kernel)
        E, D, F, out = num_experts, spec.hidden, spec.intermediate, spec.output
        first = "gate_up" if spec.gated else "up"
        width = 2 * F if spec.gated else F
        self._first = first
        self.register_parameter(f"{first}_proj", nn.Parameter(torch.empty(E, width, D)))
        self.down_proj = nn.Parameter(torch.empty(E, out, F))
        self.down_bias: nn.Parameter | None
        if spec.bias:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.empty(E, width)))
            self.down_bias = nn.Parameter(torch.empty(E, out))
        else:
            self.register_parameter(f"{first}_bias", None)
            self.down_bias = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        device = x_TD.device.type
        # The grouped matrix product does not take part in autocast, so the cast is made here for every kernel alike.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype

        def cast(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.to(dtype)

        weights = ExpertWeights(
            first_EFD=getattr(self, f"{self._first}_proj").to(dtype),
            down_EDF=self.down_proj.to(dtype),
            first_bias_EF=cast(getattr(self, f"{self._first}_bias")),
            down_bias_ED=cast(self.down_bias),
            activation=ACTIVATIONS[self.spec.activation],
            gated=self.spec.gated,
        )
        return self.kernel(x_TD.to(dtype), index_TK, weight_TK, weights).to(x_TD.dtype)

    def extra_repr(self) -> str:
        D, F = self.spec.hidden, self.spec.intermediate
        return f"experts={self.num_experts}, hidden={D}, intermediate={F}, kernel={self.kernel_name!r}"
