"""`llava-moe grow`: small checkpoints in, larger ones out, and what can be made of them then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llava_moe.config import GrowSection, NamedSection, PartSection, UpcycleSection
from llava_moe.model import growing
from llava_moe.model.assemble import load_model
from llava_moe.model.growing import PROVENANCE, grow
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.streaming import CheckpointReader
from llava_moe.model.upcycling import upcycle
from llava_moe.moe.growth import GROWERS, Fpi
from tests.model.inputs import logits_of, picture_batch
from tests.tiny import tiny_tokenizer
from tests.tiny_model import tiny_model, tiny_processor, tiny_text_config, write_tiny_checkpoint

DOUBLE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}


def section(parent: Path, target: dict[str, Any], width: Any = "fpi", depth: Any = None) -> GrowSection:
    def named(name: Any) -> NamedSection | None:
        return NamedSection(name) if isinstance(name, str) else name

    return GrowSection(parent=str(parent), target=target, width=named(width), depth=named(depth))


def write_language_model(path: Path, text: str = "llama", **changes: Any) -> Path:
    """A causal language model by itself, with its tokenizer."""
    config = tiny_text_config(text)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def grown(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense checkpoint with everything twice as wide; read-only."""
    out = tmp_path_factory.mktemp("grown") / "out"
    grow(section(dense_checkpoint, DOUBLE), out)
    return out


class TestLlava:
    """The decoder of a vision-language model, with its projector."""

    def test_twice_as_wide_gives_the_same_logits(self, dense_checkpoint: Path, grown: Path) -> None:
        small, large = load_model(dense_checkpoint), load_model(grown)
        batch = picture_batch(small, batch=3, length=20)
        expected = logits_of(small, **batch)
        assert float((logits_of(large, **batch) - expected).abs().max()) <= 1e-5
        config = large.config.text_config
        assert {key: getattr(config, key) for key in DOUBLE} == DOUBLE
        assert config.head_dim == 8
        assert large.lm_head.weight.shape == (small.lm_head.weight.shape[0], 64)

    def test_files(self, dense_checkpoint: Path, grown: Path) -> None:
        """The names of the parent; what does not grow is copied."""
        parent = set(CheckpointReader(dense_checkpoint).infos)
        assert set(CheckpointReader(grown).infos) == parent
        before, after = (load_file(path / "model.safetensors") for path in (dense_checkpoint, grown))
        towers = [name for name in parent if name.startswith("vision_tower")]
        assert towers
        assert all(torch.equal(before[name], after[name]) for name in towers)

    def test_provenance(self, dense_checkpoint: Path, grown: Path) -> None:
        facts = json.loads((grown / PROVENANCE).read_text())
        assert facts["parent"] == str(dense_checkpoint)
        assert facts["exact"] is True
        assert facts["contract"] == {"width": "exact"}
        assert facts["source"]["hidden"] == 32
        assert facts["target"]["hidden"] == 64
        assert facts["max_abs_logit_error"] <= 1e-5 * max(1.0, facts["max_abs_logit"])
        assert facts["greedy_agreement"] == 1.0
        counted = [sum(p.numel() for p in load_model(path).parameters()) for path in (dense_checkpoint, grown)]
        assert list(facts["parameters"].values()) == counted
        assert facts["section"]["target"] == DOUBLE

    def test_then_upcycled_it_is_still_the_small_parent(
        self, dense_checkpoint: Path, grown: Path, tmp_path: Path
    ) -> None:
        facts = upcycle(UpcycleSection(parent=str(grown), decoder=PartSection(layers="all")), tmp_path / "moe")
        assert facts["exact"] is True
        small, sparse = load_model(dense_checkpoint), load_model(tmp_path / "moe")
        batch = picture_batch(small)
        assert float((logits_of(sparse, **batch) - logits_of(small, **batch)).abs().max()) <= 1e-5

    @pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
    def test_projectors(self, projector: str, tmp_path: Path) -> None:
        model = tiny_model(projector=projector)
        model.save_pretrained(tmp_path / "small", save_original_format=True)
        tiny_processor().save_pretrained(tmp_path / "small")
        facts = grow(section(tmp_path / "small", {"hidden_size": 96}), tmp_path / "out")
        assert facts["exact"] is True
        batch = picture_batch(model)
        found = logits_of(load_model(tmp_path / "out"), **batch)
        assert float((found - logits_of(model, **batch)).abs().max()) <= 1e-5

    def test_streamed_in_shards_and_in_bfloat16(self, tmp_path: Path) -> None:
        model = tiny_model(text="qwen2", tie_word_embeddings=True).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "small", save_original_format=True, max_shard_size="30KB")
        tiny_processor().save_pretrained(tmp_path / "small")
        facts = grow(section(tmp_path / "small", DOUBLE), tmp_path / "out", whole_bytes=0, max_shard_bytes=50_000)
        assert facts["exact"] is True
        reader = CheckpointReader(tmp_path / "out")
        assert len(reader.file_sizes) > 2
        assert {info.dtype for info in reader.infos.values()} == {torch.bfloat16}
        assert not any("lm_head" in name for name in reader.infos)
        assert load_model(tmp_path / "out").config.text_config.hidden_size == 64

    @pytest.mark.parametrize(
        ("width", "depth", "target", "layers"),
        [
            (None, "stack", {"num_hidden_layers": 6}, [0, 1, 2, 3, 0, 1]),
            (None, "interpolate", {"num_hidden_layers": 6}, [0, 0, 1, 2, 2, 3]),
            ("fpi", "stack", {**DOUBLE, "num_hidden_layers": 6}, [0, 1, 2, 3, 0, 1]),
            ("aki_pro", None, {**DOUBLE, "num_hidden_layers": 6}, [0, 0, 1, 2, 2, 3]),
            ("aki", "stack", {**DOUBLE, "num_hidden_layers": 5}, [0, 1, 2, 3, 0]),
        ],
    )
    def test_deeper(
        self, width: str | None, depth: str | None, target: dict[str, Any], layers: list[int],
        dense_checkpoint: Path, tmp_path: Path,
    ) -> None:  # fmt: skip
        facts = grow(section(dense_checkpoint, target, width, depth), tmp_path / "out")
        assert facts["exact"] is False
        assert facts["max_abs_logit_error"] > 1e-3
        small, large = load_model(dense_checkpoint), load_model(tmp_path / "out")
        places = torch.arange(large.config.text_config.hidden_size) % 32
        for number, source in enumerate(layers):
            norm = large.model.language_model.layers[number].input_layernorm.weight
            assert torch.equal(norm, small.model.language_model.layers[source].input_layernorm.weight[places])
        if width is None:
            own, theirs = (m.model.language_model.layers for m in (large, small))
            assert torch.equal(own[5].mlp.up_proj.weight, theirs[layers[5]].mlp.up_proj.weight)


