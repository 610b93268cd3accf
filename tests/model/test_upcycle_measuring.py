"""The upcycling program: statistics of the parent on real samples, and the comparison of the result with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.calibration import calibration_batches
from llava_moe.config import CalibrationSection, PartSection
from llava_moe.model import calibrating
from llava_moe.model.assemble import load_model
from llava_moe.model.layout import StoredModel
from llava_moe.model.measuring import Agreement, builtin_batches, load_tools, model_inputs
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import open_model
from llava_moe.model.upcycling import PROVENANCE, logit_error, upcycle
from llava_moe.moe import UPCYCLERS
from llava_moe.moe.upcycling import Copy, DenseMlp
from tests.model.upcycle_cases import DECODER, processor, run, section


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

    def test_rounding_that_the_decoder_amplifies_is_no_error(self) -> None:
        """On the quickstart's decoder logits of 46.6 moved by 5.3e-4 with one seed of a router, by 3.9e-4 with another,
        and by 2.7e-4 when the last bits of the parent's own blocks were disturbed."""
        layers = {"decoder.0": 2e-7, "decoder.2": 3.4e-7}
        assert Agreement(5.3e-4, 46.6, 1.0, 200, layers, rounding_error=2.7e-4).within()
        assert not Agreement(5.3e-4, 46.6, 1.0, 200, layers, rounding_error=1e-5).within()
        assert not Agreement(5e-3, 46.6, 1.0, 200, layers, rounding_error=2.7e-4).within()
        broken = {**layers, "decoder.4": 1e-3}  # a block that is wrong is not excused
        assert not Agreement(5.3e-4, 46.6, 1.0, 200, broken, rounding_error=2.7e-4).within()

    def test_the_parents_last_bits_are_disturbed(self, dense_checkpoint: Path, tmp_path: Path) -> None:
        """About as far as arithmetic of another precision is from float32 with the same weights."""
        facts = upcycle(section(dense_checkpoint, layers="all"), tmp_path / "out")
        assert 1e-9 < facts["rounding_error"] < 1e-5 * max(1.0, facts["max_abs_logit"])
        model = load_model(dense_checkpoint).eval()
        (batch,) = builtin_batches(load_tools(dense_checkpoint, pictures=True))
        with torch.no_grad():
            single = model(**model_inputs(batch)).logits
            double = model.double()(
                **{k: v.double() if v.is_floating_point() else v for k, v in model_inputs(batch).items()}
            )
        rounding = float((single - double.logits).abs().max())
        assert rounding / 30 < facts["rounding_error"] < rounding * 30

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
