"""Balance losses by name. They are unweighted; coefficients and all scaling live in `training/objective.py`."""

from llava_moe.moe.losses.base import BalanceLoss, masked_mean
from llava_moe.moe.losses.competition import Competition
from llava_moe.moe.losses.diversity import Diversity
from llava_moe.moe.losses.entropy import Entropy
from llava_moe.moe.losses.global_batch import GlobalBatch
from llava_moe.moe.losses.gshard import GShard
from llava_moe.moe.losses.heterogeneous import Heterogeneous
from llava_moe.moe.losses.importance_load import ImportanceLoad
from llava_moe.moe.losses.localised import Localised
from llava_moe.moe.losses.locality import Locality
from llava_moe.moe.losses.max_z import MaxZ
from llava_moe.moe.losses.null_reward import NullReward
from llava_moe.moe.losses.relu_l1 import ReluL1
from llava_moe.moe.losses.sequence import Sequence
from llava_moe.moe.losses.switch import Switch
from llava_moe.moe.losses.z import RouterZ
from llava_moe.registry import Registry

BALANCE_LOSSES: Registry[type[BalanceLoss]] = Registry("balance loss")
BALANCE_LOSSES.register("switch", Switch)
BALANCE_LOSSES.register("z", RouterZ)
BALANCE_LOSSES.register("gshard", GShard)
BALANCE_LOSSES.register("sequence", Sequence)
BALANCE_LOSSES.register("global_batch", GlobalBatch)
BALANCE_LOSSES.register("heterogeneous", Heterogeneous)
BALANCE_LOSSES.register("importance_load", ImportanceLoad)
BALANCE_LOSSES.register("entropy", Entropy)
BALANCE_LOSSES.register("max_z", MaxZ)
BALANCE_LOSSES.register("localised", Localised)
BALANCE_LOSSES.register("locality", Locality)
BALANCE_LOSSES.register("relu_l1", ReluL1)
BALANCE_LOSSES.register("competition", Competition)
BALANCE_LOSSES.register("diversity", Diversity)
BALANCE_LOSSES.register("null_reward", NullReward)

__all__ = ["BALANCE_LOSSES", "BalanceLoss", "masked_mean"]
