"""Ways to make a larger dense decoder out of a small trained one, by name."""

from llava_moe.moe.growth.aki import Aki, AkiPro
from llava_moe.moe.growth.base import Contract, Grower
from llava_moe.moe.growth.depth import Interpolate, Stack
from llava_moe.moe.growth.fpi import Fpi
from llava_moe.moe.growth.shape import FAMILIES, DecoderNames, DecoderShape, family_of, read_shape
from llava_moe.registry import Registry

GROWERS: Registry[type[Grower]] = Registry("grower")
GROWERS.register("fpi", Fpi)
GROWERS.register("aki", Aki)
GROWERS.register("aki_pro", AkiPro)
GROWERS.register("stack", Stack)
GROWERS.register("interpolate", Interpolate)

__all__ = [
    "FAMILIES",
    "GROWERS",
    "Contract",
    "DecoderNames",
    "DecoderShape",
    "Grower",
    "family_of",
    "read_shape",
]
