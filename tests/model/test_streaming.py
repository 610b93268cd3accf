"""Reading and writing checkpoints tensor by tensor, and running models whose layers are read as they are called."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from llava_moe.model import offload, streaming
from llava_moe.model.assemble import load_model
from llava_moe.model.layout import StoredModel
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import is_streamed, open_model
from llava_moe.model.streaming import CheckpointReader, CheckpointWriter, TensorInfo, check_space, weight_files
from tests.model.inputs import logits_of, picture_batch
from tests.tiny_model import tiny_model

TENSORS = {
    "odd": torch.arange(3, dtype=torch.int8),
    "half": torch.randn(5, 3).to(torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "full": torch.randn(2, 3, 4),
    "flags": torch.tensor([True, False, True]),
    "double": torch.randn(3, dtype=torch.float64),
}
INFOS = {name: TensorInfo.of(tensor) for name, tensor in TENSORS.items()}


def write(folder: Path, **options: Any) -> Path:
    with CheckpointWriter(folder, INFOS, **options) as writer:
        for name in reversed(TENSORS):  # the order of writing is free
            writer.write(name, TENSORS[name])
    return folder


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("full").get_shape() == [2, 3, 4]


def test_the_reader_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "controllers.safetensors")  # not the model's
    reader = CheckpointReader(tmp_path)
    assert reader.infos == INFOS
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())
    assert reader.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_shards_have_an_index(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-0000{len(files)}.safetensors"
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert weight_files(tmp_path) == [tmp_path / name for name in files]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / file).values()) for file in files}
    assert all(size <= 60 or len(load_file(tmp_path / file)) == 1 for file, size in sizes.items())


def test_bytes_are_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_CHUNK", 7)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    reader = CheckpointReader(write(tmp_path / "a"))
    assert max(len(chunk) for chunk in reader.chunks("full")) == 7
    renamed = {f"new.{name}": info for name, info in reader.infos.items()}
    with CheckpointWriter(tmp_path / "b", renamed) as writer:
        for name in reader.infos:
            writer.copy(f"new.{name}", reader, name)
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(found[f"new.{name}"], tensor) for name, tensor in TENSORS.items())


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    def attempt(*actions: tuple[str, torch.Tensor]) -> None:
        with CheckpointWriter(tmp_path, {"a": TensorInfo(torch.float32, (2,))}) as writer:
            for name, tensor in actions:
                writer.write(name, tensor)

    with pytest.raises(ValueError, match="announced and not written: \\['a'\\]"):
        attempt()
    with pytest.raises(ValueError, match=r"but .*float32.* was announced"):
        attempt(("a", torch.zeros(2, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="was announced"):
        attempt(("a", torch.zeros(3)))
    with pytest.raises(ValueError, match="written twice"):
        attempt(("a", torch.zeros(2)), ("a", torch.zeros(2)))
    attempt(("a", torch.ones(2)))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(2))


@pytest.mark.parametrize("size", [4, 60, 300])
def test_a_cut_file_is_refused(tmp_path: Path, size: int) -> None:
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(damaged|cut short)"):
        CheckpointReader(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        CheckpointReader(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        CheckpointReader(tmp_path)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def seek(self, offset: int) -> None:
            pass

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Full())
    with (
        pytest.raises(CheckpointError, match=r"the disk is full; the checkpoint takes 0\.0 GB\. Nothing was left"),
        CheckpointWriter(tmp_path / "out", {"a": TensorInfo(torch.float32, (2,))}) as writer,
    ):
        writer.write("a", torch.zeros(2))


def test_space_is_looked_for_beforehand(tmp_path: Path) -> None:
    check_space(tmp_path / "deep" / "target", 1)
    with pytest.raises(CheckpointError, match=r"takes 1000000000\.0 GB and only .* GB are free there"):
        check_space(tmp_path / "deep" / "target", 10**18)


class TestStoredModel:
    """Parameters by their names in the model, from files that name them otherwise."""

    def test_every_parameter_of_a_sparse_checkpoint(self, moe_checkpoint: Path) -> None:
        stored, loaded = StoredModel(moe_checkpoint), load_model(moe_checkpoint).state_dict()
        assert stored.state.keys() == loaded.keys()
        assert all(torch.equal(stored.read(key), tensor) for key, tensor in loaded.items())
        assert stored.strays == []
        assert stored.reader.float32_bytes == sum(4 * tensor.numel() for tensor in loaded.values())
        assert all(parameter.is_meta for parameter in stored.model.parameters())

    def test_the_names_of_training_checkpoints(self, moe_checkpoint: Path, tmp_path: Path) -> None:
        model = load_model(moe_checkpoint)
        model.save_pretrained(tmp_path, save_original_format=False, max_shard_size="100KB")
        stored = StoredModel(tmp_path)
        assert all(torch.equal(stored.read(key), tensor) for key, tensor in model.state_dict().items())

    def test_a_tied_head_is_the_embedding(self, tmp_path: Path) -> None:
        model = tiny_model(text="qwen2", tie_word_embeddings=True)
        model.save_pretrained(tmp_path, save_original_format=True)
        stored = StoredModel(tmp_path)
        assert "lm_head.weight" not in stored.pieces
        assert torch.equal(stored.read("lm_head.weight"), model.lm_head.weight)
        assert sum(p.numel() for p in stored.model.parameters()) == sum(p.numel() for p in model.parameters())

    def test_what_does_not_fit_is_refused(self, moe_checkpoint: Path, tmp_path: Path) -> None:
        tensors = load_file(moe_checkpoint / "model.safetensors")
        (tmp_path / "config.json").write_bytes((moe_checkpoint / "config.json").read_bytes())
        lost = next(name for name in tensors if ".experts.3.down_proj" in name)
        save_file({k: t for k, t in tensors.items() if k != lost}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"experts\.down_proj is \(3, .*config\.json asks for \(4, "):
            StoredModel(tmp_path)
        lost = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
        save_file({k: t for k, t in tensors.items() if k != lost}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"missing model\.language_model\.layers\.1\.mlp\.up_proj"):
            StoredModel(tmp_path)
        stray = {"language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(1)}
        save_file(tensors | stray, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"not used language_model\.model\.layers\.9"):
            StoredModel(tmp_path)
        stray = {"vision_tower.head.probe": torch.zeros(1)}
        save_file(tensors | stray, tmp_path / "model.safetensors")
        assert StoredModel(tmp_path).strays == list(stray)


class TestStreamedModel:
    """The hooks that load a layer for the time of its call."""

    @pytest.mark.parametrize("kind", ["moe_checkpoint", "dense_checkpoint", "timm_checkpoint"])
    def test_the_answers_are_those_of_the_whole_model(self, kind: str, request: pytest.FixtureRequest) -> None:
        path = request.getfixturevalue(kind)
        whole, streamed = load_model(path), open_model(path, whole_bytes=0)
        assert is_streamed(streamed)
        batch = picture_batch(whole)
        expected = logits_of(whole, **batch)
        for _ in range(2):
            assert torch.equal(logits_of(streamed, **batch), expected)
        layers = [*streamed.model.language_model.layers, streamed.lm_head, streamed.get_input_embeddings()]
        assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())

    def test_a_tied_model(self, tmp_path: Path) -> None:
        model = tiny_model(text="qwen2", tie_word_embeddings=True)
        model.save_pretrained(tmp_path, save_original_format=True)
        batch = picture_batch(model)
        assert torch.equal(logits_of(open_model(tmp_path, whole_bytes=0), **batch), logits_of(model, **batch))

    def test_one_layer_at_a_time(self, moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded: list[set[nn.Module]] = []
        real_load, real_drop = offload._Unit.load, offload._Unit.drop
        present: set[nn.Module] = set()

        def load(self: Any) -> None:
            present.add(self.module)
            loaded.append(set(present))
            real_load(self)

        def drop(self: Any) -> None:
            present.remove(self.module)
            real_drop(self)

        monkeypatch.setattr(offload._Unit, "load", load)
        monkeypatch.setattr(offload._Unit, "drop", drop)
        streamed = open_model(moe_checkpoint, whole_bytes=0)
        logits_of(streamed, **picture_batch(streamed))
        assert len(loaded) == 4 + 3 + 3  # decoder and tower layers; embedding, projector and head
        assert all(len(modules) == 1 for modules in loaded)
        assert not present

    def test_small_models_are_loaded_whole(self, dense_checkpoint: Path) -> None:
        model = open_model(dense_checkpoint)
        assert not is_streamed(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())
