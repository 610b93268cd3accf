"""Experts in image-text-to-text classes that are not LLaVA: upcycled through the files, loaded by name, compared."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from llava_moe import upcycle as program
from llava_moe.config import CalibrationSection, NamedSection, PartSection
from llava_moe.model.foreign import FOREIGN_TYPES, foreign_config, foreign_config_class, is_foreign
from llava_moe.model.layout import StoredModel, empty_model
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import is_streamed, open_model
from llava_moe.model.streaming import CheckpointReader
from llava_moe.model.upcycling import PROVENANCE, count_parameters, upcycle
from llava_moe.moe import BALANCE_LOSSES, MoELayer
from llava_moe.training.controllers import moe_layers
from llava_moe.training.objective import balance_terms
from tests.model.foreign_cases import (
    FAMILIES,
    NAMED,
    answers,
    batch_of,
    every_family,
    logits_of,
    section,
    stock_config,
    write_stock,
)


@dataclass(frozen=True)
class Made:
    """A stock checkpoint and what became of it."""

    parent: Path
    path: Path
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Upcycles each family once; read-only."""
    known: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            parent = write_stock(folder / "stock", kind)
            known[kind] = Made(parent, folder / "moe", upcycle(section(parent), folder / "moe"))
        return known[kind]

    return make


def test_the_families_are_what_they_say() -> None:
    assert len(FAMILIES) == 8
    assert set(FAMILIES) <= set(FOREIGN_TYPES)
    assert set(NAMED) <= set(FAMILIES)
    assert len(FOREIGN_TYPES) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOREIGN_TYPES)
def test_both_classes_can_be_made_of_every_type(kind: str) -> None:
    made = foreign_config_class(kind)
    assert made.model_type == f"moe_{kind}"
    assert foreign_config_class(kind) is made
    model = AutoModelForImageTextToText._model_mapping[made]
    assert model.config_class is made
    stock = next(base for base in model.__mro__ if base.__module__.startswith("transformers."))
    assert model.__name__ == f"Moe{stock.__name__}"


@every_family
class TestFamilies:
    """Each stock class, through the files."""

    def test_equals_the_stock_class(self, kind: str, made: Any) -> None:
        found = made(kind)
        stock = AutoModelForImageTextToText.from_pretrained(found.parent).eval()
        sparse = AutoModelForImageTextToText.from_pretrained(found.path).eval()
        assert type(stock).__module__.startswith("transformers.")
        assert type(sparse).__name__ == f"Moe{type(stock).__name__}"
        assert isinstance(sparse, type(stock))
        layers = {path: m for path, m in sparse.named_modules() if isinstance(m, MoELayer)}
        assert list(layers) == [f"{FAMILIES[kind].decoder}.layers.{index}.mlp" for index in (0, 2)]
        batch = batch_of(kind)
        expected = logits_of(stock, batch)
        assert float(expected.std()) > 0.05
        real = batch["attention_mask"].bool()
        difference = (logits_of(sparse, batch) - expected).abs()[real]
        assert float(difference.max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
        changed = {**batch, "pixel_values": batch["pixel_values"].flip(0) + 0.5}
        assert float((logits_of(sparse, changed) - expected).abs().max()) > 1e-4, "the picture matters"
        assert answers(sparse, kind) == answers(stock, kind)
        assert found.facts["exact"] is True
        assert found.facts["greedy_agreement"] == 1.0
        assert found.facts["num_tokens"] > 100
        assert max(found.facts["layer_errors"].values()) < 1e-5

    def test_save_and_load_is_bit_equal(self, kind: str, made: Any, tmp_path: Path) -> None:
        sparse = AutoModelForImageTextToText.from_pretrained(made(kind).path).eval()
        with torch.no_grad():
            for layer in moe_layers(sparse).values():
                for parameter in layer.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        sparse.save_pretrained(tmp_path)
        assert set(CheckpointReader(tmp_path).infos) == set(CheckpointReader(made(kind).path).infos)
        other = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        mine, theirs = sparse.state_dict(), other.state_dict()
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
        batch = batch_of(kind)
        assert torch.equal(logits_of(other, batch), logits_of(sparse, batch))

    def test_other_tensors_are_the_parents_bytes(self, kind: str, made: Any) -> None:
        old, new = CheckpointReader(made(kind).parent), CheckpointReader(made(kind).path)
        shared = [name for name in new.infos if name in old.infos]
        assert all(torch.equal(old.read(name), new.read(name)) for name in shared)
        lost = [name for name in old.infos if name not in new.infos]
        assert len(lost) == 6
        assert all(".mlp." in name for name in lost)

    def test_balance_is_recorded_and_learns_also_under_checkpointing(self, kind: str, made: Any) -> None:
        found = []
        for checkpointing in (False, True):
            model = AutoModelForImageTextToText.from_pretrained(made(kind).path).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            batch = batch_of(kind)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            output = model(**batch, labels=labels, use_cache=False)
            routings = output["routings"]
            assert list(routings) == [("decoder", 0), ("decoder", 2)]
            context = model.scope.context_of(("decoder", 2))
            assert context.token_mask_T.tolist() == batch["attention_mask"].bool().flatten().tolist()
            assert int(context.modality_T.sum()) == 2 * FAMILIES[kind].num_image_tokens
            terms = balance_terms(routings, model.scope, {"switch": BALANCE_LOSSES.get("switch").build({})})
            terms["switch"].backward(retain_graph=True)
            gates = [layer.router.scorer.weight for layer in moe_layers(model).values()]
            assert all(float(gate.grad.abs().sum()) > 0 for gate in gates)
            output.loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            assert any(".experts." in name and float(grad.abs().sum()) > 0 for name, grad in found[-1].items())
        plain, recomputed = found
        assert plain.keys() == recomputed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=1e-5)


