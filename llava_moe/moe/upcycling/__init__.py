"""Ways to make experts out of a dense feed-forward block, by name."""

from llava_moe.moe.upcycling.base import Contract, DenseMlp, Upcycler
from llava_moe.moe.upcycling.copy import Copy
from llava_moe.registry import Registry

UPCYCLERS: Registry[type[Upcycler]] = Registry("upcycler")
UPCYCLERS.register("copy", Copy)

__all__ = ["UPCYCLERS", "Contract", "DenseMlp", "Upcycler"]
