"""The upcycling program: what lies on disk, every method through the files, provenance, fresh routers, refusals."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_moe.calibration import calibration_batches
from llava_moe.config import CalibrationSection, NamedSection, PartSection, UpcycleSection
from llava_moe.data.processing import load_processor
from llava_moe.model import calibrating, upcycling, upcycling_layer
from llava_moe.model.assemble import load_model
from llava_moe.model.layout import StoredModel
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import open_model
from llava_moe.model.streaming import CheckpointReader
from llava_moe.model.upcycling import PROVENANCE, count_parameters, logit_error, select_layers, upcycle
from llava_moe.moe import UPCYCLERS, MoELayer
from llava_moe.moe.upcycling import Contract, Copy, DenseMlp
from tests.model.inputs import gradients, logits_of, picture_batch
from tests.model.test_sites import FAMILIES
from tests.tiny import write_llava_json
from tests.tiny_model import TINY_MOE, tiny_model, tiny_moe, write_tiny_checkpoint

DECODER = "model.language_model.layers.{}.mlp"


def section(parent: Path, part: str = "decoder", calibration: Any = None, seed: int = 0, **changes: Any) -> Any:
    """A section with one part."""
    for key in ("router", "experts", "upcycler"):
        if isinstance(changes.get(key), str):
            changes[key] = NamedSection(changes[key])
    made = UpcycleSection(parent=str(parent), seed=seed, calibration=calibration)
    setattr(made, part, PartSection(**changes))
    return made


def named(name: str, **args: Any) -> NamedSection:
    return NamedSection(name, args)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSection:
    """12 records, every fourth without a picture."""
    data, images = write_llava_json(tmp_path_factory.mktemp("samples"), 12, num_turns=2, text_only_every=4)
    return CalibrationSection(path=str(data), image_folder=str(images), num_samples=12)


def run(made: UpcycleSection, out: Path, **options: Any) -> dict[str, Any]:
    """Upcycles with the samples of the section."""
    if made.calibration is not None:
        batches = calibration_batches(made.calibration, made.parent)
        options["samples"] = lambda: batches
    return upcycle(made, out, **options)


def on_disk(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in CheckpointReader(path).infos.items()}


class TestLayers:
    """Which layers a recipe names."""

    @pytest.mark.parametrize(
        ("choice", "expected"),
        [
            ("all", [0, 1, 2, 3, 4]),
            ("alternate", [0, 2, 4]),
            ("every_3", [0, 3]),
            ("first_half", [0, 1]),
            ("second_half", [2, 3, 4]),
            ([3, 1], [3, 1]),
            (["2"], [2]),
        ],
    )
    def test_select(self, choice: Any, expected: list[int]) -> None:
        assert select_layers(choice, 5) == expected

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ("alternating", "must be one of all, alternate, every_N, first_half, second_half or a list"),
            ("every_0", "must be one of"),
            ([5], r"the(re are| decoder has) layers 0\.\.4"),
            ([-1], r"there are layers 0\.\.4"),
            ([], r"there are layers 0\.\.4"),
        ],
    )
    def test_select_refuses(self, choice: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            select_layers(choice, 5)


# one family for each pattern of children; the others have names of their own around the block
_PATTERNS = ("llama", "phi3", "phi", "gpt_neox", "nemotron", "starcoder2")
FAMILY_CASES = [
    *(pytest.param(text, False, marks=() if text in _PATTERNS else pytest.mark.slow) for text in FAMILIES),
    ("llama", True),
    ("phi", True),
]


class TestFiles:
    """What is written is what transformers would write, and what it reads."""

    @pytest.mark.parametrize(("text", "tied"), FAMILY_CASES)
    def test_keys_shapes_and_dtypes_are_those_of_save_pretrained(self, text: str, tied: bool, tmp_path: Path) -> None:
        dense = tiny_model(text=text, tie_word_embeddings=tied)
        dense.save_pretrained(tmp_path / "dense", save_original_format=True)
        processor(tmp_path / "dense")
        facts = upcycle(section(tmp_path / "dense", layers=[1, 3], router=named("top_k", bias=True)), tmp_path / "out")
        assert facts["exact"] is True
        assert facts["max_abs_logit_error"] <= 1e-5 * max(1.0, facts["max_abs_logit"])
        loaded = load_model(tmp_path / "out")
        loaded.save_pretrained(tmp_path / "stock", save_original_format=True)
        assert on_disk(tmp_path / "out") == on_disk(tmp_path / "stock")
        written, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "stock"))
        assert all(torch.equal(written[name], stock[name]) for name in stock)
        written_config, stock_config = (
            json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "stock")
        )
        for config in (written_config, stock_config):
            for part in ("text_config", "vision_config"):
                config[part].pop("dtype", None)  # loading notes it there too
        assert written_config == stock_config

    def test_other_tensors_are_the_parents_bytes(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        upcycle(section(dense_checkpoint), tmp_path / "out")
        dense, sparse = load_file(dense_checkpoint / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
        shared = [name for name in sparse if name in dense]
        assert all(torch.equal(sparse[name], dense[name]) for name in shared)
        assert set(dense) - set(shared) == {
            f"language_model.model.layers.{i}.mlp.{name}.weight"
            for i in (0, 2)
            for name in ("gate_proj", "up_proj", "down_proj")
        }

    def test_shards_on_both_sides(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        model = load_model(dense_checkpoint)
        model.save_pretrained(tmp_path / "dense", save_original_format=True, max_shard_size="50KB")
        processor(tmp_path / "dense")
        upcycle(section(dense_checkpoint), tmp_path / "one")
        upcycle(section(tmp_path / "dense"), tmp_path / "many", max_shard_bytes=100_000)
        assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
        one, many = (load_model(tmp_path / name).state_dict() for name in ("one", "many"))
        assert all(torch.equal(one[key], many[key]) for key in one)

    def test_a_parent_with_the_names_of_training_keeps_them(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        load_model(dense_checkpoint).save_pretrained(tmp_path / "dense", save_original_format=False)
        processor(tmp_path / "dense")
        upcycle(section(tmp_path / "dense", layers=[0]), tmp_path / "out")
        found = on_disk(tmp_path / "out")
        assert "model.language_model.layers.0.mlp.experts.3.gate_proj.weight" in found
        assert all(name.startswith(("model.", "lm_head.")) for name in found)
        assert load_model(tmp_path / "out").config.moe["decoder"]["layers"] == [0]

    def test_a_stock_checkpoint(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        stock = Path(shutil.copytree(dense_checkpoint, tmp_path / "stock"))
        config = json.loads((stock / "config.json").read_text())
        del config["projector"], config["moe"]
        (stock / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
        facts = upcycle(section(stock), tmp_path / "out")
        assert facts["exact"] is True
        assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava_moe"

    def test_what_the_model_has_no_place_for_is_left_out(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        parent = Path(shutil.copytree(dense_checkpoint, tmp_path / "dense"))
        tensors = load_file(parent / "model.safetensors")
        save_file(tensors | {"vision_tower.head.probe": torch.ones(1)}, parent / "model.safetensors")
        facts = upcycle(section(parent), tmp_path / "out")
        assert facts["left_out"] == ["vision_tower.head.probe"]
        assert "vision_tower.head.probe" not in on_disk(tmp_path / "out")

    def test_bfloat16_stays_and_float32_buffers_too(self, tmp_path: Path) -> None:
        tiny_model(text="phi").to(torch.bfloat16).save_pretrained(tmp_path / "dense", save_original_format=True)
        processor(tmp_path / "dense")
        made = section(tmp_path / "dense", layers=[0], capacity={"factor": 2.0})
        facts = upcycle(made, tmp_path / "out")
        found = on_disk(tmp_path / "out")
        wide = {name: dtype for name, (dtype, _) in found.items() if dtype != torch.bfloat16}
        assert wide == {"language_model.model.layers.0.mlp.capacity.factor": torch.float32}
        assert facts["exact"] is True
        assert facts["max_abs_logit_error"] <= 1e-5 * max(1.0, facts["max_abs_logit"])
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"

    @pytest.mark.parametrize("vision", ["clip", "siglip"])
    def test_every_part(self, vision: str, tmp_path: Path) -> None:
        parent = write_tiny_checkpoint(tmp_path / "dense", vision=vision)
        made = section(parent)
        made.vision = PartSection(layers=[0, 1], num_experts=[2, 3], router=named("top_k", k=1))
        made.projector = PartSection(num_experts=3)
        facts = upcycle(made, tmp_path / "out")
        assert facts["exact"] is True
        assert facts["layers"] == {"decoder": [0, 2], "vision": [0, 1], "projector": [0]}
        assert facts["layer_errors"].keys() == {"decoder.0", "decoder.2", "vision.0", "vision.1", "projector"}
        assert max(facts["layer_errors"].values()) < 1e-5
        sparse = load_model(tmp_path / "out")
        sparse.save_pretrained(tmp_path / "stock", save_original_format=True)
        extra = "vision_model." if vision == "clip" else ""  # the parent's own name, where it has a longer one
        assert {name.replace(extra, "") for name in on_disk(tmp_path / "out")} == {
            name.replace(extra, "") for name in on_disk(tmp_path / "stock")
        }
        dense = load_model(parent)
        batch = picture_batch(dense)
        assert float((logits_of(sparse, **batch) - logits_of(dense, **batch)).abs().max()) <= 1e-5


def processor(folder: Path) -> None:
    """Adds the tiny processor to a checkpoint."""
    from tests.tiny_model import tiny_processor

    tiny_processor().save_pretrained(folder)


# upcycler, other values of the part, whether the result equals its parent
METHODS: dict[str, tuple[NamedSection, dict[str, Any], bool]] = {
    "copy": (named("copy"), {}, True),
    "copy unnormalised": (named("copy"), {"router": named("top_k", convention="softmax_topk")}, False),
    "noise": (named("noise", std=0.01), {}, False),
    "drop": (named("drop", ratio=0.5), {}, False),
    "virtual_group": (named("virtual_group", granularity=2), {}, True),
    "virtual_group uniform": (
        named("virtual_group", granularity=2),
        {"router": named("top_k", convention="softmax_topk", init_std=0.0)},
        True,
    ),
    "virtual_group not uniform": (
        named("virtual_group", granularity=2),
        {"router": named("top_k", convention="softmax_topk")},
        False,
    ),
    "partition_random": (named("partition_random"), {}, False),
    "partition uniform": (
        named("partition_random", output_scale="n"),
        {"router": named("top_k", k=4, init_std=0.0)},
        True,
    ),
    "partition_cluster": (named("partition_cluster"), {}, False),
    "partition_coactivation": (named("partition_coactivation"), {}, False),
    "partition_calibrated": (named("partition_random", output_scale="calibrate"), {}, False),
    "partition_gradient": (named("partition_gradient"), {}, False),
    "sharing_inner": (named("sharing_inner"), {}, False),
    "sharing_inter": (named("sharing_inter", num_residual=2), {}, False),
    "from_scratch": (named("from_scratch"), {}, False),
    "shared sum": (named("copy"), {"shared": {"num": 2}}, True),
    "shared gated": (named("copy"), {"shared": {"num": 1, "width": 8, "mix": "gated"}}, True),
    "shared mean": (named("copy"), {"shared": {"num": 1, "mix": "mean"}}, True),
    "special experts": (named("copy"), {"experts": named("special")}, False),
    "lora experts": (named("copy"), {"experts": named("lora", rank=2)}, True),
    "mov experts": (named("copy"), {"experts": named("mov")}, True),
    "capacity": (named("copy"), {"capacity": {"factor": 0.5}}, True),
    "side branch": (named("copy"), {"router": named("hyper_moe")}, False),
}


class TestMethods:
    """Every upcycler and every kind of experts, through the files."""

    @pytest.mark.parametrize("method", METHODS)
    def test_method(self, method: str, dense_checkpoint: Path, samples: CalibrationSection, tmp_path: Path) -> None:
        upcycler, values, exact = METHODS[method]
        kind = UPCYCLERS.get(upcycler.name).build(upcycler.args)
        calibration = samples if kind.needs != "nothing" else None
        made = section(dense_checkpoint, calibration=calibration, upcycler=upcycler, **values)
        facts = run(made, tmp_path / "out")
        assert facts["exact"] is exact
        assert (facts["max_abs_logit_error"] <= 1e-5 * max(1.0, facts["max_abs_logit"])) is exact
        assert (facts["greedy_agreement"] == 1.0) or not exact
        assert facts["num_tokens"] > 0
        sparse = load_model(tmp_path / "out")
        layers = [module for module in sparse.modules() if isinstance(module, MoELayer)]
        assert [layer.site for layer in layers] == [("decoder", 0), ("decoder", 2)]
        first, second = (dict(layer.named_parameters()) for layer in layers)
        drawn = [name for name in first if "router" in name and float(first[name].detach().std()) > 0]
        assert all(not torch.equal(first[name], second[name]) for name in drawn)
        assert facts["parameters"]["moe"] == count_parameters(sparse)
        if upcycler.name in ("copy", "sharing_inter"):
            sparse.save_pretrained(tmp_path / "stock", save_original_format=True)
            assert on_disk(tmp_path / "out") == on_disk(tmp_path / "stock")

    def test_every_upcycler_is_tested(self) -> None:
        assert {named.name for named, _, _ in METHODS.values()} | {"branch_train_mix"} == set(UPCYCLERS.names())

    def test_experts_are_what_the_upcycler_made(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        upcycle(section(dense_checkpoint, upcycler="partition_random", layers=[1]), tmp_path / "out")
        dense, sparse = load_model(dense_checkpoint), load_model(tmp_path / "out")
        block, experts = (m.get_submodule(DECODER.format(1)) for m in (dense, sparse))
        assert sparse.config.moe["decoder"]["expert_width"] == 12
        rows = experts.experts.gate_up_proj.unflatten(1, (2, 12))
        up = rows[:, 1].flatten(0, 1)
        assert sorted(up.tolist()) == sorted(block.up_proj.weight.tolist())
        sums = [float(weight.detach().sum()) for weight in (block.down_proj.weight, experts.experts.down_proj)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-4)

    def test_sharing_inter_writes_its_shared_experts(
        self, dense_checkpoint: Path, samples: CalibrationSection, tmp_path: Path
    ) -> None:
        upcycler = named("sharing_inter", num_residual=2)
        made = section(dense_checkpoint, calibration=samples, upcycler=upcycler, layers=[1], num_experts=4)
        run(made, tmp_path / "out")
        dense, sparse = load_model(dense_checkpoint), load_model(tmp_path / "out")
        layer = sparse.get_submodule(DECODER.format(1))
        assert layer.shared.config.mix == "sum"
        assert layer.shared.spec.intermediate == 16
        wanted = dense.get_submodule(DECODER.format(1)).up_proj.weight
        found = torch.cat([layer.experts.gate_up_proj[:, 8:].flatten(0, 1), layer.shared.block.gate_up_proj[0, 16:]])
        assert sorted(found.tolist()) == sorted(wanted.tolist())

    def test_soft_moe_in_the_tower(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        made = section(dense_checkpoint, "vision", layers=[0], router="soft_moe", experts="stacked")
        facts = upcycle(made, tmp_path / "out")
        assert facts["exact"] is False
        assert load_model(tmp_path / "out").config.moe["vision"]["router"]["name"] == "soft_moe"


class TestCalibration:
    """Statistics of the parent on real samples."""

    @pytest.mark.parametrize(
        ("part", "name"),
        [
            ("decoder", "partition_gradient"),
            ("decoder", "partition_coactivation"),
            ("vision", "partition_gradient"),
            ("projector", "partition_gradient"),
        ],
    )
    def test_a_streamed_parent_gives_the_same_result(
        self, part: str, name: str, samples: CalibrationSection, dense_checkpoint: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        made = section(dense_checkpoint, part, samples, upcycler=name, num_experts=2, layers=[0, 1])
        run(made, tmp_path / "whole")
        monkeypatch.setattr(calibrating, "STATISTICS_BYTES", 1)  # one layer after the other
        facts = run(made, tmp_path / "streamed", whole_bytes=0)
        whole, streamed = (load_model(tmp_path / name).state_dict() for name in ("whole", "streamed"))
        assert all(torch.equal(whole[key], streamed[key]) for key in whole)
        assert facts["measured_on"] == "calibration"
        whole_facts = json.loads((tmp_path / "whole" / PROVENANCE).read_text())
        assert facts["max_abs_logit_error"] == pytest.approx(whole_facts["max_abs_logit_error"], rel=1e-4)
        assert facts["layer_errors"] == pytest.approx(whole_facts["layer_errors"], rel=1e-4)

    def test_the_statistics_see_the_samples_tokens(self, samples: CalibrationSection, dense_checkpoint: Path) -> None:
        """Against the blocks called by hand, padding left out."""
        batches = calibration_batches(samples, dense_checkpoint)
        assert sum(len(batch["input_ids"]) for batch in batches) == 12
        model = open_model(dense_checkpoint)
        upcycler = UPCYCLERS.get("partition_coactivation").build({})
        path = DECODER.format(2)
        spec = upcycling_spec(model, path)
        watched = [calibrating.Watched(path, spec, 4)]
        (found,) = calibrating.statistics_of(model, "decoder", watched, upcycler, batches, [])
        kept: list[Tensor] = []
        block = model.get_submodule(path)
        hook = block.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        expected = torch.zeros(48, 48)
        for batch in batches:
            kept.clear()
            model(**{key: value for key, value in batch.items() if key != "labels"})
            h = DenseMlp.read(block, spec).hidden(kept[0][batch["attention_mask"].bool()], spec)
            expected += h.t() @ h
        hook.remove()
        assert torch.allclose(found.coactivation_FF, expected, rtol=1e-4, atol=1e-4)

    def test_samples_are_clustered_by_their_words(self, samples: CalibrationSection, dense_checkpoint: Path) -> None:
        batches = calibration_batches(samples, dense_checkpoint)
        stored = StoredModel(dense_checkpoint)
        upcycler = UPCYCLERS.get("partition_gradient").build({})
        labels = calibrating.sample_labels(stored, upcycler, [4, 4], batches, 0)
        assert sorted(labels.count(c) for c in range(4)) == [3, 3, 3, 3]
        assert labels == calibrating.sample_labels(stored, upcycler, [4, 4], batches, 0)
        five = calibrating.sample_labels(stored, upcycler, [5], batches, 0)
        assert {five.count(c) for c in range(5)} <= {2, 3, 4}
        with pytest.raises(ValueError, match="the same num_experts, not \\[2, 4\\]"):
            calibrating.sample_labels(stored, upcycler, [2, 4], batches, 0)
        with pytest.raises(ValueError, match=r"num_samples: 12 samples cannot be divided into 13 clusters"):
            calibrating.sample_labels(stored, upcycler, [13], batches, 0)

    def test_pictures_belong_to_the_samples_they_came_with(self) -> None:
        ids = torch.tensor([[9, 1, 9, 2], [1, 1, 1, 0], [9, 9, 3, 4]])  # 9 is the placeholder, two for a picture
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": torch.zeros(2, 3, 4, 4)}
        (decoder,) = calibrating._owners("decoder", [batch], [2, 0, 1], 9)
        assert decoder.tolist() == [*[2] * 4, 0, 0, 0, -1, *[1] * 4]
        (vision,) = calibrating._owners("vision", [batch], [2, 0, 1], 9)
        assert vision.tolist() == [2, 1]


def upcycling_spec(model: Any, path: str) -> Any:
    from llava_moe.model.sites import mlp_spec

    return mlp_spec(model.get_submodule(path), "silu")


class TestMeasuring:
    """The comparison with the parent."""

    @pytest.mark.parametrize("upcycler", ["copy", "drop"])
    def test_models_read_layer_by_layer_give_the_same_numbers(
        self, upcycler: str, dense_checkpoint: Path, tmp_path: Path
    ) -> None:
        made = section(dense_checkpoint, upcycler=upcycler)
        whole = upcycle(made, tmp_path / "whole")
        streamed = upcycle(made, tmp_path / "streamed", whole_bytes=0)
        for key in ("max_abs_logit_error", "max_abs_logit", "greedy_agreement", "num_tokens", "exact"):
            assert streamed[key] == pytest.approx(whole[key], abs=1e-6), key
        assert streamed["layer_errors"] == pytest.approx(whole["layer_errors"], rel=1e-4, abs=1e-7)
        assert (max(whole["layer_errors"].values()) < 1e-5) is (upcycler == "copy")

    def test_the_layer_errors_are_of_the_layers_alone(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        """An exact layer behind a broken one has no error: both get the parent's inputs."""
        made = section(dense_checkpoint, layers=[0], upcycler="from_scratch")
        made.projector = PartSection(num_experts=2)
        facts = upcycle(made, tmp_path / "out")
        assert facts["layer_errors"]["decoder.0"] > 0.5
        assert facts["layer_errors"]["projector"] < 1e-5

    def test_exactness_is_judged_at_the_scale_of_the_logits(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        """Rounding grows with the logits; those of real decoders reach 50, and 1e-5 of 1 would refuse them."""
        model = load_model(dense_checkpoint)
        with torch.no_grad():
            model.lm_head.weight *= 100
        parent = tmp_path / "loud"
        model.save_pretrained(parent, save_original_format=True)
        processor(parent)
        facts = upcycle(section(parent, layers="all"), tmp_path / "out")
        assert facts["exact"] is True
        assert facts["max_abs_logit"] > 100
        error, largest = logit_error(model, load_model(tmp_path / "out"))
        assert largest > 100
        assert error <= 1e-5 * largest

    def test_an_upcycler_that_breaks_its_promise_is_found_out(
        self, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Sloppy(Copy):
            def __call__(self, *args: Any) -> dict[str, Tensor]:
                return {name: tensor * 1.001 for name, tensor in super().__call__(*args).items()}

        monkeypatch.setitem(UPCYCLERS._entries, "sloppy", Sloppy)
        with pytest.raises(CheckpointError, match=r"not exact: logits .* differ by"):
            upcycle(section(dense_checkpoint, upcycler="sloppy"), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestProvenance:
    """What is noted beside the weights."""

    def test_all_of_it(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        facts = upcycle(section(dense_checkpoint, num_experts=3, layers=[1, 3], seed=5), tmp_path / "out")
        assert json.loads((tmp_path / "out" / PROVENANCE).read_text()) == facts
        assert facts["parent"] == str(dense_checkpoint)
        assert facts["sources"] == [str(dense_checkpoint)]
        assert facts["layers"] == {"decoder": [1, 3]}
        assert facts["method"] == {"decoder": "copy"}
        assert facts["contract"] == {"decoder": "exact_any_router"}
        assert facts["exact"] is True
        assert facts["seed"] == 5
        assert facts["versions"]["torch"] == torch.__version__
        assert facts["measured_on"] == "built-in text and picture"
        assert facts["num_tokens"] > 200
        assert facts["max_abs_logit_error"] <= 1e-5
        assert facts["section"]["decoder"]["num_experts"] == 3
        dense, sparse = load_model(dense_checkpoint), load_model(tmp_path / "out")
        assert facts["parameters"] == {"dense": count_parameters(dense), "moe": count_parameters(sparse)}
        processors = [load_processor(path) for path in (dense_checkpoint, tmp_path / "out")]
        assert processors[0].to_dict() == processors[1].to_dict()
        assert sparse.generation_config.eos_token_id == dense.generation_config.eos_token_id
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())

    def test_parameter_counts(self) -> None:
        dense, sparse = count_parameters(tiny_model()), count_parameters(tiny_model(TINY_MOE))
        block, router = 3 * 32 * 48, 4 * 32
        assert dense["total"] == dense["active"] == sum(p.numel() for p in tiny_model().parameters())
        assert sparse["total"] == dense["total"] + 2 * (3 * block + router)
        assert sparse["active"] == dense["total"] + 2 * (1 * block + router)

    def test_a_shared_base_is_always_active(self) -> None:
        lora = {"name": "lora", "args": {"rank": 2}}
        dense, sparse = count_parameters(tiny_model()), count_parameters(tiny_model(tiny_moe(experts=lora)))
        pair, router = 3 * 2 * (32 + 48), 4 * 32
        assert sparse["total"] == dense["total"] + 2 * (4 * pair + router)
        assert sparse["active"] == dense["total"] + 2 * (2 * pair + router)

    def test_experts_without_computation_are_not_counted_as_experts(self) -> None:
        special = {"name": "special", "args": {}}
        dense, sparse = count_parameters(tiny_model()), count_parameters(tiny_model(tiny_moe(experts=special)))
        block, router, constants = 3 * 32 * 48, 8 * 32, 2 * 3 * 32
        assert sparse["total"] == dense["total"] + 2 * (3 * block + router + constants)
        assert sparse["active"] == dense["total"] + 2 * (1 * block + router + constants)


class TestRandomness:
    """Where the numbers come from."""

    def test_routers_are_fresh_and_repeatable(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            upcycle(section(dense_checkpoint, seed=seed), tmp_path / name)
            torch.randn(3)  # the global random state has no say
        states = {name: load_model(tmp_path / name).state_dict() for name in "abc"}
        routers = [key for key in states["a"] if ".router." in key]
        assert len(routers) == 2
        assert not torch.equal(states["a"][routers[0]], states["a"][routers[1]])
        assert all(torch.equal(states["a"][key], states["b"][key]) for key in states["a"])
        for key in routers:
            assert not torch.equal(states["a"][key], states["c"][key])
            assert float(states["a"][key].std()) == pytest.approx(0.02, rel=0.3)

    def test_the_global_random_state_is_left_alone(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        before = torch.get_rng_state()
        upcycle(section(dense_checkpoint, upcycler="drop"), tmp_path / "out")
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("k", [1, 2])
    def test_router_gets_no_gradient_from_the_task_at_the_start(
        self, dense_checkpoint: Path, tmp_path: Path, k: int
    ) -> None:
        upcycle(section(dense_checkpoint, router=named("top_k", k=k)), tmp_path / "out")
        model = load_model(tmp_path / "out").train()
        model(**picture_batch(model)).loss.backward()
        found = gradients(model)
        routers = [gradient for name, gradient in found.items() if ".router." in name]
        others = max(float(gradient.abs().max()) for name, gradient in found.items() if ".experts." in name)
        assert len(routers) == 2
        assert all(float(gradient.abs().max()) < 1e-5 * others for gradient in routers)

    def test_experts_are_equal_at_first_and_part_after_one_step(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        upcycle(section(dense_checkpoint), tmp_path / "out")
        model = load_model(tmp_path / "out").train()
        layer = next(module for module in model.modules() if isinstance(module, MoELayer))
        weights = layer.experts.down_proj
        assert all(torch.equal(weights[0], weights[e]) for e in range(1, 4))
        batch = picture_batch(model, batch=4, length=20)
        model(**batch).loss.backward()
        torch.optim.SGD(layer.experts.parameters(), lr=0.1).step()
        assert not all(torch.equal(weights[0], weights[e]) for e in range(1, 4))


class TestBranchTrainMix:
    """Experts from several checkpoints, the mean of everything else."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        folder = tmp_path_factory.mktemp("trained")
        return [write_tiny_checkpoint(folder / str(seed), seed=seed) for seed in (1, 2, 3)]

    @pytest.mark.parametrize("with_parent", [False, True])
    def test_experts_and_means(
        self, trained: list[Path], with_parent: bool, dense_checkpoint: Path, tmp_path: Path
    ) -> None:
        upcycler = named("branch_train_mix", checkpoints=[str(p) for p in trained], with_parent=with_parent)
        made = section(dense_checkpoint, upcycler=upcycler, num_experts=3 + with_parent, layers=[1])
        made.projector = PartSection(num_experts=2)
        facts = upcycle(made, tmp_path / "out")
        assert facts["exact"] is False
        paths = [dense_checkpoint] * with_parent + trained
        assert facts["sources"] == [str(path) for path in paths]
        states = [load_model(path).state_dict() for path in paths]
        found = load_model(tmp_path / "out").state_dict()
        block = DECODER.format(1)
        for e, state in enumerate(states):
            assert torch.equal(found[f"{block}.experts.down_proj"][e], state[f"{block}.down_proj.weight"])
            up = torch.cat([state[f"{block}.{name}_proj.weight"] for name in ("gate", "up")])
            assert torch.equal(found[f"{block}.experts.gate_up_proj"][e], up)
        for key in ("lm_head.weight", f"{DECODER.format(0)}.up_proj.weight"):
            assert torch.allclose(found[key], torch.stack([state[key] for state in states]).mean(0), atol=1e-6)
        mean = torch.stack([s["model.multi_modal_projector.linear_2.weight"] for s in states]).mean(0)
        assert torch.allclose(found["model.multi_modal_projector.experts.down_proj"][1], mean, atol=1e-6)

    def test_identical_checkpoints_are_sparse_upcycling(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        upcycler = named("branch_train_mix", checkpoints=[str(dense_checkpoint)] * 3)
        facts = upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=3), tmp_path / "mixed")
        upcycle(section(dense_checkpoint, num_experts=3), tmp_path / "copied")
        mixed, copied = (load_model(tmp_path / name).state_dict() for name in ("mixed", "copied"))
        assert all(torch.allclose(mixed[key], copied[key], atol=1e-6) for key in copied)
        assert facts["max_abs_logit_error"] < 1e-5

    def test_other_names_on_disk_are_no_obstacle(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        load_model(dense_checkpoint).save_pretrained(tmp_path / "renamed", save_original_format=False)
        upcycler = named("branch_train_mix", checkpoints=[str(tmp_path / "renamed")], with_parent=True)
        facts = upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=2), tmp_path / "out")
        assert facts["max_abs_logit_error"] < 1e-5

    @pytest.mark.parametrize(
        ("args", "num_experts", "message"),
        [
            ({}, 3, r"upcycler\.args\.checkpoints=None: name the fine-tuned checkpoints"),
            ({"checkpoints": "a"}, 3, r"checkpoints='a'"),
            ({"checkpoints": ["PARENT"], "with_parent": 1}, 2, "with_parent=1 must be true or false"),
            ({"checkpoints": ["PARENT"], "seed": 1}, 1, "no option 'seed'"),
            ({"checkpoints": ["PARENT"] * 2}, 3, r"num_experts=3: .* each of the 2 checkpoints, so it must be 2"),
            ({"checkpoints": ["PARENT"], "with_parent": True}, 3, "and one of the parent, so it must be 2"),
            ({"checkpoints": ["/nowhere"]}, 1, "/nowhere: no such checkpoint"),
        ],
    )
    def test_wrong_options(
        self, args: dict[str, Any], num_experts: int, message: str, dense_checkpoint: Path, tmp_path: Path
    ) -> None:
        args = json.loads(json.dumps(args).replace("PARENT", str(dense_checkpoint)))
        upcycler = NamedSection("branch_train_mix", args)
        with pytest.raises(ValueError, match=message):
            upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=num_experts), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_part_that_is_measured_is_refused_beside_it(
        self, dense_checkpoint: Path, samples: CalibrationSection, tmp_path: Path
    ) -> None:
        """Its dense block is a mean of checkpoints; statistics of one of them would be those of another block."""
        upcycler = named("branch_train_mix", checkpoints=[str(dense_checkpoint)] * 2)
        made = section(dense_checkpoint, calibration=samples, upcycler=upcycler, num_experts=2)
        made.projector = PartSection(num_experts=2, upcycler=named("partition_random", output_scale="calibrate"))
        with pytest.raises(ValueError, match=r"upcycle\.projector\.upcycler=.partition_random. runs the dense model"):
            run(made, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_the_first_tensor_that_differs_is_named(
        self, dense_checkpoint: Path, timm_checkpoint: Path, tmp_path: Path
    ) -> None:
        upcycler = named("branch_train_mix", checkpoints=[str(timm_checkpoint)])
        with pytest.raises(CheckpointError, match=r"embeddings\.patch_embedding\.weight is missing, and \("):
            upcycle(section(dense_checkpoint, upcycler=upcycler, num_experts=1), tmp_path / "out")


class TestRefusals:
    """Nothing is written when something does not fit."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"upcycler": "copi"}, "unknown upcycler 'copi'; did you mean 'copy'"),
            ({"upcycler": named("copy", noise=1)}, "no option 'noise'"),
            ({"router": "topk"}, "did you mean 'top_k'"),
            ({"router": named("top_k", k=5)}, "k=5 must be between 1 and the 4 experts"),
            ({"experts": "stakced"}, "unknown experts 'stakced'; did you mean 'stacked'"),
            ({"experts": named("stacked", kernel="groped")}, "did you mean 'grouped'"),
            ({"layers": [7]}, r"upcycle\.decoder\.layers=\[7\]"),
            ({"layers": [1, 1]}, "each once"),
            ({"num_experts": 0}, "num_experts must be at least 1"),
            ({"num_experts": [2, 3, 4]}, "names 3 numbers for 2 layers"),
            ({"upcycler": "partition_random", "num_experts": 5}, "48 neurons cannot be divided into 5 equal parts"),
            ({"upcycler": "partition_random", "num_experts": [2, 4]}, r"different widths \[12, 24\]"),
            ({"upcycler": "drop", "experts": "lora"}, "experts 'lora' share the dense block as it is; use copy"),
            ({"upcycler": named("virtual_group", granularity=2), "router": "hash"}, "could be tied"),
            ({"shared": {"nums": 2}}, "no option 'nums'"),
            (
                {"shared": {"num": 1, "width": 8, "mix": "mean"}},
                r"decoder\.shared: with mix: mean .* must be 48, not 8",
            ),
            ({"capacity": {"factor": -1}}, "factor=-1 must be above 0"),
            ({"router": "soft_moe"}, "looks at later tokens"),
            ({"upcycler": "partition_coactivation"}, r"upcycle\.calibration is missing: upcycler 'partition_coact"),
        ],
    )
    def test_wrong_sections(
        self, dense_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            upcycle(section(dense_checkpoint, **changes), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_no_part(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="names no part of the model; give it a section decoder, vision or proj"):
            upcycle(UpcycleSection(parent=str(dense_checkpoint)), tmp_path / "out")

    def test_shared_experts_that_the_upcycler_makes(
        self, dense_checkpoint: Path, samples: CalibrationSection, tmp_path: Path
    ) -> None:
        made = section(dense_checkpoint, calibration=samples, upcycler="sharing_inter", shared={"num": 1})
        with pytest.raises(ValueError, match="'sharing_inter' makes the shared experts itself; leave it out"):
            run(made, tmp_path / "out")

    def test_layers_behind_the_features(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="behind the selected feature layer"):
            upcycle(section(dense_checkpoint, "vision", layers=[2]), tmp_path / "out")

    def test_a_tower_without_blocks(self, timm_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has no list of layers"):
            upcycle(section(timm_checkpoint, "vision", layers=[0]), tmp_path / "out")

    def test_a_sparse_parent(self, moe_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="already a mixture of experts"):
            upcycle(section(moe_checkpoint), tmp_path / "out")

    def test_the_parent_itself(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(dense_checkpoint)
        with pytest.raises(CheckpointError, match="would replace its own parent"):
            upcycle(section(dense_checkpoint), link)
        assert load_model(dense_checkpoint).config.moe is None

    def test_a_parent_without_a_processor(self, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path / "dense", save_original_format=True)
        with pytest.raises(CheckpointError, match="no processor can be loaded from there"):
            upcycle(section(tmp_path / "dense"), tmp_path / "out")

    def test_no_room(self, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(CheckpointError, match="GB are free there"):
            upcycle(section(dense_checkpoint), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_samples_that_nobody_reads(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        calibration = CalibrationSection(path="x.json", image_folder=".")
        with pytest.raises(ValueError, match="nobody reads its samples"):
            upcycle(section(dense_checkpoint, calibration=calibration), tmp_path / "out")

    def test_an_upcycler_whose_tensors_are_not_the_layers(
        self, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Short(Copy):
            def __call__(self, *args: Any) -> dict[str, Tensor]:
                return {name: tensor[:2] for name, tensor in super().__call__(*args).items()}

        monkeypatch.setitem(UPCYCLERS._entries, "short", Short)
        with pytest.raises(CheckpointError, match=r"do not agree on \['experts\.down_proj', 'experts\.gate_up_proj'\]"):
            upcycle(section(dense_checkpoint, upcycler="short"), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_leaves_nothing(
        self, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[str] = []
        real = upcycling.make_layer

        def interrupted(block: Any, *args: Any) -> Any:
            made.append(block.site)
            if len(made) == 2:
                assert (tmp_path / "out.partial" / "model.safetensors").is_file()
                signal.raise_signal(signal.SIGINT)
            return real(block, *args)

        monkeypatch.setattr(upcycling, "make_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            upcycle(section(dense_checkpoint), tmp_path / "out")
        assert made == ["decoder.0", "decoder.2"]
        assert list(tmp_path.iterdir()) == []


def test_a_router_starts_uniform_or_not() -> None:
    from llava_moe.moe import ROUTERS

    build = ROUTERS.get("top_k").build
    assert upcycling_layer.starts_uniform(build(8, 4, {"init_std": 0.0}))
    assert not upcycling_layer.starts_uniform(build(8, 4, {}))
    assert Contract.EXACT_UNIFORM_ROUTER.value == "exact_uniform_router"


_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from llava_moe.config import PartSection, UpcycleSection
from llava_moe.model import calibrating, growing, measuring, upcycling

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
# what is loaded once, whatever the checkpoint: kernels, tokenizer, image code
measuring.load_tools(Path(sys.argv[1]), pictures=True)
warm = Path(sys.argv[2]).with_name("warm")
upcycling.upcycle(UpcycleSection(parent=sys.argv[3], decoder=PartSection()), warm, whole_bytes=0)
before = peak()
facts = upcycling.upcycle(
    UpcycleSection(parent=sys.argv[1], decoder=PartSection(num_experts=8)), Path(sys.argv[2]), whole_bytes=0
)
assert facts["exact"] is True
print("growth", peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_layer(dense_checkpoint: Path, tmp_path: Path) -> None:
    """A 300 MB checkpoint in several shards: the peak grows by one shard or MoE layer, and a little."""
    from transformers import LlamaConfig

    from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
    from tests.tiny_model import tiny_config, tiny_text_config

    text = LlamaConfig(
        **{**tiny_text_config().to_dict(), "hidden_size": 512, "intermediate_size": 2560, "num_hidden_layers": 19}
    )
    model = LlavaMoeForConditionalGeneration(tiny_config(text_config=text))
    parent = tmp_path / "dense"
    model.save_pretrained(parent, save_original_format=True, max_shard_size="70MB")
    processor(parent)
    del model
    reader = CheckpointReader(parent)
    assert reader.nbytes > 290e6
    assert len(reader.file_sizes) >= 4
    layer = 4 * 8 * 3 * 512 * 2560
    assert layer > max(reader.file_sizes)
    found = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(parent), str(tmp_path / "out"), str(dense_checkpoint)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    growth = int(re.search(r"growth (\d+)", found.stdout)[1])
    # 32 MB for activations of the measured text, freed blocks that the allocator keeps, and headers
    assert growth <= 1.3 * max(layer, *reader.file_sizes) + 48e6, (
        f"{growth / 1e6:.0f} MB for a layer of {layer / 1e6:.0f}"
    )
