"""Balance losses by name. They are unweighted; coefficients and all scaling live in `training/objective.py`."""

from llava_moe.moe.losses.base import BalanceLoss
from llava_moe.moe.losses.switch import switch
from llava_moe.moe.losses.z import z
from llava_moe.registry import Registry

BALANCE_LOSSES: Registry[BalanceLoss] = Registry("balance loss")
BALANCE_LOSSES.register("switch", switch)
BALANCE_LOSSES.register("z", z)

__all__ = ["BALANCE_LOSSES", "BalanceLoss"]
