"""Pieces of Jinja for the templates' twins, which stock tools render (`tokenizer.chat_template`)."""

from __future__ import annotations

import json

# Stock tools hand over a message either as a string or as a list of image and text parts.
FLATTEN = (
    "{%- macro flatten(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

REFUSE_ROLE = "{{- raise_exception('this template knows the roles system (first), user and assistant') -}}"


def literal(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text)


def split_system(name: str, default: str | None, *, takes_system: bool) -> str:
    """Sets `system` (the first message if it is one, else the template's own) and `turns` (the other messages)."""
    own = (
        "{%- set system = flatten(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
        if takes_system
        else f"{{{{- raise_exception('the {name} template has no place for a system message') -}}}}"
    )
    return (
        f"{FLATTEN}{{%- if messages[0]['role'] == 'system' -%}}{own}"
        f"{{%- else -%}}{{%- set system = {literal(default or '')} -%}}{{%- set turns = messages -%}}{{%- endif -%}}"
    )
