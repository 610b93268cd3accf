"""Samples for parents that are measured, written once."""

from __future__ import annotations

import pytest

from llava_moe.config import CalibrationSection
from tests.tiny import write_llava_json


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSection:
    """12 records, every fourth without a picture; read-only."""
    data, images = write_llava_json(tmp_path_factory.mktemp("samples"), 12, num_turns=2, text_only_every=4)
    return CalibrationSection(path=str(data), image_folder=str(images), num_samples=12)
