"""From turns to token ids: templates render segments, and the segments are what is tokenised.

The boundary rule. A segment is tokenised by itself, cut only at image markers; no token ever spans two segments. So the
labels need no arithmetic on lengths, and a training sequence up to an answer has the ids of the generation prompt by
construction. To agree with tokenising the whole conversation at once, a template puts its cuts where tokenizers cut
anyway: before a space, after a newline, at a special token; only a text that itself begins with a newline can then
differ. The one thing a tokenizer adds by itself is a leading space (sentencepiece); it is kept exactly where the whole
text would have it, see `SegmentTokenizer`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from llava_moe.data.schema import IMAGE_MARKER, DataError, Turn
from llava_moe.registry import near_misses

IGNORE_INDEX = -100

ImageTokens = int | Sequence[int]
"""Placeholders for every image marker: one number for all of them, or one for each in their order."""

_ANCHORS = ("\n", ":", "x")


class TemplateError(DataError):
    """A template does not fit the tokenizer or the conversation."""


@dataclass(frozen=True)
class Segment:
    """A piece of the prompt. Verbatim text comes from a record, so special tokens spelled in it stay plain text."""

    text: str
    is_target: bool
    is_verbatim: bool = False


class ConversationTemplate(ABC):
    """Turns into segments; the concatenation of their texts is the prompt.

    Attributes:
        name: its name in the registry.
        jinja: the same template for stock tools (`tokenizer.chat_template`), None where there is no such thing.
        takes_system: whether there is a place for a system message in front of the first question.
        config: its options.
        end_text: what ends an answer, the last target of each answer; None if the template has no such text.
        learned_anywhere: texts of tokens that are learned wherever they stand, also in questions. Empty unless an
            option asks for it.

    Raises:
        TemplateError: the tokenizer lacks a token of the template, or an option is unknown or of the wrong type.
    """

    name: ClassVar[str]
    jinja: ClassVar[str | None] = None
    takes_system: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.config: Any = self._parse(options or {})
        self.end_text: str | None = tokenizer.eos_token
        self.learned_anywhere: tuple[str, ...] = ()

    def _parse(self, options: Mapping[str, Any]) -> Any:
        fields = {field.name: field for field in dataclasses.fields(self.Config)}
        for key, value in options.items():
            if key not in fields:
                raise TemplateError(f"template {self.name!r} has no option {key!r}; {near_misses(key, list(fields))}")
            wanted = type(fields[key].default)
            if type(value) is not wanted:
                raise TemplateError(f"template {self.name!r}: option {key}={value!r} must be {wanted.__name__}")
        return self.Config(**options)

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[Segment]:
        """Renders a conversation that ends with an answer, or one that ends with a question and waits for its answer.

        Args:
            turns: alternating, the user first; a system message may stand in front.
            add_generation_prompt: the last turn is the user's, and the header of the answer is appended.

        Raises:
            TemplateError: the turns do not alternate or end with the wrong role, an answer to learn from is empty, or
                the template cannot hold them.
        """
        roles = [turn.role for turn in turns]
        has_system = roles[:1] == ["system"]
        dialogue = turns[1:] if has_system else turns
        last = "user" if add_generation_prompt else "assistant"
        alternating = [("user", "assistant")[index % 2] for index in range(len(dialogue))]
        if not dialogue or roles[-1] != last or roles[has_system:] != alternating:
            raise TemplateError(
                f"template {self.name!r}: turns must start with the user, alternate and end with the {last} "
                f"(add_generation_prompt={add_generation_prompt}), after at most one system message; found {roles}"
            )
        if has_system and not self.takes_system:
            raise TemplateError(
                f"template {self.name!r} has no place for a system message; remove it or choose another template"
            )
        if has_system and not turns[0].text.strip():
            raise TemplateError(f"template {self.name!r}: the system message is empty; remove it")
        if not add_generation_prompt:
            for index, turn in enumerate(turns):
                if turn.role == "assistant" and not turn.text.strip():
                    raise TemplateError(
                        f"template {self.name!r}: turn {index} is an empty answer, from which nothing can be learned; "
                        "remove the question and the answer, or the record"
                    )
        return _joined(self._render(turns[0].text if has_system else None, dialogue))

    @abstractmethod
    def _render(self, system: str | None, turns: Sequence[Turn]) -> list[Segment]:
        """Renders checked turns; a final user turn is followed by the header of its answer.

        Args:
            system: the record's own system message, which replaces that of the template; None if it has none.
            turns: user and assistant in turn.
        """

    def _require_token(self, text: str) -> None:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise TemplateError(
                f"template {self.name!r} needs {text!r} as one token, but this tokenizer makes {len(ids)} of it; "
                "add it with add_special_tokens (and resize the embeddings), or choose another template"
            )

    def _require_own(self, which: Literal["bos_token", "eos_token"], purpose: str) -> str:
        """The tokenizer's own token of that kind."""
        token = getattr(self.tokenizer, which)
        if token is None:
            raise TemplateError(
                f"template {self.name!r} {purpose} with the tokenizer's {which}, and this tokenizer has none"
            )
        self._require_token(str(token))
        return str(token)


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one kind become one segment: fewer cuts, and fewer calls of the tokenizer."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and (last.is_target, last.is_verbatim) == (segment.is_target, segment.is_verbatim):
            joined[-1] = dataclasses.replace(last, text=last.text + segment.text)
        elif segment.text:
            joined.append(segment)
    return joined


