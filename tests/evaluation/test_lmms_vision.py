"""The features of a picture are computed once, kept within a bound, and change no answer."""

from __future__ import annotations

import pytest

import llava_moe  # noqa: F401  (before anything that may import torchvision)

import torch  # isort: skip

from llava_moe.evaluation.vision_reuse import content_key
from tests.evaluation.trained import adapter, answers, checkpoint, documents, losses, picture


@pytest.mark.parametrize(("family", "kind"), [("llava", "moe"), ("llava_next", "moe")])
def test_a_picture_is_encoded_once_and_answers_stay_equal_to_the_bit(family: str, kind: str) -> None:
    reusing, fresh = (adapter(checkpoint(family, kind), batch_size=4, vision_cache_mib=mib) for mib in (64, 0))
    calls: list[int] = []
    encode = reusing.model.model.picture_features
    reusing.model.model.picture_features = lambda pixels, **options: calls.append(1) or encode(pixels, **options)
    assert answers(reusing) == answers(fresh)
    assert losses(reusing) == losses(fresh)  # the same floats
    shown = [tuple(document["pictures"]) for task in documents().values() for document in task["test"]]
    units = {pair for pair in shown if pair} if family == "llava_next" else {i for pair in shown for i in pair}
    counts = reusing.counters()
    assert counts["pictures_encoded"] == len(calls) == len({content(unit) for unit in units})
    assert counts["pictures_reused"] > 4 * counts["pictures_encoded"]
    assert fresh.counters()["pictures_reused"] == 0
    reusing.clean()
    assert reusing.vision is not None
    assert reusing.vision._bytes == 0


def content(unit: int | tuple[int, ...]) -> tuple[str, ...]:
    return tuple(content_key(picture(i)) for i in ((unit,) if isinstance(unit, int) else unit))


def test_room_for_the_pictures_of_one_question_serves_its_options() -> None:
    """Questions about a picture, and the options of a question, are neighbours; there are two pictures at most."""
    lm = adapter(checkpoint("llava", "dense"))
    assert lm.vision is not None
    (first,) = lm.vision.encode(["a"], lambda: [picture(0)])
    lm.clean()
    lm.vision.limit = 2 * first.num_bytes
    found = losses(lm)
    assert found == losses(adapter(checkpoint("llava", "dense")))
    assert lm.vision.hits > 2 * lm.vision.misses


def test_features_are_kept_within_the_bound() -> None:
    """Room for three pictures: what was asked about last is there, the oldest is not."""
    lm = adapter(checkpoint("llava", "dense"))
    vision = lm.vision
    assert vision is not None
    (first,) = vision.encode(["a"], lambda: [picture(0)])
    vision.limit = 3 * first.num_bytes
    for name, index in (("b", 1), ("c", 2), ("a", 0), ("d", 3)):
        vision.encode([name], lambda index=index: [picture(index)])
        assert vision._bytes <= vision.limit
    assert (vision.hits, vision.misses) == (1, 4)
    assert list(vision._kept) == [("c",), ("a",), ("d",)]
    kept = vision.encode(["a"], lambda: pytest.fail("it is there"))
    assert torch.equal(kept[0].features[0], first.features[0])
    vision.encode(["a", "b"], lambda: [picture(0), picture(1)])
    assert vision.misses == 5


def test_content_keys_tell_pictures_apart() -> None:
    keys = [content_key(picture(i)) for i in range(8)]
    assert len(set(keys)) == 8
    assert content_key(picture(3).copy()) == keys[3]
    assert content_key(picture(3).convert("L")) != keys[3]
    assert content_key(picture(3).resize((20, 24)).resize((24, 20))) != keys[3]
    palette = picture(0).convert("P")
    other = palette.copy()
    other.putpalette([255 - value for value in palette.getpalette() or []])
    assert content_key(palette) != content_key(other)
    assert content_key([picture(0), picture(1)]) != content_key([picture(1), picture(0)])
