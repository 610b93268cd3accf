"""Selectors by name: the second half of a router, scores to experts and weights."""

from llava_moe.moe.selectors.base import Selection, Selector
from llava_moe.moe.selectors.dense import DenseSoftmax
from llava_moe.moe.selectors.dts import DenseToSparse
from llava_moe.moe.selectors.group_limited import GroupLimited
from llava_moe.moe.selectors.relu import ReLUSelector
from llava_moe.moe.selectors.sigmoid import SigmoidTopK, SigmoidTopKRenorm
from llava_moe.moe.selectors.softmax import DoubleSoftmax, SoftmaxTopK, SoftmaxTopKRenorm, TopKSoftmax
from llava_moe.moe.selectors.top_p import TopP
from llava_moe.registry import Registry

SELECTORS: Registry[type[Selector]] = Registry("selector")
SELECTORS.register("softmax_topk_renorm", SoftmaxTopKRenorm)
SELECTORS.register("softmax_topk", SoftmaxTopK)
SELECTORS.register("topk_softmax", TopKSoftmax)
SELECTORS.register("double_softmax", DoubleSoftmax)
SELECTORS.register("sigmoid_topk", SigmoidTopK)
SELECTORS.register("sigmoid_topk_renorm", SigmoidTopKRenorm)
SELECTORS.register("group_limited", GroupLimited)
SELECTORS.register("relu", ReLUSelector)
SELECTORS.register("top_p", TopP)
SELECTORS.register("dense_softmax", DenseSoftmax)
SELECTORS.register("dts", DenseToSparse)

__all__ = ["SELECTORS", "Selection", "Selector"]
