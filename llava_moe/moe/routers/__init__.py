"""Routers by name."""

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.base_layer import BaseLayerRouter
from llava_moe.moe.routers.compete_smoe import CompeteSMoERouter
from llava_moe.moe.routers.cosine import CosineRouter
from llava_moe.moe.routers.deepseek_v2 import DeepSeekV2Router
from llava_moe.moe.routers.deepseek_v3 import DeepSeekV3Router
from llava_moe.moe.routers.dense import DenseRouter
from llava_moe.moe.routers.dts import DtsRouter
from llava_moe.moe.routers.expert_choice import ExpertChoiceRouter
from llava_moe.moe.routers.expert_token_resonance import ExpertTokenResonanceRouter
from llava_moe.moe.routers.hash import HashRouter
from llava_moe.moe.routers.hyper_moe import HyperMoERouter
from llava_moe.moe.routers.hyper_router import HyperRouter
from llava_moe.moe.routers.locmoe import LocMoERouter
from llava_moe.moe.routers.modality import ModalityRouter
from llava_moe.moe.routers.moe_plus_plus import MoEPlusPlusRouter
from llava_moe.moe.routers.noisy_top_k import NoisyTopKRouter
from llava_moe.moe.routers.perturbed_cosine import PerturbedCosineRouter
from llava_moe.moe.routers.random import RandomRouter
from llava_moe.moe.routers.remoe import ReMoERouter
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.routers.sigmoid import SigmoidRouter
from llava_moe.moe.routers.skywork import SkyworkRouter
from llava_moe.moe.routers.tc_moe import TCMoERouter
from llava_moe.moe.routers.top_k import TopKRouter
from llava_moe.moe.routers.top_p import TopPRouter
from llava_moe.moe.routers.xmoe import XMoERouter
from llava_moe.registry import Registry

ROUTERS: Registry[type[Router]] = Registry("router")
ROUTERS.register("top_k", TopKRouter)
ROUTERS.register("scored", ScoredRouter)
ROUTERS.register("noisy_top_k", NoisyTopKRouter)
ROUTERS.register("sigmoid", SigmoidRouter)
ROUTERS.register("cosine", CosineRouter)
ROUTERS.register("perturbed_cosine", PerturbedCosineRouter)
ROUTERS.register("xmoe", XMoERouter)
ROUTERS.register("hyper_router", HyperRouter)
ROUTERS.register("deepseek_v2", DeepSeekV2Router)
ROUTERS.register("deepseek_v3", DeepSeekV3Router)
ROUTERS.register("remoe", ReMoERouter)
ROUTERS.register("dts", DtsRouter)
ROUTERS.register("skywork", SkyworkRouter)
ROUTERS.register("top_p", TopPRouter)
ROUTERS.register("dense", DenseRouter)
ROUTERS.register("random", RandomRouter)
ROUTERS.register("hash", HashRouter)
ROUTERS.register("base_layer", BaseLayerRouter)
ROUTERS.register("compete_smoe", CompeteSMoERouter)
ROUTERS.register("expert_choice", ExpertChoiceRouter)
ROUTERS.register("expert_token_resonance", ExpertTokenResonanceRouter)
ROUTERS.register("hyper_moe", HyperMoERouter)
ROUTERS.register("locmoe", LocMoERouter)
ROUTERS.register("modality", ModalityRouter)
ROUTERS.register("moe_plus_plus", MoEPlusPlusRouter)
ROUTERS.register("tc_moe", TCMoERouter)

__all__ = ["ROUTERS", "Router", "ScoredRouter", "TopKRouter"]