class TestLanguageModel:
    """A causal language model without a tower."""

    @pytest.mark.parametrize(
        ("text", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("mistral", False)]
    )
    def test_twice_as_wide(self, text: str, tied: bool, tmp_path: Path) -> None:
        parent = write_language_model(tmp_path / "small", text, tie_word_embeddings=tied)
        facts = grow(section(parent, DOUBLE), tmp_path / "out", whole_bytes=0 if text == "llama" else 1 << 30)
        assert facts["exact"] is True
        small, large = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (parent, tmp_path / "out"))
        ids = torch.arange(2, 40).reshape(2, 19)
        with torch.no_grad():
            error = float((small(ids).logits - large(ids).logits).abs().max())
        assert error <= 1e-5 * max(1.0, facts["max_abs_logit"])
        assert large.config.num_attention_heads == 8
        assert large.config.tie_word_embeddings is tied
        found, parents = (set(CheckpointReader(p).infos) for p in (tmp_path / "out", parent))
        assert found == parents
        assert (tmp_path / "out" / "tokenizer_config.json").is_file()

    def test_it_can_be_the_decoder_of_a_first_checkpoint(self, tmp_path: Path) -> None:
        from llava_moe.config import ModelSection
        from llava_moe.model.assemble import assemble

        parent = write_language_model(tmp_path / "small")
        grow(section(parent, {"intermediate_size": 60}), tmp_path / "out")
        towers = ModelSection(
            vision_tower="timm:test_efficientnet", image_size=64, random_weights=True, vision_feature_layer=-1,
            vision_feature_select_strategy="full", language_model=str(tmp_path / "out"),
        )  # fmt: skip
        assert assemble(towers).model.config.text_config.intermediate_size == 60


