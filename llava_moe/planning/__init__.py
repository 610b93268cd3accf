"""What a run would need, worked out from configs alone: parameters, arithmetic, memory. No weights, GPU or network."""

from llava_moe.planning.counts import Counts, PartCount, count, flops
from llava_moe.planning.memory import Memory, Setup, estimate
from llava_moe.planning.recipes import Header, Library, read_header
from llava_moe.planning.shapes import model_on_meta, shape_of

__all__ = [
    "Counts",
    "Header",
    "Library",
    "Memory",
    "PartCount",
    "Setup",
    "count",
    "estimate",
    "flops",
    "model_on_meta",
    "read_header",
    "shape_of",
]
