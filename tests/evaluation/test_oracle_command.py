"""`llava-moe eval --tasks core --mirror DIR`, whole, with oracles in the place of two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from llava_moe.cli import main
from llava_moe.evaluation import lmms, mirror, prepared
from llava_moe.evaluation.suites import BENCHMARKS, SUITES
from tests.evaluation.fakes import write_checkpoint
from tests.evaluation.imitations import imitations, write_all
from tests.evaluation.imitations_files import write
from tests.evaluation.imitations_scores import FULL_MARKS, WITH_MISTAKES
from tests.evaluation.oracle import Oracle, index_of_core

CORE = list(SUITES.get("core").tasks)


class Stand(Oracle):
    """In the place of `LlavaMoe`: the checkpoint's name says whether it makes the planned mistakes."""

    made: ClassVar[list[Stand]] = []

    def __init__(self, pretrained: str, **_: Any) -> None:
        super().__init__(mistaken=Path(pretrained).name == "mistaken")
        Stand.made.append(self)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with two checkpoints."""
    index = index_of_core()
    monkeypatch.setattr(prepared, "index", lambda include_defaults: index)
    monkeypatch.setattr(lmms, "LlavaMoe", Stand)
    monkeypatch.setattr(Stand, "made", [])
    monkeypatch.setenv(mirror.CACHE_VARIABLE, str(tmp_path / "arrow"))
    monkeypatch.chdir(tmp_path)
    for name in ("right", "mistaken"):
        (write_checkpoint(tmp_path / name) / "model.safetensors").write_bytes(name.encode())
    return tmp_path


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_suite_is_scored_from_a_mirror_and_skipped_the_second_time(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(place / "mirror")
    command = ["eval", "right", "mistaken", "--tasks", "core", "--mirror", "mirror", "--out", "out"]
    card = place / "right" / "README.md"
    card.write_text("---\nlibrary_name: llava_moe\n---\n# right\n<!-- scores: begin -->\n<!-- scores: end -->\n")
    main(command)
    written = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])["model-index"][0]["results"]
    values = {one["dataset"]["type"]: one["metrics"][0]["value"] for one in written}
    assert {type(value) for value in values.values()} <= {int, float}  # numpy's could not be read again
    assert values["gqa"] == 1
    for name, expected in (("right", FULL_MARKS), ("mistaken", WITH_MISTAKES)):
        results = load(place / "out" / name / "results.json")
        assert list(results["tasks"]) == CORE
        assert results["failed"] == {}
        for task, metrics in expected.items():
            official = results["tasks"][task]["official"]
            for metric, value in metrics.items():
                assert official[metric] == pytest.approx(value, abs=1e-5), (task, metric)
        read = {tuple(entry) for entry in results["mirror"]}
        assert ("gqa", "lmms-lab-encoder/GQA/testdev_balanced_images/testdev", 4, None) in read
        assert {task for task, *_ in read} == set(CORE)
    shown = {
        (row["checkpoint"], row["task"]): row for row in load(place / "out/scores.json")["scores"] if row["headline"]
    }
    assert shown["right", "mme"]["value"] == 600
    assert shown["mistaken", "mme"]["value"] == 325
    assert shown["mistaken", "pope"]["value"] == pytest.approx(4 / 7)
    for task in CORE:
        assert shown["right", task]["of"] == BENCHMARKS.get(task).scale
    asked = [len(stand.prompts) for stand in Stand.made]
    assert len(asked) == 2
    assert min(asked) > 0
    main(command)
    assert [len(stand.prompts) for stand in Stand.made] == asked
    assert capsys.readouterr().err.count("already scored") == 2


def test_what_the_mirror_lacks_is_said_before_a_model_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "mirror", imitations()["lmms-lab-encoder/MME"])
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "right", "--tasks", "mme,ai2d", "--mirror", "mirror", "--out", "out"])
    assert stopped.value.code not in (0, None)
    said = capsys.readouterr().err
    assert "task 'ai2d', lmms-lab-encoder/ai2d/test: " in said
    assert f"bash scripts/prepare_benchmarks.sh ai2d --mirror {place / 'mirror'}" in said
    assert Stand.made == []
    assert Path.cwd() == place
