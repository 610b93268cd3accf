"""`llava_llama_3`: the format of LLaVA-NeXT on Llama 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llava_moe.data.templates.llava_llama_2 import LLAVA_SYSTEM_PROMPT
from llava_moe.data.templates.marked import MarkedTurns


class LlavaLlama3Template(MarkedTurns):
    """LLaVA-NeXT's `conv_llava_llama_3`, which is Llama-3-Instruct's own chat template with a system prompt.

    As in that chat template, white space around messages is removed and the text itself begins with the bos_token.
    """

    name: ClassVar[str] = "llava_llama_3"
    system_header: ClassVar[str] = "<|start_header_id|>system<|end_header_id|>\n\n"
    user_header: ClassVar[str] = "<|start_header_id|>user<|end_header_id|>\n\n"
    assistant_header: ClassVar[str] = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    end: ClassVar[str] = "<|eot_id|>"
    markers: ClassVar[tuple[str, ...]] = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    default_system: ClassVar[str | None] = LLAVA_SYSTEM_PROMPT
    writes_bos: ClassVar[bool] = True
    strips_texts: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            llava_next_labels: labels as LLaVA-NeXT's `preprocess_llama3` makes them: the whole message of an answer is
                learned, with its header, and so are the bos_token and the header and end tokens wherever they stand,
                also in the system message and in questions. False: the answer and its `<|eot_id|>`.
        """

        llava_next_labels: bool = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        if self.config.llava_next_labels:
            self.learns_header = True
            # LLaVA-NeXT lists "\n\n" too, but looks it up by that spelling, under which no byte-level vocabulary has
            # it (Llama 3 calls the token "ĊĊ"): it finds nothing, and the blank lines of questions stay masked.
            self.learned_anywhere = (self._bos, *self.markers)
