"""The upcycling program: what is refused, with nothing written."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from llava_moe.config import CalibrationSection, UpcycleSection
from llava_moe.model import upcycling
from llava_moe.model.assemble import load_model
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.upcycling import upcycle
from llava_moe.moe import UPCYCLERS
from llava_moe.moe.upcycling import Copy
from tests.model.upcycle_cases import named, run, section
from tests.tiny_model import tiny_model


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
