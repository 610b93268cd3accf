"""Projectors by name: vision features (B, N, C) to decoder embeddings (B, M, D). One file and one line each."""

from llava_moe.model.projectors.average_pool import AveragePool
from llava_moe.model.projectors.base import GridProjector, Projector
from llava_moe.model.projectors.c_abstractor import CAbstractor
from llava_moe.model.projectors.identity import Identity
from llava_moe.model.projectors.ldp import Ldp, LdpV2
from llava_moe.model.projectors.linear import Linear
from llava_moe.model.projectors.mlp import Mlp2xGelu, Mlp3xGelu, Mlp4xGelu, MlpNxGelu
from llava_moe.model.projectors.perceiver import PerceiverResampler
from llava_moe.model.projectors.pixel_shuffle import PixelShuffle
from llava_moe.registry import Registry

PROJECTORS: Registry[type[Projector]] = Registry("projector")
PROJECTORS.register("mlp2x_gelu", Mlp2xGelu)
PROJECTORS.register("mlp3x_gelu", Mlp3xGelu)
PROJECTORS.register("mlp4x_gelu", Mlp4xGelu)
PROJECTORS.register("linear", Linear)
PROJECTORS.register("pixel_shuffle", PixelShuffle)
PROJECTORS.register("average_pool", AveragePool)
PROJECTORS.register("perceiver", PerceiverResampler)
PROJECTORS.register("c_abstractor", CAbstractor)
PROJECTORS.register("ldp", Ldp)
PROJECTORS.register("ldp_v2", LdpV2)
PROJECTORS.register("identity", Identity)

__all__ = [
    "PROJECTORS",
    "AveragePool",
    "CAbstractor",
    "GridProjector",
    "Identity",
    "Ldp",
    "LdpV2",
    "Linear",
    "Mlp2xGelu",
    "Mlp3xGelu",
    "Mlp4xGelu",
    "MlpNxGelu",
    "PerceiverResampler",
    "PixelShuffle",
    "Projector",
]
