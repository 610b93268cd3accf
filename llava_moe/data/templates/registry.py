"""Where the templates register; apart from the package's `__init__`, so that a template can list the others."""

from __future__ import annotations

from llava_moe.data.conversation import ConversationTemplate
from llava_moe.registry import Registry

TEMPLATES: Registry[type[ConversationTemplate]] = Registry("conversation template")
