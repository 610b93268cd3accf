"""Ways to make experts out of a dense feed-forward block, by name."""

from llava_moe.moe.upcycling.base import Contract, DenseMlp, UpcycleJob, Upcycler, split_shared
from llava_moe.moe.upcycling.branch_train_mix import BranchTrainMix, mean_tensor
from llava_moe.moe.upcycling.copy import Copy
from llava_moe.moe.upcycling.drop import Drop
from llava_moe.moe.upcycling.from_scratch import FromScratch
from llava_moe.moe.upcycling.noise import Noise
from llava_moe.moe.upcycling.partition_cluster import PartitionCluster
from llava_moe.moe.upcycling.partition_coactivation import PartitionCoactivation
from llava_moe.moe.upcycling.partition_gradient import PartitionGradient
from llava_moe.moe.upcycling.partition_random import PartitionRandom
from llava_moe.moe.upcycling.sharing_inner import SharingInner
from llava_moe.moe.upcycling.sharing_inter import SharingInter
from llava_moe.moe.upcycling.statistics import NeuronAccumulator, NeuronStatistics, collect_statistics
from llava_moe.moe.upcycling.virtual_group import VirtualGroup
from llava_moe.registry import Registry

UPCYCLERS: Registry[type[Upcycler]] = Registry("upcycler")
UPCYCLERS.register("copy", Copy)
UPCYCLERS.register("noise", Noise)
UPCYCLERS.register("drop", Drop)
UPCYCLERS.register("virtual_group", VirtualGroup)
UPCYCLERS.register("partition_random", PartitionRandom)
UPCYCLERS.register("partition_cluster", PartitionCluster)
UPCYCLERS.register("partition_coactivation", PartitionCoactivation)
UPCYCLERS.register("partition_gradient", PartitionGradient)
UPCYCLERS.register("sharing_inner", SharingInner)
UPCYCLERS.register("sharing_inter", SharingInter)
UPCYCLERS.register("branch_train_mix", BranchTrainMix)
UPCYCLERS.register("from_scratch", FromScratch)

__all__ = [
    "UPCYCLERS",
    "Contract",
    "DenseMlp",
    "NeuronAccumulator",
    "NeuronStatistics",
    "UpcycleJob",
    "Upcycler",
    "collect_statistics",
    "mean_tensor",
    "split_shared",
]
