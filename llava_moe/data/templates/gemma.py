"""`gemma`: the format of LLaVA-NeXT on Gemma."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llava_moe.data.templates.marked import MarkedTurns


class GemmaTemplate(MarkedTurns):
    """LLaVA-NeXT's `conv_gemma_instruct`. Gemma knows no system messages."""

    name: ClassVar[str] = "gemma"
    takes_system: ClassVar[bool] = False
    user_header: ClassVar[str] = "<start_of_turn>user\n"
    assistant_header: ClassVar[str] = "<start_of_turn>model\n"
    end: ClassVar[str] = "<end_of_turn>"
    separator: ClassVar[str] = "\n"
    markers: ClassVar[tuple[str, ...]] = ("<start_of_turn>", "<end_of_turn>")

    @dataclass(frozen=True)
    class Config:
        """Options.

        Attributes:
            llava_next_labels: labels as LLaVA-NeXT's `preprocess_gemma` makes them: the newline behind an answer's
                `<end_of_turn>` is learned too. False: the answer and its `<end_of_turn>`.
        """

        llava_next_labels: bool = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        self.learns_separator = self.config.llava_next_labels
