"""`llava_llama_2`: Llama-2-Chat."""

from __future__ import annotations

from typing import ClassVar

from llava_moe.data.templates.inst import InstTurns

LLAVA_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


class LlavaLlama2Template(InstTurns):
    """LLaVA's `conv_llava_llama_2`: rounds are joined as `</s><s>[INST]`."""

    name: ClassVar[str] = "llava_llama_2"
    default_system: ClassVar[str | None] = LLAVA_SYSTEM_PROMPT
    repeats_bos: ClassVar[bool] = True
