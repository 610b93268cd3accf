"""Mixture-of-experts layers in plain torch: routers, experts, kernels, balance losses, upcycling and growth.

Needs torch only. Shape suffixes used throughout this package:
    T tokens (batch x sequence, flattened)   D hidden width   F expert width   E experts   K slots of a token
"""

from llava_moe.moe.build import LAYERS, LayerPlan, build_layer
from llava_moe.moe.capacity import Capacity
from llava_moe.moe.controllers import CONTROLLERS, Controller, LayerStats, StepStats
from llava_moe.moe.experts import EXPERTS, Experts, SharedExperts, StackedExperts
from llava_moe.moe.growth import GROWERS, DecoderShape, Grower
from llava_moe.moe.kernels import KERNELS
from llava_moe.moe.layer import MoELayer
from llava_moe.moe.losses import BALANCE_LOSSES, BalanceLoss
from llava_moe.moe.routers import ROUTERS, Router, TopKRouter
from llava_moe.moe.scope import RoutingScope
from llava_moe.moe.scorers import SCORERS, Scorer
from llava_moe.moe.selectors import SELECTORS, Selector
from llava_moe.moe.types import MlpSpec, Routing, RoutingContext, SiteKey
from llava_moe.moe.upcycling import UPCYCLERS, Upcycler

__all__ = [
    "BALANCE_LOSSES",
    "CONTROLLERS",
    "EXPERTS",
    "GROWERS",
    "KERNELS",
    "LAYERS",
    "ROUTERS",
    "SCORERS",
    "SELECTORS",
    "UPCYCLERS",
    "BalanceLoss",
    "Capacity",
    "Controller",
    "DecoderShape",
    "Experts",
    "Grower",
    "LayerPlan",
    "LayerStats",
    "MlpSpec",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingScope",
    "Scorer",
    "Selector",
    "SharedExperts",
    "SiteKey",
    "StackedExperts",
    "StepStats",
    "TopKRouter",
    "Upcycler",
    "build_layer",
]
