"""Every shipped recipe parses, is accepted by TrainingArguments, and names only what exists."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llava_moe.config import load_recipe
from llava_moe.data.image import IMAGE_MODES
from llava_moe.data.templates import TEMPLATES
from llava_moe.model.projector import PROJECTORS
from llava_moe.moe import BALANCE_LOSSES, ROUTERS, UPCYCLERS
from llava_moe.training.arguments import training_arguments
from llava_moe.training.dry_run import describe
from llava_moe.training.stage import _PARTS

REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "scripts/recipes").rglob("*.yaml"))


def test_found_them_all() -> None:
    assert len(RECIPES) >= 16


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(REPO / "scripts/recipes")))
def test_recipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    config = load_recipe(path)
    training_arguments(dataclasses.replace(config, deepspeed=None, train={**config.train, "bf16": False}))
    assert config.deepspeed is None or Path(config.deepspeed).is_file()
    assert set(config.stage.learning_rates) <= set(_PARTS)
    assert all(name in BALANCE_LOSSES for name in config.balance.losses)
    assert config.model.projector in PROJECTORS
    assert config.data.template is None or config.data.template in TEMPLATES
    assert config.data.image_mode is None or config.data.image_mode in IMAGE_MODES
    if config.upcycle is not None:
        assert config.model.checkpoint == f"{config.output_dir}/upcycled"
        assert config.upcycle.parts()
        for part in config.upcycle.parts().values():
            assert part.upcycler.name in UPCYCLERS
            ROUTERS.get(part.router.name).build(8, part.num_experts, part.router.args)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(REPO / "scripts/recipes")))
def test_dry_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("QUICKSTART_DIR", str(tmp_path / "nothing"))  # no parts, no weights, no data
    text = describe(str(path), load_recipe(path, ["train.bf16=false"]))
    assert "(dry run)" in text
    assert "parameters: unknown here" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(REPO / "scripts/recipes")))
def test_header_says_purpose_command_and_hardware(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for key in ("Purpose:", "Command:", "Hardware:"):
        assert any(key in line for line in header), f"{path}: the header lacks {key}"


@pytest.mark.parametrize("folder", sorted({p.parent for p in RECIPES}), ids=lambda p: p.name)
def test_every_moe_recipe_has_its_dense_control(folder: Path) -> None:
    moe, control = load_recipe(folder / "moe.yaml"), load_recipe(folder / "control.yaml")
    assert moe.upcycle is not None
    assert control.model.checkpoint == moe.upcycle.parent
    for key in ("seed", "data", "train", "deepspeed"):
        assert getattr(moe, key) == getattr(control, key), key
    for part, rate in control.stage.learning_rates.items():
        assert moe.stage.learning_rates[part] == rate
