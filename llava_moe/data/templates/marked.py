"""The shape that most formats share: every message stands between a header and an end marker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llava_moe.data.conversation import ConversationTemplate, Segment
from llava_moe.data.schema import Turn
from llava_moe.data.templates.jinja import REFUSE_ROLE, literal, split_system


class MarkedTurns(ConversationTemplate):
    """`header text end separator`, message after message; a subclass says which, and its Jinja twin follows from that.

    A subclass sets `name`, `user_header`, `assistant_header`, `end` and `markers`, and the others where they differ.

    Attributes:
        system_header, user_header, assistant_header: what stands in front of a message.
        end: what stands behind it, and is learned behind an answer.
        separator: the format's own text behind `end`, not learned.
        markers: the tokens of the format, each of which must be one token.
        default_system: the system message of conversations that bring none; None: there is none then.
        writes_bos: the text itself begins with the tokenizer's bos_token.
        strips_texts: white space around messages is removed.
        learns_header, learns_separator: an option of a subclass can make these parts of an answer's message targets.
    """

    system_header: ClassVar[str] = ""
    user_header: ClassVar[str]
    assistant_header: ClassVar[str]
    end: ClassVar[str]
    separator: ClassVar[str] = ""
    markers: ClassVar[tuple[str, ...]]
    default_system: ClassVar[str | None] = None
    writes_bos: ClassVar[bool] = False
    strips_texts: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.jinja = _twin(cls)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        for marker in self.markers:
            self._require_token(marker)
        self._bos = self._require_own("bos_token", "begins") if self.writes_bos else ""
        self.end_text = self.end
        self.learns_header = False
        self.learns_separator = False

    def _render(self, system: str | None, turns: Sequence[Turn]) -> list[Segment]:
        system = self.default_system if system is None else system
        segments = [Segment(self._bos, is_target=False)]
        if system is not None:
            segments += self._message(self.system_header, system, is_answer=False)
        for turn in turns:
            is_answer = turn.role == "assistant"
            header = self.assistant_header if is_answer else self.user_header
            segments += self._message(header, turn.text, is_answer=is_answer)
        if turns[-1].role == "user":
            segments.append(Segment(self.assistant_header, self.learns_header))
        return segments

    def _message(self, header: str, text: str, *, is_answer: bool) -> list[Segment]:
        return [
            Segment(header, is_answer and self.learns_header),
            Segment(text.strip() if self.strips_texts else text, is_answer, is_verbatim=True),
            Segment(self.end, is_answer),
            Segment(self.separator, is_answer and self.learns_separator),
        ]


def _twin(cls: type[MarkedTurns]) -> str:
    tail = literal(cls.end + cls.separator)
    strip = " | trim" if cls.strips_texts else ""
    bos = "{{- bos_token -}}" if cls.writes_bos else ""
    return (
        f"{split_system(cls.name, cls.default_system, takes_system=cls.takes_system)}{bos}"
        f"{{%- if system -%}}{{{{- {literal(cls.system_header)} + (system{strip}) + {tail} -}}}}{{%- endif -%}}"
        "{%- for message in turns -%}"
        f"{{%- if message['role'] == 'user' -%}}{{{{- {literal(cls.user_header)} -}}}}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{- {literal(cls.assistant_header)} -}}}}"
        f"{{%- else -%}}{REFUSE_ROLE}{{%- endif -%}}"
        f"{{{{- (flatten(message['content']){strip}) + {tail} -}}}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- {literal(cls.assistant_header)} -}}}}{{%- endif -%}}"
    )
