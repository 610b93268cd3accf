"""Ways to compute the experts, by name; all have the signature `kernels.base.Kernel` and give the same numbers."""

from llava_moe.moe.kernels.base import ExpertWeights, Kernel
from llava_moe.moe.kernels.batched import batched
from llava_moe.moe.kernels.grouped import grouped
from llava_moe.moe.kernels.loop import loop
from llava_moe.registry import Registry

KERNELS: Registry[Kernel] = Registry("experts kernel")
KERNELS.register("loop", loop)
KERNELS.register("grouped", grouped)
KERNELS.register("batched", batched)

__all__ = ["KERNELS", "ExpertWeights", "Kernel"]