class TestRefusals:
    """Nothing is written when the target cannot be reached."""

    @pytest.mark.parametrize(
        ("target", "width", "depth", "message"),
        [
            ({}, "fpi", None, "grow.target is empty; name at least one of hidden_size, intermediate_size"),
            ({"hidden": 64}, "fpi", None, "grow.target has no key 'hidden'; did you mean 'hidden_size'"),
            ({"hidden_size": 64.5}, "fpi", None, r"grow.target.hidden_size=64.5 must be a whole number"),
            ({"hidden_size": 0}, "fpi", None, r"hidden_size=0 must be a whole number of at least 1"),
            ({"hidden_size": True}, "fpi", None, r"hidden_size=True must be"),
            ({"hidden_size": 16}, "fpi", None, r"grow.width: grower Fpi: hidden=16 must be at least 32"),
            ({"hidden_size": 32}, "fpi", None, "the parent is of this size already"),
            ({"hidden_size": 64}, None, "stack", r"grow.width is missing: grow.target changes hidden_size; name"),
            ({"num_hidden_layers": 8}, None, None, "grow.depth is missing"),
            ({"num_hidden_layers": 2}, None, "stack", r"grow.depth: grower Stack: layers=2 must be at least 4"),
            ({"num_attention_heads": 5}, "fpi", None, r"grow.target=.*kv_heads=2 must divide heads=5"),
            ({"hidden_size": 64}, "fpii", None, "grow.width: unknown grower 'fpii'; did you mean 'fpi'"),
            ({"hidden_size": 64}, NamedSection("fpi", {"deep": 1}), None, "no option 'deep'; did you mean 'depth'"),
            (
                {"hidden_size": 40},
                NamedSection("fpi", {"require_exact": True}),
                None,
                "hidden=40 must be a multiple of 32",
            ),
            ({"num_hidden_layers": 8, "hidden_size": 64}, "stack", None, "changes the number of layers only"),
        ],
    )
    def test_targets(
        self, target: dict[str, Any], width: Any, depth: Any, message: str, dense_checkpoint: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            grow(section(dense_checkpoint, target, width, depth), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_parents(self, moe_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path) -> None:
        def refused(parent: Path, message: str, out: Path = tmp_path / "out") -> None:
            with pytest.raises(ValueError, match=message):
                grow(section(parent, DOUBLE), out)

        refused(moe_checkpoint, "a mixture of experts; growth starts from a dense checkpoint")
        refused(dense_checkpoint, "would replace its own parent", dense_checkpoint)
        refused(tmp_path / "nowhere", "no such checkpoint directory")
        phi = write_tiny_checkpoint(tmp_path / "phi", text="phi")
        refused(phi, "cannot grow a model of type 'phi'")
        silent = write_language_model(tmp_path / "silent")
        for file in silent.glob("token*"):
            file.unlink()
        refused(silent, "no tokenizer can be loaded from there")
        odd = write_language_model(tmp_path / "odd")
        tensors = load_file(odd / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, odd / "model.safetensors")
        refused(odd, r"missing model\.layers\.1\.mlp\.up_proj\.weight")
        assert not (tmp_path / "out").exists()

    def test_a_projector_that_is_not_known(
        self, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(growing, "_PROJECTORS", ("linear",))
        with pytest.raises(ValueError, match="projector 'mlp2x_gelu' cannot grow with the hidden width; known: linear"):
            grow(section(dense_checkpoint, DOUBLE), tmp_path / "out")

    def test_a_grower_that_breaks_its_promise_is_found_out(
        self, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Sloppy(Fpi):
            def target_tensor(self, name: str, read: Any) -> torch.Tensor:
                return super().target_tensor(name, read) * 1.001

        monkeypatch.setitem(GROWERS._entries, "sloppy", Sloppy)
        with pytest.raises(CheckpointError, match=r"growing .* is not exact: logits .* differ by"):
            grow(section(dense_checkpoint, DOUBLE, "sloppy"), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_no_room(self, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(CheckpointError, match="GB are free there"):
            grow(section(dense_checkpoint, DOUBLE), tmp_path / "out")
