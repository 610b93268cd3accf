"""Mixture-of-experts layers in plain torch: routers, experts, kernels, balance losses and upcycling.

Needs torch only. Shape suffixes used throughout this package:
    T tokens (batch x sequence, flattened)   D hidden width   F expert width   E experts   K slots of a token
"""

from llava_moe.moe.experts import EXPERTS, Experts, StackedExperts
from llava_moe.moe.kernels import KERNELS
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.losses import BALANCE_LOSSES, BalanceLoss
from llava_moe.moe.routers import ROUTERS, Router, TopKRouter
from llava_moe.moe.scope import RoutingScope
from llava_moe.moe.types import MlpSpec, Routing, RoutingContext
from llava_moe.moe.upcycling import UPCYCLERS, Upcycler

__all__ = [
    "BALANCE_LOSSES",
    "EXPERTS",
    "KERNELS",
    "ROUTERS",
    "UPCYCLERS",
    "BalanceLoss",
    "Experts",
    "MlpSpec",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingScope",
    "StackedExperts",
    "TopKRouter",
    "Upcycler",
]
