"""A multi-layer perceptron on every feature (LLaVA-1.5, 2310.03744, section 3.3)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2FN

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import Projector


class MlpNxGelu(Projector):
    """N linear maps of the decoder's width with `projector_hidden_act` between them: M = N tokens.

    LLaVA names it mlpNx_gelu. With two maps the parameters have the names of the stock module (linear_1, linear_2), and
    it is the block that a section `moe.projector` turns into experts.
    """

    num_linears: ClassVar[int]

    def build(self, config: LlavaMoeConfig) -> None:
        width, bias = self.output_width, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(self.input_width, width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        for number in range(2, self.num_linears + 1):
            self.add_module(f"linear_{number}", nn.Linear(width, width, bias=bias))

    def forward(self, image_features: Tensor) -> Tensor:
        hidden = self.linear_1(image_features)
        for number in range(2, self.num_linears + 1):
            hidden = self.get_submodule(f"linear_{number}")(self.act(hidden))
        return hidden

    @property
    def output_layer(self) -> nn.Module:
        return self.get_submodule(f"linear_{self.num_linears}")


class Mlp2xGelu(MlpNxGelu):
    """Two linear maps: the projector of LLaVA-1.5."""

    num_linears = 2


class Mlp3xGelu(MlpNxGelu):
    """Three linear maps."""

    num_linears = 3


class Mlp4xGelu(MlpNxGelu):
    """Four linear maps."""

    num_linears = 4
