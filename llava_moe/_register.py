"""Makes our classes known to transformers, so that `AutoModelForImageTextToText.from_pretrained` finds them."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration, LlavaMoeModel
from llava_moe.model.vision import TimmTower, TimmTowerConfig


def register() -> None:
    """Idempotent."""
    AutoConfig.register(LlavaMoeConfig.model_type, LlavaMoeConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaMoeConfig, LlavaMoeForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaMoeConfig, LlavaMoeProcessor, exist_ok=True)
    AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig, exist_ok=True)
    AutoModel.register(TimmTowerConfig, TimmTower, exist_ok=True)
    # Without a mapping a stock checkpoint would lose its lm_head under our model_type. The files use the names of
    # llava-hf, and each expert its own tensor as in transformers' Qwen MoE files, so stock readers find their way.
    mapping = get_checkpoint_conversion_mapping("llava") + get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(LlavaMoeConfig.model_type, mapping, overwrite=True)
    # The inner model has a mapping under its class name: `language_model.model.layers...` on disk.
    inner = get_checkpoint_conversion_mapping("LlavaModel")
    if inner is not None:
        register_checkpoint_conversion_mapping(LlavaMoeModel.__name__, inner, overwrite=True)
