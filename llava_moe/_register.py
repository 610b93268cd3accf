"""Makes our classes known to transformers, so that `AutoModelForImageTextToText.from_pretrained` finds them."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.model.families import FAMILIES, Family
from llava_moe.model.foreign import register_foreign
from llava_moe.model.vision import TimmTower, TimmTowerConfig
from llava_moe.model.vision_composite import FusedTower, FusedTowerConfig, MultiScaleTower, MultiScaleTowerConfig

_TOWERS = ((TimmTowerConfig, TimmTower), (FusedTowerConfig, FusedTower), (MultiScaleTowerConfig, MultiScaleTower))


def register() -> None:
    """Idempotent."""
    for name in FAMILIES:
        _register_family(FAMILIES.get(name))
    register_foreign()
    for config, tower in _TOWERS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, tower, exist_ok=True)


def _register_family(family: Family) -> None:
    AutoConfig.register(family.model_type, family.config, exist_ok=True)
    AutoModelForImageTextToText.register(family.config, family.model, exist_ok=True)
    AutoProcessor.register(family.config, LlavaMoeProcessor, exist_ok=True)
    # Without a mapping a stock checkpoint would lose its lm_head under our model_type. The files use the names of
    # llava-hf, and each expert its own tensor as in transformers' Qwen MoE files, so stock readers find their way.
    mapping = get_checkpoint_conversion_mapping(family.stock_type) + get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(family.model_type, mapping, overwrite=True)
    # The inner model has a mapping under its class name: `language_model.model.layers...` on disk.
    inner = get_checkpoint_conversion_mapping("LlavaModel")
    if inner is not None:
        register_checkpoint_conversion_mapping(family.inner.__name__, inner, overwrite=True)
