"""`mistral_instruct`: the format of LLaVA-1.6-Mistral."""

from __future__ import annotations

from typing import ClassVar

from llava_moe.data.templates.inst import InstTurns


class MistralInstructTemplate(InstTurns):
    """LLaVA-NeXT's `conv_mistral_instruct`: no system prompt, and rounds are joined as `</s>[INST]`.

    A record's own system message is written as LLaVA's code would write one, between `<<SYS>>` marks.
    """

    name: ClassVar[str] = "mistral_instruct"
    repeats_bos: ClassVar[bool] = False
