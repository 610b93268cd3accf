"""What the model card of a trained checkpoint says of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_moe.config import RunConfig
from llava_moe.model_card import Origin, start_facts


def run_origin(
    config: RunConfig, checkpoint: Path, recipe: str, report: dict[str, int], facts: dict[str, Any]
) -> Origin:
    """The origin of the checkpoint at the end of a stage.

    Args:
        checkpoint: the start point.
        recipe: the resolved recipe as YAML.
        report: counts of the training data.
        facts: of the run, in the order in which the card shows them.
    """
    section = config.model
    named = (str(checkpoint),) if section.checkpoint is not None else (section.vision_tower, section.language_model)
    data = config.data
    sources = [*(source.path for source in data.sources), *(path for path in (data.mixture, data.index) if path)]
    counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in report.items())
    return Origin(
        name=Path(config.output_dir).name,
        made_by="llava-moe train",
        parents=[parent for parent in named if parent is not None],
        stage=config.stage.name,
        recipe=recipe,
        data=[*(f"`{source}`" for source in sources), f"all together: {counted}"],
        facts=facts | start_facts(checkpoint),
    )
