"""`chatml_direct`: the format of LLaVA-1.6-34B (Nous-Hermes-2-Yi)."""

from __future__ import annotations

from typing import ClassVar

from llava_moe.data.templates.mpt import MptTemplate


class ChatMLDirectTemplate(MptTemplate):
    """LLaVA-NeXT's `conv_chatml_direct`: as `mpt`, with a shorter system prompt."""

    name: ClassVar[str] = "chatml_direct"
    default_system: ClassVar[str | None] = "Answer the questions."
