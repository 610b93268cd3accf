"""Entry point of the group `lmms_eval.models`: lets `lmms-eval --model llava_moe` find our adapter.

lmms-eval loads every entry point on `import lmms_eval.models` and skips the rest after one that fails, so nothing heavy
is imported here. Only a simple class is registered: that is the mode which LLaVA's published numbers used, and the
only one which serves loglikelihood tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "llava_moe"


def manifests() -> list[ModelManifest]:
    """The models that this package gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=MODEL_ID, simple_class_path="llava_moe.evaluation.lmms.LlavaMoe")]
