"""The conversation templates a recipe can name: one file and one line here for each.

`plain` and `v1` reproduce LLaVA-1.5 (caption pretraining and Vicuna chat); `chatml` is what Qwen-style tokenizers use,
without a system prompt; `chat_template` renders whatever Jinja template the tokenizer ships. The others are the formats
of LLaVA, LLaVA-NeXT (LLaVA-1.6) and LLaVA++ under the names that these use.
"""

from __future__ import annotations

from llava_moe.data.templates.chat_template import ShippedChatTemplate
from llava_moe.data.templates.chatml import ChatMLTemplate
from llava_moe.data.templates.chatml_direct import ChatMLDirectTemplate
from llava_moe.data.templates.gemma import GemmaTemplate
from llava_moe.data.templates.llava_llama_2 import LlavaLlama2Template
from llava_moe.data.templates.llava_llama_3 import LlavaLlama3Template
from llava_moe.data.templates.mistral_instruct import MistralInstructTemplate
from llava_moe.data.templates.mpt import MptTemplate
from llava_moe.data.templates.phi3 import Phi3Template
from llava_moe.data.templates.plain import PlainTemplate
from llava_moe.data.templates.qwen_1_5 import Qwen15Template
from llava_moe.data.templates.registry import TEMPLATES
from llava_moe.data.templates.v1 import VicunaTemplate

TEMPLATES.register("plain", PlainTemplate)
TEMPLATES.register("v1", VicunaTemplate)
TEMPLATES.register("chatml", ChatMLTemplate)
TEMPLATES.register("llava_llama_2", LlavaLlama2Template)
TEMPLATES.register("mistral_instruct", MistralInstructTemplate)
TEMPLATES.register("mpt", MptTemplate)
TEMPLATES.register("chatml_direct", ChatMLDirectTemplate)
TEMPLATES.register("qwen_1_5", Qwen15Template)
TEMPLATES.register("llava_llama_3", LlavaLlama3Template)
TEMPLATES.register("phi3", Phi3Template)
TEMPLATES.register("gemma", GemmaTemplate)
TEMPLATES.register("chat_template", ShippedChatTemplate)

__all__ = ["TEMPLATES"]
