"""One linear map (LLaVA, 2304.08485, section 4.1)."""

from __future__ import annotations

from torch import Tensor, nn

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import Projector


class Linear(Projector):
    """y = W x + b, feature by feature: M = N."""

    def build(self, config: LlavaMoeConfig) -> None:
        self.linear_1 = nn.Linear(self.input_width, self.output_width, bias=config.multimodal_projector_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        return self.linear_1(image_features)

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear_1
