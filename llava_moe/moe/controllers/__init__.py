"""Controllers by name."""

from llava_moe.moe.controllers.base import Controller, knobs
from llava_moe.moe.controllers.capacity import CapacityFactor
from llava_moe.moe.controllers.competition import CompetitionSchedule
from llava_moe.moe.controllers.k_schedule import KSchedule
from llava_moe.moe.controllers.loss_free_bias import LossFreeBias
from llava_moe.moe.controllers.remoe_lambda import ReMoELambda
from llava_moe.moe.controllers.skywork_alpha import SkyworkAlpha
from llava_moe.moe.controllers.stats import LayerStats, StepStats, StepSums
from llava_moe.moe.controllers.temperature import Temperature
from llava_moe.registry import Registry

CONTROLLERS: Registry[type[Controller]] = Registry("controller")
CONTROLLERS.register("loss_free_bias", LossFreeBias)
CONTROLLERS.register("remoe_lambda", ReMoELambda)
CONTROLLERS.register("skywork_alpha", SkyworkAlpha)
CONTROLLERS.register("temperature", Temperature)
CONTROLLERS.register("k_schedule", KSchedule)
CONTROLLERS.register("competition", CompetitionSchedule)
CONTROLLERS.register("capacity", CapacityFactor)

__all__ = ["CONTROLLERS", "Controller", "LayerStats", "StepStats", "StepSums", "knobs"]
