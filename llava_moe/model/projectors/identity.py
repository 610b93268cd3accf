"""No projection: the tower's features are the embeddings."""

from __future__ import annotations

from torch import Tensor

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import Projector


class Identity(Projector):
    """y = x. It has no parameters, so nothing brings the features to the scale of words.

    Raises:
        ValueError: tower and decoder have different widths.
    """

    def build(self, config: LlavaMoeConfig) -> None:
        if self.input_width != self.output_width:
            raise ValueError(
                f"projector=identity: the tower gives {self.input_width} channels and the decoder takes "
                f"{self.output_width}; use linear or mlp2x_gelu"
            )

    def forward(self, image_features: Tensor) -> Tensor:
        return image_features

    @property
    def output_layer(self) -> None:
        return None
