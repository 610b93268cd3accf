"""Expert kinds by name."""

from llava_moe.moe.experts.base import ACTIVATIONS, Experts
from llava_moe.moe.experts.lora import LoraExperts
from llava_moe.moe.experts.mov import MovExperts
from llava_moe.moe.experts.shared import SharedExperts
from llava_moe.moe.experts.special import SpecialExperts
from llava_moe.moe.experts.stacked import StackedExperts
from llava_moe.registry import Registry

EXPERTS: Registry[type[Experts]] = Registry("experts")
EXPERTS.register("stacked", StackedExperts)
EXPERTS.register("special", SpecialExperts)
EXPERTS.register("lora", LoraExperts)
EXPERTS.register("mov", MovExperts)

__all__ = ["ACTIVATIONS", "EXPERTS", "Experts", "SharedExperts", "StackedExperts"]
