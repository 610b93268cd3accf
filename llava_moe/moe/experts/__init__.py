"""Expert kinds by name."""

from llava_moe.moe.experts.base import ACTIVATIONS, Experts
from llava_moe.moe.experts.stacked import StackedExperts
from llava_moe.registry import Registry

EXPERTS: Registry[type[Experts]] = Registry("experts")
EXPERTS.register("stacked", StackedExperts)

__all__ = ["ACTIVATIONS", "EXPERTS", "Experts", "StackedExperts"]
