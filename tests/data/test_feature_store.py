from pathlib import Path

import numpy as np
import pytest
import torch

from llava_moe.data.feature_store import FeatureStore, FeatureStoreWriter, image_key
from llava_moe.data.schema import DataError


def write(path: Path, fingerprint: str = "f") -> torch.Tensor:
    features = torch.arange(24, dtype=torch.float32).reshape(3, 4, 2)
    with FeatureStoreWriter(path, fingerprint, num_images=3, num_tokens=4, channels=2) as writer:
        writer.add(["a", "b"], features[:2].to(torch.bfloat16))
        assert "a" in writer
        assert "c" not in writer
        writer.add(["c"], features[2:].numpy())
    return features


def test_what_was_written_is_read(tmp_path: Path):
    features = write(tmp_path / "store")
    store = FeatureStore(tmp_path / "store", "f")
    assert (len(store), store.feature_shape) == (3, (4, 2))
    assert "b" in store
    assert "z" not in store
    read = store.get(["c", "a", "c"])
    assert read.dtype == torch.float32
    assert torch.equal(read, features[[2, 0, 2]])
    assert [file.name for file in tmp_path.iterdir()] == ["store"]
    assert np.load(tmp_path / "store/features.npy", mmap_mode="r").dtype == np.float16


def test_another_fingerprint_is_refused(tmp_path: Path):
    write(tmp_path / "store", "tower-1")
    with pytest.raises(DataError, match="'tower-1', now 'tower-2'"):
        FeatureStore(tmp_path / "store", "tower-2")


def test_missing_and_damaged_stores_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="not a readable feature store"):
        FeatureStore(tmp_path / "none", "f")
    write(tmp_path / "store")
    with pytest.raises(DataError, match="lacks the image with key z"):
        FeatureStore(tmp_path / "store", "f").get(["a", "z"])
    np.save(tmp_path / "store/features.npy", np.zeros((2, 4, 2), np.float16))
    with pytest.raises(DataError, match="write it again"):
        FeatureStore(tmp_path / "store", "f")
    (tmp_path / "store/index.json").write_text("{")
    with pytest.raises(DataError, match="not a readable feature store"):
        FeatureStore(tmp_path / "store", "f")


def test_an_unfinished_store_leaves_nothing_behind(tmp_path: Path):
    with (
        pytest.raises(DataError, match="1 of the announced 2"),
        FeatureStoreWriter(tmp_path / "store", "f", num_images=2, num_tokens=1, channels=1) as writer,
    ):
        writer.add(["a"], torch.zeros(1, 1, 1))
    with (
        pytest.raises(DataError, match="expected"),
        FeatureStoreWriter(tmp_path / "store", "f", num_images=1, num_tokens=1, channels=1) as writer,
    ):
        writer.add(["a"], torch.zeros(1, 5, 1))
    assert list(tmp_path.iterdir()) == []


def test_wrong_features_are_refused(tmp_path: Path):
    writer = FeatureStoreWriter(tmp_path / "store", "f", num_images=2, num_tokens=1, channels=2)
    with pytest.raises(DataError, match=r"shape \(1, 2, 2\), expected \(1, 1, 2\)"):
        writer.add(["a"], torch.zeros(1, 2, 2))
    with pytest.raises(DataError, match=r"not finite in float16.*1e\+05"):
        writer.add(["a"], torch.full((1, 1, 2), 1e5))
    with pytest.raises(DataError, match="image a added twice"):
        writer.add(["a", "a"], torch.zeros(2, 1, 2))
    with pytest.raises(DataError, match="more than the announced 2"):
        writer.add(["a", "b", "c"], torch.zeros(3, 1, 2))
    writer.add(["a", "b"], torch.zeros(2, 1, 2))
    writer.close()
    with pytest.raises(DataError, match="exists already"):
        FeatureStoreWriter(tmp_path / "store", "f", num_images=1, num_tokens=1, channels=1)


def test_the_key_is_the_content(tmp_path: Path):
    (tmp_path / "1").write_bytes(b"same")
    (tmp_path / "2").write_bytes(b"same")
    (tmp_path / "3").write_bytes(b"other")
    assert image_key(tmp_path / "1") == image_key(tmp_path / "2") != image_key(tmp_path / "3")