class TestFiles:
    """What lies beside the weights, and how it is found."""

    @pytest.mark.slow
    def test_a_fresh_process_needs_the_import_and_nothing_else(self, made: Any) -> None:
        load = (
            "from transformers import AutoModelForImageTextToText as A; import sys; m = A.from_pretrained(sys.argv[1])"
        )
        for head, code in (("import llava_moe; ", 0), ("", 1)):
            found = subprocess.run(
                [sys.executable, "-c", f"{head}{load}; print(type(m).__name__)", str(made("smolvlm").path)],
                capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            assert found.returncode == code, found.stderr[-2000:]
            if code == 0:
                assert "MoeSmolVLMForConditionalGeneration" in found.stdout
            else:
                assert "moe_smolvlm" in found.stderr

    @pytest.mark.slow
    def test_importing_the_package_imports_no_modelling_file(self) -> None:
        code = "import llava_moe, sys; print(sorted(m for m in sys.modules if 'qwen2_5_vl' in m or 'internvl' in m))"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        assert found.stdout.splitlines()[-1] == "[]"

    def test_config_and_provenance(self, made: Any) -> None:
        found = made("qwen2_5_vl")
        config = json.loads((found.path / "config.json").read_text())
        assert config["model_type"] == "moe_qwen2_5_vl"
        assert config["architectures"] == ["MoeQwen2_5_VLForConditionalGeneration"]
        assert config["moe"]["decoder"]["layers"] == [0, 2]
        assert (found.path / "tokenizer.json").read_bytes() == (found.parent / "tokenizer.json").read_bytes()
        provenance = json.loads((found.path / PROVENANCE).read_text())
        assert provenance["measured_on"] == "built-in text"
        sparse = AutoModelForImageTextToText.from_pretrained(found.path)
        assert provenance["parameters"]["moe"] == count_parameters(sparse)
        loaded = AutoConfig.from_pretrained(found.path)
        assert type(loaded) is type(sparse.config)
        assert loaded.moe_section.decoder.num_experts == (4, 4)
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (found.parent, found.path)]
        assert (
            tokenizers[0]("what is the red square")["input_ids"] == tokenizers[1]("what is the red square")["input_ids"]
        )

    def test_the_program(self, made: Any, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("upcycle: {decoder: {num_experts: 2, layers: [1], router: {name: top_k, args: {k: 1}}}}\n")
        out = program.run(str(recipe), parent=str(made("internvl").parent), to=str(tmp_path / "out"))
        assert AutoModelForImageTextToText.from_pretrained(out).config.moe["decoder"]["num_experts"] == 2
        card = (out / "README.md").read_text()
        assert "import llava_moe" in card
        assert "AutoModelForImageTextToText" in card

    def test_layer_by_layer(self, made: Any) -> None:
        found = made("paligemma")
        streamed = open_model(found.path, whole_bytes=0)
        assert is_streamed(streamed)
        whole = open_model(found.path)
        batch = batch_of("paligemma")
        assert torch.equal(logits_of(streamed, batch), logits_of(whole, batch))

    def test_other_methods_and_shared_experts(self, made: Any, tmp_path: Path) -> None:
        parent = made("smolvlm").parent
        changes = {"upcycler": NamedSection("virtual_group", {"granularity": 2}), "shared": {"num": 1}}
        facts = upcycle(section(parent, **changes), tmp_path / "out")
        assert facts["exact"] is True
        sparse = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        layer = next(iter(moe_layers(sparse).values()))
        assert layer.experts.spec.intermediate == 24
        assert layer.shared is not None

    def test_a_dense_one_of_ours_is_the_stock_class(self, made: Any) -> None:
        stored = StoredModel(made("internvl").parent)
        assert stored.config.model_type == "moe_internvl"
        assert stored.config.moe is None
        stock = AutoModelForImageTextToText.from_pretrained(made("internvl").parent)
        assert stored.model.state_dict().keys() == stock.state_dict().keys()
        assert all(torch.equal(stored.read(key), tensor) for key, tensor in stock.state_dict().items())

    def test_decoders_with_experts_of_their_own_are_read(self) -> None:
        kind = "internvl"
        experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        config = stock_config(kind)
        text = {**FAMILIES[kind].text, **experts, "head_dim": 8, "vocab_size": config.text_config.vocab_size}
        config = CONFIG_MAPPING[kind](**{**config.to_dict(), "text_config": text})
        ours = foreign_config(config)
        model = AutoModelForImageTextToText.from_config(ours).eval()
        with torch.no_grad():
            output = model(**batch_of(kind))
        assert sorted(output["routings"]) == [("decoder", index) for index in range(3)]


class TestRefusals:
    """One clear error each."""

    def test_a_dense_checkpoint_under_a_sparse_config(self, made: Any, tmp_path: Path) -> None:
        found = made("smolvlm")
        config = AutoConfig.from_pretrained(found.path)
        with pytest.raises(CheckpointError, match="make the MoE checkpoint with `llava-moe upcycle`"):
            AutoModelForImageTextToText.from_pretrained(found.parent, config=config)

    def test_upcycling_twice(self, made: Any, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="already a mixture of experts"):
            upcycle(section(made("smolvlm").path), tmp_path / "out")

    def test_other_parts(self, made: Any, tmp_path: Path) -> None:
        wanted = section(made("smolvlm").parent)
        wanted.vision = PartSection()
        with pytest.raises(ValueError, match=r"upcycle\.vision: of a smolvlm only the decoder can get experts"):
            upcycle(wanted, tmp_path / "out")
        part = {"layers": [0], "num_experts": 2}
        with pytest.raises(ValueError, match=r"moe\.projector: of a moe_smolvlm only the decoder"):
            foreign_config_class("smolvlm")(moe={"projector": part})

    def test_calibration(self, made: Any, tmp_path: Path) -> None:
        wanted = section(made("smolvlm").parent)
        wanted.calibration = CalibrationSection("data.json", "images")
        with pytest.raises(ValueError, match=r"upcycle\.calibration: samples are rendered for LLaVA models"):
            upcycle(wanted, tmp_path / "out", samples=list)

    def test_reentrant_checkpointing(self, made: Any) -> None:
        model = AutoModelForImageTextToText.from_pretrained(made("smolvlm").path)
        with pytest.raises(ValueError, match="use_reentrant=True loses the gradient"):
            model.gradient_checkpointing_enable({"use_reentrant": True})

    def test_a_layer_that_is_not_there(self, made: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"upcycle\.decoder\.layers=\[9\]: there are layers 0\.\.2"):
            upcycle(section(made("smolvlm").parent, layers=[9]), tmp_path / "out")

    def test_a_class_of_another_task(self, tmp_path: Path) -> None:
        assert not is_foreign("bert")
        assert not is_foreign("llava")
        assert is_foreign("moe_qwen2_5_vl")
        with pytest.raises(ValueError, match="no image-text-to-text class for the model_type 'bert'"):
            foreign_config_class("bert")
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(CheckpointError, match="its model_type is 'bert'"):
            upcycle(section(tmp_path), tmp_path / "out")

    def test_an_unknown_decoder_is_described(self) -> None:
        """BLIP-2's OPT has its two linear maps in the layer itself: there is no block to replace."""
        text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "vocab_size": 64, "word_embed_proj_dim": 32}  # fmt: skip
        small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        qformer = {**small, "encoder_hidden_size": 24}
        config = CONFIG_MAPPING["blip-2"](text_config=text, vision_config=small, qformer_config=qformer)
        part = {"decoder": {"layers": [0], "num_experts": 2}}
        ours = foreign_config(config)
        found = (
            r"OPT\w+ has no list of layers with a child mlp or .*found .*layers of OPTDecoderLayer \(self_attn, .*fc1"
        )
        with pytest.raises(ValueError, match=found):
            empty_model(type(ours).from_dict({**ours.to_dict(), "moe": part}))

    def test_a_class_without_a_decoder_is_described(self) -> None:
        config = foreign_config_class("pix2struct")()
        small = {"num_layers": 1, "num_hidden_layers": 1, "hidden_size": 16, "d_ff": 16, "d_kv": 4, "num_heads": 2}
        config = foreign_config(CONFIG_MAPPING["pix2struct"](text_config=small, vision_config=small))
        with pytest.raises(ValueError, match=r"is an encoder-decoder|names no decoder inside of it; its parts are"):
            empty_model(config)

    def test_the_names_are_of_this_transformers(self) -> None:
        assert all(hasattr(transformers, type(stock_config(kind)).__name__) for kind in FAMILIES)
