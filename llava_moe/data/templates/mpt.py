"""`mpt`: ChatML groups without newlines between them, the format of LLaVA-MPT."""

from __future__ import annotations

from typing import ClassVar

from llava_moe.data.templates.chatml import ChatMLTemplate


class MptTemplate(ChatMLTemplate):
    """LLaVA's `conv_mpt`, separator style MPT: nothing stands between `<|im_end|>` and the next `<|im_start|>`."""

    name: ClassVar[str] = "mpt"
    separator: ClassVar[str] = ""
    default_system: ClassVar[str | None] = (
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    )