class SegmentTokenizer:
    """Applies the boundary rule to one tokenizer.

    Sentencepiece-like tokenizers put a space in front of every text they are given. In a whole conversation that space
    appears at the very start and, for some of them, after each special token; in the middle of text it never does.
    Which of the two kinds a tokenizer is gets measured here, not guessed from its class. Some special tokens (those of
    Phi-3) swallow the white space behind them; here they do so across the segments too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self._special_ids = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        self._swallows_space = {index for index, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
        self._forbidden_ids = (set(tokenizer.all_special_ids) | {image_token_id}) - {tokenizer.unk_token_id}
        alone = self._encode("x")
        self._adds_space = alone != self._encode_anchored("x")
        behind_special = self._encode(f"{image_token}x")[1:]
        self._adds_space_after_special = self._adds_space and behind_special == alone
        with_defaults = tokenizer.encode("x")
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and with_defaults[:1] == [bos] and alone[:1] != [bos] else []

    def encode(self, segments: Sequence[Segment], image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a rendered conversation; image marker i becomes `image_tokens[i]` placeholders.

        Labels are the ids of target segments and -100 elsewhere. The beginning-of-text token is put in front once if
        the tokenizer does so by default and the template has not written it.

        Raises:
            TemplateError: verbatim text would produce a special token on this tokenizer.
        """
        ids: list[int] = []
        labels: list[int] = []
        counts = iter(image_tokens)

        def append(new_ids: list[int], is_target: bool) -> None:
            ids.extend(new_ids)
            labels.extend(new_ids if is_target else [IGNORE_INDEX] * len(new_ids))

        for segment in segments:
            for index, text in enumerate(segment.text.split(IMAGE_MARKER)):
                if index > 0:
                    append([self.image_token_id] * next(counts), False)
                if text:
                    append(self._encode_piece(text, ids, verbatim=segment.is_verbatim), segment.is_target)
        if self._bos and ids[:1] != self._bos:
            ids = self._bos + ids
            labels = [IGNORE_INDEX, *labels]
        return ids, labels

    def single_id(self, text: str) -> int | None:
        """The id of `text` in the middle of other text, None where it is not a single token."""
        ids = self._encode_anchored(text) if self._adds_space else self._encode(text)
        return ids[0] if len(ids) == 1 else None

    def is_special(self, token_id: int) -> bool:
        """Whether the tokenizer never makes that id of plain text."""
        return token_id in self._special_ids

    def _encode_piece(self, text: str, before: list[int], *, verbatim: bool) -> list[int]:
        if before and before[-1] in self._swallows_space:
            text = text.lstrip()
            if not text:
                return []
        follows_special = bool(before) and before[-1] in self._special_ids
        space_is_due = not before or (follows_special and self._adds_space_after_special)
        if self._adds_space and not space_is_due:
            piece = self._encode_anchored(text, verbatim=verbatim)
        else:
            piece = self._encode(text, verbatim=verbatim)
        if verbatim and not self._forbidden_ids.isdisjoint(piece):
            spelled = self.tokenizer.convert_ids_to_tokens(sorted(self._forbidden_ids.intersection(piece)))
            raise TemplateError(
                f"the text {text[:80]!r} contains the special token(s) {spelled}, and this tokenizer cannot read "
                "them as plain text (split_special_tokens); remove them from the record or use a fast tokenizer"
            )
        return piece

    def _encode(self, text: str, *, verbatim: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=verbatim, verbose=False))

    def _encode_anchored(self, text: str, *, verbatim: bool = False) -> list[int]:
        """Encodes `text` as it reads in the middle of other text: behind an anchor whose ids are cut off again."""
        for anchor in _ANCHORS:
            anchor_ids = self._encode(anchor)
            ids = self._encode(anchor + text, verbatim=verbatim)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        raise TemplateError(
            f"this tokenizer merges {text[:80]!r} with every text in front of it, so a conversation cannot be cut "
            "there; use a tokenizer that splits at spaces or newlines"
        )


