"""The perceiver resampler (Flamingo, 2204.14198, section 3.1 and appendix A.1.1; Idefics2, 2405.02246)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import Projector, check_at_least


class PerceiverResampler(Projector):
    """M learned queries read any number of features by cross-attention: M = num_latents.

    In each layer, with queries z and features x: z += attention(norm(z), [norm(x); norm(z)]), then z += ff(norm(z)),
    ff = W2 gelu(W1 .) of four times the width. It works at the tower's width C; a norm and one linear map to D follow,
    as LLaVA puts embeddings into the prompt where Flamingo attends to them. No biases in attention and ff, as in
    Flamingo. Queries start from a normal distribution with deviation 0.02.
    """

    keeps_grid = False

    @dataclasses.dataclass(frozen=True)
    class Config(Projector.Config):
        """Options.

        Attributes:
            num_latents: queries, the tokens of a picture.
            depth: layers.
            num_heads: attention heads.
            head_width: channels of one head.
        """

        num_latents: int = 64
        depth: int = 6
        num_heads: int = 8
        head_width: int = 64

        def __post_init__(self) -> None:
            for field in dataclasses.fields(self):
                check_at_least(self, field.name, 1)

    def build(self, config: LlavaMoeConfig) -> None:
        options, width = self.options, self.input_width
        self.latents = nn.Parameter(torch.empty(options.num_latents, width).normal_(std=0.02))
        self.layers = nn.ModuleList(
            ResamplerLayer(width, options.num_heads, options.head_width) for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, self.output_width, bias=config.multimodal_projector_bias)

    def num_output_tokens(self, num_input_tokens: int) -> int:
        return int(self.options.num_latents)

    def forward(self, image_features: Tensor) -> Tensor:
        latents = self.latents.to(image_features.dtype).expand(image_features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, image_features)
        return self.linear(self.norm(latents))

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear


class ResamplerLayer(nn.Module):
    """Cross-attention of queries (B, M, C) to features (B, N, C) and to themselves, and a feed-forward block."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        inner = num_heads * head_width
        self.num_heads = num_heads
        self.norm_latents = nn.LayerNorm(width)
        self.norm_features = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.norm_ff = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        normed = self.norm_latents(latents)
        keys = torch.cat([self.norm_features(features), normed], dim=1)
        query, key, value = (
            projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(normed), self.k_proj(keys), self.v_proj(keys))
        )
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        latents = latents + self.o_proj(read)
        return latents + self.fc2(F.gelu(self.fc1(self.norm_ff(latents))))
