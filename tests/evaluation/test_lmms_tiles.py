"""The adapter with real models: images of different sizes, one and several, in any batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)
from llava_moe.evaluation.lmms import LlavaMoe
from tests.tiny_families import images, write_family_checkpoint
from tests.tiny_model import TINY_MOE

DOCUMENTS = [images(1), images(2, 1), [], images(1, 3), images(1, 2), images(3), images(1, 1), []]
CONTEXTS = ["What?", "What colour is it?", "red", "is it green", "the shape", "what is a circle", "a", "describe it"]


def request(index: int, second: Any) -> Any:
    args = (CONTEXTS[index], second, lambda doc: doc, index, "toy", "test")
    return SimpleNamespace(args=args, task_name="toy", idx=0)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_answers_and_losses_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    path = write_family_checkpoint(tmp_path / "model", family, TINY_MOE)
    found = []
    for batch_size in (1, 8):
        lm = LlavaMoe(pretrained=str(path), batch_size=batch_size, device="cpu")
        lm.task_dict = {"toy": {"test": DOCUMENTS}}
        settings = {"until": ["\n\n"], "max_new_tokens": 5}
        answers = [one.text for one in lm.generate_until([request(i, settings) for i in range(8)])]
        losses = [one.text[0] for one in lm.loglikelihood([request(i, "a red square") for i in range(8)])]
        found.append((answers, losses))
    (answers, losses), (together, losses_together) = found
    assert answers == together
    assert losses == pytest.approx(losses_together, abs=1e-4)
    assert len(set(answers)) > 2, answers
