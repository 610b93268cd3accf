"""`phi3`: the format of LLaVA++ (LLaVA-Phi-3) on Phi-3 and Phi-3.5."""

from __future__ import annotations

from typing import ClassVar

from llava_moe.data.templates.marked import MarkedTurns


class Phi3Template(MarkedTurns):
    """LLaVA++'s `conv_phi3_instruct`: Phi-3's own chat format with the system prompt "You are a helpful AI assistant.".

    The newlines are part of the text, but Phi-3's own tokenizer swallows those behind its markers.
    """

    name: ClassVar[str] = "phi3"
    system_header: ClassVar[str] = "<|system|>\n"
    user_header: ClassVar[str] = "\n<|user|>\n"
    assistant_header: ClassVar[str] = "\n<|assistant|>\n"
    end: ClassVar[str] = "<|end|>"
    markers: ClassVar[tuple[str, ...]] = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    default_system: ClassVar[str | None] = "You are a helpful AI assistant."
