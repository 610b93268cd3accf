"""`chatml`: what Qwen-style tokenizers use, without a system prompt of its own."""

from __future__ import annotations

from typing import ClassVar

from llava_moe.data.templates.marked import MarkedTurns


class ChatMLTemplate(MarkedTurns):
    """ChatML without a system prompt; the newline behind `<|im_end|>` belongs to the format and is never learned."""

    name: ClassVar[str] = "chatml"
    system_header: ClassVar[str] = "<|im_start|>system\n"
    user_header: ClassVar[str] = "<|im_start|>user\n"
    assistant_header: ClassVar[str] = "<|im_start|>assistant\n"
    end: ClassVar[str] = "<|im_end|>"
    separator: ClassVar[str] = "\n"
    markers: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>")
