"""`chat_template`: whatever Jinja template the tokenizer ships."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
from transformers import PreTrainedTokenizerBase

from llava_moe.data.conversation import ConversationTemplate, Segment, TemplateError
from llava_moe.data.schema import IMAGE_MARKER, Turn
from llava_moe.data.templates.registry import TEMPLATES


class ShippedChatTemplate(ConversationTemplate):
    """The Jinja template that the tokenizer ships.

    An answer's target is what the rendering with it has beyond the rendering with the generation prompt, up to its end
    token. Texts are stripped first, because many templates do that themselves. The template is rendered with stand-ins
    for the texts, so that it is known which parts are its own; that the stand-ins are faithful is checked each time.
    """

    name: ClassVar[str] = "chat_template"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        if not tokenizer.chat_template:
            raise TemplateError(
                "template 'chat_template' was asked for, but the checkpoint ships none; "
                f"set template to one of {', '.join(name for name in TEMPLATES.names() if name != self.name)}"
            )
        self._described = f"the chat template of {tokenizer.name_or_path or 'this tokenizer'}"
        self._takes_parts = self._probe_takes_parts()
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special += [token for token in (tokenizer.eos_token,) if token]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        tail = self._split(self._render_pair([Turn("user", "a")], Turn("assistant", "b"))[1], ["a", "b"])[-1]
        end = None if tail.is_verbatim else self._special.search(tail.text)
        self.end_text = end.group() if end else None

    def _probe_takes_parts(self) -> bool:
        """Whether messages are lists of parts (processor style) instead of strings."""
        for takes_parts, content in ((False, "\ue000"), (True, [{"type": "text", "text": "\ue000"}])):
            try:
                if "\ue000" in self._apply([{"role": "user", "content": content}], True):
                    return takes_parts
            except TemplateError:
                continue
        raise TemplateError(f"{self._described} shows the text of a user message neither as a string nor as parts")

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, tokenize=False
                )
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateError(f"{self._described} refuses the conversation: {error}") from error

    def _messages(self, turns: Sequence[Turn], texts: list[str] | None) -> list[dict[str, Any]]:
        """Messages for the template. With `texts`, each text is replaced by a stand-in and appended to that list."""

        def shown(text: str) -> str:
            if texts is None:
                return text
            texts.append(text)
            return _stand_in(len(texts) - 1)

        messages = []
        for turn in turns:
            content: Any
            if self._takes_parts:
                content = []
                for index, piece in enumerate(turn.text.split(IMAGE_MARKER)):
                    content += [{"type": "image"}] if index > 0 else []
                    content += [{"type": "text", "text": shown(piece.strip())}] if piece.strip() else []
                content = content or [{"type": "text", "text": shown("")}]
            else:
                content = shown(turn.text.strip())
            messages.append({"role": turn.role, "content": content})
        return messages

    def _render_pair(self, turns: Sequence[Turn], answer: Turn) -> tuple[str, str]:
        """The prompt (with stand-ins) that waits for `answer`, and what the answer adds to it."""
        prompt = self._apply(self._messages(turns, []), True)
        full = self._apply(self._messages([*turns, answer], []), False)
        if not full.startswith(prompt):
            raise TemplateError(
                f"{self._described} is not prefix-stable: the conversation with an answer does not start with its "
                "generation prompt, so training and use would disagree; choose another template or mend the Jinja file"
            )
        return prompt, full[len(prompt) :]

    def _render(self, system: str | None, turns: Sequence[Turn]) -> list[Segment]:
        head = [] if system is None else [Turn("system", system)]
        turns = [*head, *turns]
        texts: list[str] = []
        rendered = self._apply(self._messages(turns, texts), turns[-1].role == "user")
        actual = self._apply(self._messages(turns, None), turns[-1].role == "user")
        if "".join(segment.text for segment in self._split(rendered, texts)) != actual:
            raise TemplateError(
                f"{self._described} rewrites the text of messages; choose another template for these records"
            )
        if head and _stand_in(0) not in rendered:
            raise TemplateError(
                f"{self._described} leaves the system message out; remove it or choose another template"
            )
        segments: list[Segment] = []
        done = ""
        for index in range(len(head) + 1, len(turns), 2):
            prompt, added = self._render_pair(turns[:index], turns[index])
            segments += self._split(self._beyond(done, prompt), texts)
            segments += self._answer(self._split(added, texts), is_training=turns[-1].role == "assistant")
            done = prompt + added
        return segments + self._split(self._beyond(done, rendered), texts)

    def _beyond(self, done: str, longer: str) -> str:
        if not longer.startswith(done):
            raise TemplateError(
                f"{self._described} is not prefix-stable: a later turn changes how earlier turns are rendered, so one "
                "sequence cannot hold several answers; use single-turn records or another template"
            )
        return longer[len(done) :]

    def _answer(self, segments: list[Segment], *, is_training: bool) -> list[Segment]:
        """Marks an answer up to its end token as target."""
        tail = segments[-1]
        end = None if tail.is_verbatim else self._special.search(tail.text)
        if end is None and not is_training:
            return segments
        if end is None:
            raise TemplateError(
                f"{self._described} ends answers with no special token, so a model trained on it would never stop; "
                "choose another template for training"
            )
        body = [Segment(segment.text, True, segment.is_verbatim) for segment in segments[:-1]]
        return [*body, Segment(tail.text[: end.end()], True), Segment(tail.text[end.end() :], False)]

    def _split(self, rendered: str, texts: list[str]) -> list[Segment]:
        """Puts the texts back for their stand-ins. Spaces in front of a text are tokenised with it."""
        segments: list[Segment] = []
        for index, piece in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
            if index % 2 == 0:
                segments.append(Segment(piece, is_target=False))
                continue
            own = segments[-1].text.rstrip(" ")
            spaces = segments[-1].text[len(own) :]
            segments[-1:] = [Segment(own, False), Segment(spaces + texts[int(piece)], False, is_verbatim=True)]
        return [segment for segment in segments if segment.text] or [Segment("", is_target=False)]


def _stand_in(index: int) -> str:
    """What is rendered for the text of that index: private-use characters, which no template treats specially."""
    return f"\ue000{index}\ue001"
