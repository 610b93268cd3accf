"""`plain`: caption pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llava_moe.data.conversation import ConversationTemplate, Segment, TemplateError
from llava_moe.data.schema import IMAGE_MARKER, Turn


class PlainTemplate(ConversationTemplate):
    """Caption pretraining (LLaVA, stage 1): the question is thrown away, the image is followed by its caption.

    LLaVA's `conv_llava_plain`: `<image>caption` and a newline, which is learned like the caption.
    """

    name: ClassVar[str] = "plain"
    takes_system: ClassVar[bool] = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        self.end_text = "\n"

    def _render(self, system: str | None, turns: Sequence[Turn]) -> list[Segment]:
        markers = IMAGE_MARKER * turns[0].text.count(IMAGE_MARKER)
        if len(turns) > 2 or not markers:
            raise TemplateError(
                f"template 'plain' holds one image question and its caption, found {len(turns)} turn(s) and "
                f"{len(markers) // len(IMAGE_MARKER)} image(s) in the first; use another template for chats"
            )
        segments = [Segment(markers, is_target=False)]
        # one segment: tokenizers join a full stop and the newline behind it
        segments += [Segment(f"{turn.text}\n", is_target=True, is_verbatim=True) for turn in turns[1:]]
        return segments
