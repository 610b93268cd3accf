"""`qwen_1_5`: the format of LLaVA-NeXT and LLaVA-OneVision on Qwen 1.5 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llava_moe.data.templates.chatml import ChatMLTemplate


class Qwen15Template(ChatMLTemplate):
    """LLaVA-NeXT's `conv_qwen`: ChatML with the system prompt "You are a helpful assistant."."""

    name: ClassVar[str] = "qwen_1_5"
    default_system: ClassVar[str | None] = "You are a helpful assistant."

    @dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            llava_next_labels: labels as LLaVA-NeXT's `preprocess_qwen` makes them: the whole message of an answer is
                learned, with its header and final newline, and so are `<|im_start|>`, `<|im_end|>` and the token of a
                single newline wherever they stand, also in the system message and in questions. False: the answer
                and its `<|im_end|>`.
        """

        llava_next_labels: bool = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        if self.config.llava_next_labels:
            self.learns_header = self.learns_separator = True
            self.learned_anywhere = ("<|im_start|>", "<|im_end|>", "\n")
