import pytest
import torch

from llava_moe.data.collator import Collator
from llava_moe.data.schema import DataError

PAD, IMAGE = 0, 9
COLLATE = Collator(PAD, IMAGE, num_image_tokens=2, image_shape=(3, 4, 4))


def sample(ids: list[int], num_images: int, name: str = "s") -> dict[str, object]:
    made: dict[str, object] = {"sample_id": name, "input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    return {**made, "pixel_values": torch.ones(num_images, 3, 4, 4)} if num_images else made


def test_the_mask_comes_from_lengths_not_from_the_padding_id():
    # the pad id occurs inside the first sample
    batch = COLLATE([sample([1, PAD, 3], 0), sample([1, 2, 3, 4], 0)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[1, PAD, 3, -100], [1, 2, 3, 4]]
    assert all(batch[key].dtype == torch.long for key in ("input_ids", "attention_mask", "labels"))


def test_images_are_joined_in_the_order_of_the_samples():
    first, second = sample([IMAGE, IMAGE, 1], 1), sample([IMAGE] * 4, 2)
    second["pixel_values"] = torch.stack([torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), 3.0)])
    batch = COLLATE([first, sample([1], 0), second])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]


def test_a_batch_without_image_gets_one_dummy():
    batch = COLLATE([sample([1, 2], 0), sample([3], 0)])
    assert batch["pixel_values"].shape == (1, 3, 4, 4)
    assert batch["pixel_values"].eq(0).all()
    assert not (batch["input_ids"] == IMAGE).any()


@pytest.mark.parametrize(("ids", "num_images"), [([IMAGE, 1], 1), ([IMAGE] * 3, 1), ([1, 2], 1), ([IMAGE] * 2, 0)])
def test_a_mismatch_is_found_per_sample(ids: list[int], num_images: int):
    with pytest.raises(DataError, match=r"sample 'bad': \d image placeholders for"):
        COLLATE([sample([IMAGE, IMAGE], 1, "good"), sample(ids, num_images, "bad")])


def test_mismatches_that_cancel_out_are_found():
    with pytest.raises(DataError, match="sample 'bad'"):
        COLLATE([sample([IMAGE] * 2, 2, "bad"), sample([IMAGE] * 4, 1, "also bad")])


def test_other_broken_samples_are_named():
    wrong = sample([IMAGE, IMAGE], 1, "bad")
    wrong["pixel_values"] = torch.zeros(1, 3, 5, 5)
    with pytest.raises(DataError, match=r"'bad': pixel_values of shape \(1, 3, 5, 5\), expected \(n, 3, 4, 4\)"):
        COLLATE([wrong])
    uneven = sample([1, 2], 0, "bad")
    uneven["labels"] = torch.tensor([1])
    with pytest.raises(DataError, match="'bad': 2 ids but 1 labels"):
        COLLATE([uneven])


def test_it_needs_one_kind_of_image():
    for shapes in ({}, {"image_shape": (3, 4, 4), "feature_shape": (2, 5)}):
        with pytest.raises(DataError, match="either image_shape or feature_shape"):
            Collator(PAD, IMAGE, 2, **shapes)