def _for_each(image_tokens: ImageTokens, num_images: int) -> Sequence[int]:
    counts = [image_tokens] * num_images if isinstance(image_tokens, int) else image_tokens
    if len(counts) != num_images:
        raise TemplateError(f"{len(counts)} numbers of placeholders for {num_images} image(s); give one for each")
    return counts


class TextEncoder:
    """A template and a tokenizer together: turns in, ids and labels out.

    Raises:
        TemplateError: a token that the template wants to be learned anywhere is no single token of the tokenizer.
    """

    def __init__(self, template: ConversationTemplate, segments: SegmentTokenizer) -> None:
        self.template = template
        self.segments = segments
        self._learned_ids: set[int] = set()
        for text in template.learned_anywhere:
            token_id = segments.single_id(text)
            if token_id is None:
                raise TemplateError(
                    f"template {template.name!r} with {template.config} learns {text!r} wherever it stands, but it is "
                    "not one token of this tokenizer; leave the option out"
                )
            self._learned_ids.add(token_id)

    def encode(
        self, turns: Sequence[Turn], num_images: int, image_tokens: ImageTokens, *, mode: Literal["train", "generate"]
    ) -> tuple[list[int], list[int]]:
        """Ids and labels, both of length S; in mode "generate" the ids end with the header of the answer.

        Raises:
            TemplateError: the number of markers in the rendered text differs from `num_images`, or see `render`.
        """
        rendered = self._render(turns, num_images, add_generation_prompt=mode == "generate")
        ids, labels = self.segments.encode(rendered, _for_each(image_tokens, num_images))
        if self._learned_ids:
            labels = [token if token in self._learned_ids else label for token, label in zip(ids, labels, strict=True)]
        return ids, labels

    def answer_start(self, turns: Sequence[Turn], image_tokens: ImageTokens) -> int:
        """Where the first answer of a training sequence begins: the length of the prompt that asks for it."""
        first = next((index for index, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
        asked = turns[:first]
        num_images = sum(turn.text.count(IMAGE_MARKER) for turn in asked)
        counts = image_tokens if isinstance(image_tokens, int) else image_tokens[:num_images]
        return len(self.encode(asked, num_images, counts, mode="generate")[0])

    def max_length(self, turns: Sequence[Turn], num_images: int, image_tokens: ImageTokens) -> int:
        """An upper bound for the length of a training sequence: no tokenizer makes more tokens than UTF-8 bytes.

        Two are added for each segment and image, for the spaces that sentencepiece tokenizers put in front of pieces.
        """
        rendered = self._render(turns, num_images, add_generation_prompt=False)
        num_bytes = sum(len(segment.text.encode("utf-8", "surrogatepass")) for segment in rendered)
        return 1 + num_bytes + 2 * (len(rendered) + num_images) + sum(_for_each(image_tokens, num_images))

    def _render(self, turns: Sequence[Turn], num_images: int, *, add_generation_prompt: bool) -> list[Segment]:
        rendered = self.template.render(turns, add_generation_prompt=add_generation_prompt)
        num_markers = sum(segment.text.count(IMAGE_MARKER) for segment in rendered)
        if num_markers != num_images:
            raise TemplateError(
                f"template {self.template.name!r}: {num_markers} {IMAGE_MARKER} marker(s) in the rendered conversation "
                f"for {num_images} image(s); write one marker for each image into the user turns"
            )
        return rendered

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end an answer: the tokenizer's end token, and the template's own if that is a single token."""
        tokenizer = self.segments.tokenizer
        ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        end_id = self._end_id()
        return ids if end_id is None or end_id in ids else [*ids, end_id]

    @property
    def stop_strings(self) -> list[str]:
        """Texts that end an answer and that generation must look for in the text, not among the ids.

        That is the newline of captions: tokenizers join it with what stands in front of it. Empty where a special
        token ends the answer.
        """
        end_id = self._end_id()
        if not self.template.end_text or (end_id is not None and self.segments.is_special(end_id)):
            return []
        return [self.template.end_text]

    def _end_id(self) -> int | None:
        return self.segments.single_id(self.template.end_text) if self.template.end_text else None
