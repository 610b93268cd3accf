"""Projectors by name: vision features (B, N, C) to decoder embeddings (B, M, D)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2FN

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.registry import Registry


class Projector(nn.Module, ABC):
    """Maps N feature vectors of a picture to `num_output_tokens(N)` embeddings."""

    token_ratio: ClassVar[int] = 1

    @classmethod
    def num_output_tokens(cls, num_input_tokens: int) -> int:
        """How many embeddings N feature vectors become; data code reserves that many placeholders."""
        return num_input_tokens // cls.token_ratio

    def __init__(self, config: LlavaMoeConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, image_features: Tensor) -> Tensor:
        """(B, N, C) to (B, M, D)."""

    @property
    @abstractmethod
    def output_layer(self) -> nn.Linear:
        """The last linear map, whose initial scale sets the scale of the embeddings."""


def _input_width(config: LlavaMoeConfig) -> int:
    """Channels of the selected features; several feature layers are concatenated."""
    num_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return int(config.vision_config.hidden_size) * num_layers


class Mlp2xGelu(Projector):
    """Two linear maps with one activation between (LLaVA-1.5, 2310.03744); parameter names of the stock module."""

    def __init__(self, config: LlavaMoeConfig) -> None:
        super().__init__(config)
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(_input_width(config), width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, image_features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear_2


class Linear(Projector):
    """One linear map (LLaVA, 2304.08485)."""

    def __init__(self, config: LlavaMoeConfig) -> None:
        super().__init__(config)
        bias = config.multimodal_projector_bias
        self.linear_1 = nn.Linear(_input_width(config), config.text_config.hidden_size, bias=bias)

    def forward(self, image_features: Tensor) -> Tensor:
        return self.linear_1(image_features)

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear_1


PROJECTORS: Registry[type[Projector]] = Registry("projector")
PROJECTORS.register("mlp2x_gelu", Mlp2xGelu)
PROJECTORS.register("linear", Linear)
