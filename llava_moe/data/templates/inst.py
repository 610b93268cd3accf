"""The shape of Llama 2 and Mistral chats: `[INST] question [/INST] answer </s>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llava_moe.data.conversation import ConversationTemplate, Segment
from llava_moe.data.schema import Turn
from llava_moe.data.templates.jinja import REFUSE_ROLE, literal, split_system


class InstTurns(ConversationTemplate):
    """LLaVA's separator style LLAMA_2: a system message stands inside the first question, between `<<SYS>>` marks.

    The beginning of the first round is left to the tokenizer, which puts its bos_token in front of any text.

    Attributes:
        default_system: the system message of conversations that bring none; None: there is none then.
        repeats_bos: every later question begins with the tokenizer's bos_token too.
    """

    default_system: ClassVar[str | None] = None
    repeats_bos: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.jinja = _twin(cls)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        self._bos = self._require_own("bos_token", "begins later questions") if self.repeats_bos else ""
        self._eos = self._require_own("eos_token", "ends answers")

    def _render(self, system: str | None, turns: Sequence[Turn]) -> list[Segment]:
        system = self.default_system if system is None else system
        segments: list[Segment] = []
        for turn in turns:
            # a space goes with the text behind it, as in every tokenizer's own pre-tokenisation
            if turn.role == "assistant":
                segments += [
                    Segment(f" {turn.text} ", is_target=True, is_verbatim=True),
                    Segment(self._eos, is_target=True),
                ]
                continue
            if not segments and system is not None:
                segments.append(Segment("[INST] <<SYS>>\n", is_target=False))
                question = f"{system}\n<</SYS>>\n\n{turn.text}"
            else:
                segments.append(Segment(f"{self._bos if segments else ''}[INST]", is_target=False))
                question = f" {turn.text}"
            segments += [Segment(question, is_target=False, is_verbatim=True), Segment(" [/INST]", is_target=False)]
        return segments


def _twin(cls: type[InstTurns]) -> str:
    bos = "{%- if not loop.first -%}{{- bos_token -}}{%- endif -%}" if cls.repeats_bos else ""
    return (
        f"{split_system(cls.name, cls.default_system, takes_system=cls.takes_system)}"
        "{%- for message in turns -%}{%- if message['role'] == 'user' -%}"
        f"{bos}{{{{- '[INST] ' -}}}}"
        f"{{%- if loop.first and system -%}}"
        f"{{{{- {literal('<<SYS>>' + chr(10))} + system + {literal(chr(10) + '<</SYS>>' + chr(10) * 2)} -}}}}"
        "{%- endif -%}{{- flatten(message['content']) + ' [/INST]' -}}"
        "{%- elif message['role'] == 'assistant' -%}{{- ' ' + flatten(message['content']) + ' ' + eos_token -}}"
        f"{{%- else -%}}{REFUSE_ROLE}{{%- endif -%}}{{%- endfor -%}}"
    )
