"""Scorers by name: the first half of a router, (T, D) to (T, E)."""

from llava_moe.moe.scorers.base import Scorer, Scores, float32_linear
from llava_moe.moe.scorers.cosine import CosineScorer
from llava_moe.moe.scorers.grap import GrapScorer
from llava_moe.moe.scorers.hyper import HyperScorer
from llava_moe.moe.scorers.linear import LinearScorer
from llava_moe.moe.scorers.logit_norm import LogitNormScorer
from llava_moe.moe.scorers.noisy_linear import NoisyLinearScorer
from llava_moe.moe.scorers.perturbed_cosine import PerturbedCosineScorer
from llava_moe.moe.scorers.two_layer import TwoLayerScorer
from llava_moe.moe.scorers.xmoe import XMoEScorer
from llava_moe.registry import Registry

SCORERS: Registry[type[Scorer]] = Registry("scorer")
SCORERS.register("linear", LinearScorer)
SCORERS.register("noisy_linear", NoisyLinearScorer)
SCORERS.register("cosine", CosineScorer)
SCORERS.register("perturbed_cosine", PerturbedCosineScorer)
SCORERS.register("xmoe", XMoEScorer)
SCORERS.register("hyper", HyperScorer)
SCORERS.register("logit_norm", LogitNormScorer)
SCORERS.register("two_layer", TwoLayerScorer)
SCORERS.register("grap", GrapScorer)

__all__ = ["SCORERS", "LinearScorer", "Scorer", "Scores", "float32_linear"]
