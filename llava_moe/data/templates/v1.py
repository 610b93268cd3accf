"""`v1`: Vicuna chat, the format of LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llava_moe.data.conversation import ConversationTemplate, Segment
from llava_moe.data.schema import Turn
from llava_moe.data.templates.jinja import REFUSE_ROLE, split_system

VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class VicunaTemplate(ConversationTemplate):
    """Vicuna v1.1 as LLaVA-1.5 uses it: `SYSTEM USER: question ASSISTANT: answer</s>USER: ...`.

    LLaVA's `conv_vicuna_v1`, separator style TWO.
    """

    name: ClassVar[str] = "v1"
    jinja: ClassVar[str | None] = (
        f"{split_system('v1', VICUNA_SYSTEM_PROMPT, takes_system=True)}{{{{- system + ' ' -}}}}"
        "{%- for message in turns -%}{%- if message['role'] == 'user' -%}"
        "{{- 'USER: ' + flatten(message['content']) + ' ' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- 'ASSISTANT: ' + flatten(message['content']) + eos_token -}}"
        f"{{%- else -%}}{REFUSE_ROLE}{{%- endif -%}}{{%- endfor -%}}"
        "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
    )

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        self._eos = self._require_own("eos_token", "ends answers")

    def _render(self, system: str | None, turns: Sequence[Turn]) -> list[Segment]:
        segments = [Segment(VICUNA_SYSTEM_PROMPT if system is None else system, is_target=False, is_verbatim=True)]
        for index, turn in enumerate(turns):
            # the space goes with the text behind it, as in every tokenizer's own pre-tokenisation
            if turn.role == "user":
                segments += [
                    Segment(" USER:" if index == 0 else "USER:", is_target=False),
                    Segment(f" {turn.text}", is_target=False, is_verbatim=True),
                    Segment(" ASSISTANT:", is_target=False),
                ]
            else:
                segments += [
                    Segment(f" {turn.text}", is_target=True, is_verbatim=True),
                    Segment(self._eos, is_target=True),
                ]
        return segments
