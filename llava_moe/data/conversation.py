"""From turns to token ids: templates render segments, and the segments are what is tokenised.

The boundary rule. A segment is tokenised by itself, cut only at image markers; no token ever spans two segments. So the
labels need no arithmetic on lengths, and a training sequence up to an answer has the ids of the generation prompt by
construction. To agree with tokenising the whole conversation at once, a template puts its cuts where tokenizers cut
anyway: before a space, after a newline, at a special token; only a text that itself begins with a newline can then
differ. The one thing a tokenizer adds by itself is a leading space (sentencepiece); it is kept exactly where the whole
text would have it, see `SegmentTokenizer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from llava_moe.data.schema import IMAGE_MARKER, DataError, Turn

IGNORE_INDEX = -100

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
        end_text: what ends an answer, the last target of each answer; None if the template has no such text.
    """

    name: ClassVar[str]
    jinja: ClassVar[str | None] = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end_text: str | None = tokenizer.eos_token

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[Segment]:
        """Renders a conversation that ends with an answer, or one that ends with a question and waits for its answer.

        Args:
            turns: alternating, the user first.
            add_generation_prompt: the last turn is the user's, and the header of the answer is appended.

        Raises:
            TemplateError: the turns do not alternate or end with the wrong role, or the template cannot hold them.
        """
        roles = [turn.role for turn in turns]
        last = "user" if add_generation_prompt else "assistant"
        alternating = [("user", "assistant")[index % 2] for index in range(len(turns))]
        if not turns or roles[-1] != last or roles != alternating:
            raise TemplateError(
                f"template {self.name!r}: turns must start with the user, alternate and end with the {last} "
                f"(add_generation_prompt={add_generation_prompt}), found {roles}"
            )
        return [segment for segment in self._render(turns) if segment.text]

    @abstractmethod
    def _render(self, turns: Sequence[Turn]) -> list[Segment]:
        """Renders checked turns; a final user turn is followed by the header of its answer."""

    def _require_token(self, text: str) -> None:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise TemplateError(
                f"template {self.name!r} needs {text!r} as one token, but this tokenizer makes {len(ids)} of it; "
                "add it with add_special_tokens (and resize the embeddings), or choose another template"
            )


class SegmentTokenizer:
    """Applies the boundary rule to one tokenizer.

    Sentencepiece-like tokenizers put a space in front of every text they are given. In a whole conversation that space
    appears at the very start and, for some of them, after each special token; in the middle of text it never does.
    Which of the two kinds a tokenizer is gets measured here, not guessed from its class.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self._special_ids = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        self._forbidden_ids = (set(tokenizer.all_special_ids) | {image_token_id}) - {tokenizer.unk_token_id}
        alone = self._encode("x")
        self._adds_space = alone != self._encode_anchored("x")
        behind_special = self._encode(f"{image_token}x")[1:]
        self._adds_space_after_special = self._adds_space and behind_special == alone
        with_defaults = tokenizer.encode("x")
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and with_defaults[:1] == [bos] and alone[:1] != [bos] else []

    def encode(self, segments: Sequence[Segment], num_image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a rendered conversation; an image marker becomes `num_image_tokens` placeholders.

        Labels are the ids of target segments and -100 elsewhere. The beginning-of-text token is put in front once if
        the tokenizer does so by default and the template has not written it.

        Raises:
            TemplateError: verbatim text would produce a special token on this tokenizer.
        """
        ids: list[int] = []
        labels: list[int] = []

        def append(new_ids: list[int], is_target: bool) -> None:
            ids.extend(new_ids)
            labels.extend(new_ids if is_target else [IGNORE_INDEX] * len(new_ids))

        for segment in segments:
            for index, text in enumerate(segment.text.split(IMAGE_MARKER)):
                if index > 0:
                    append([self.image_token_id] * num_image_tokens, False)
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

    def _encode_piece(self, text: str, before: list[int], *, verbatim: bool) -> list[int]:
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


class TextEncoder:
    """A template and a tokenizer together: turns in, ids and labels out."""

    def __init__(self, template: ConversationTemplate, segments: SegmentTokenizer) -> None:
        self.template = template
        self.segments = segments

    def encode(
        self, turns: Sequence[Turn], num_images: int, num_image_tokens: int, *, mode: Literal["train", "generate"]
    ) -> tuple[list[int], list[int]]:
        """Ids and labels, both of length S; in mode "generate" the ids end with the header of the answer.

        Raises:
            TemplateError: the number of markers in the rendered text differs from `num_images`, or see `render`.
        """
        rendered = self._render(turns, num_images, add_generation_prompt=mode == "generate")
        return self.segments.encode(rendered, num_image_tokens)

    def max_length(self, turns: Sequence[Turn], num_images: int, num_image_tokens: int) -> int:
        """An upper bound for the length of a training sequence: no tokenizer makes more tokens than UTF-8 bytes.

        Two are added for each segment and image, for the spaces that sentencepiece tokenizers put in front of pieces.
        """
        rendered = self._render(turns, num_images, add_generation_prompt=False)
        num_bytes = sum(len(segment.text.encode("utf-8", "surrogatepass")) for segment in rendered)
        return 1 + num_bytes + 2 * (len(rendered) + num_images) + num_images * num_image_tokens

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
        end_id = self.segments.single_id(self.template.end_text) if self.template.end_text else None
        return ids if end_id is None or end_id in ids else [*ids, end_id]
