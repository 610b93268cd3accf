"""Every shipped recipe parses, dry-runs with numbers, says what a reader must know, and has its dense control."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.data.templates import TEMPLATES
from llava_moe.data.visuals import is_tiled
from llava_moe.model.projectors import PROJECTORS
from llava_moe.moe import BALANCE_LOSSES, CONTROLLERS, EXPERTS, ROUTERS, UPCYCLERS
from llava_moe.planning import Header, Library, read_header
from llava_moe.training.dry_run import describe

REPO = Path(__file__).parents[2]
FOLDER = REPO / "scripts/recipes"
NOWHERE = Path("/nonexistent")
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if p.parent.name != "compare")  # those are matrices
QUICKSTART = {"quickstart", "quickstart_full", "quickstart_smoke"}  # laptop runs: their parts are made by a script
PUBLISHED = [path for path in RECIPES if path.parent.name not in QUICKSTART]
HEADER = ("Purpose", "Paper", "Command", "Data", "Hardware", "Hours", "Scores", "Notes")
FAMILIES = {
    "cumo_mistral_7b": {"pretrain", "prefinetune", "moe", "control"},
    "libmoe_siglip_phi3_5": {"pretrain", "prefinetune", "control", "smoe", "xmoe", "sigma_moe", "shared_e_v2"}
    | {"shared_e_v3", "tc_moe", "moe_plus_plus", "cosine", "perturbed_cosine", "hyper_router", "compete_smoe"},
    "llava_1_5_7b": {"pretrain", "sft", "sft_lora", "sft_qlora"},
    "llava_1_5_13b": {"pretrain", "sft", "sft_lora"},
    **{f"moe_llava_{name}": {"pretrain", "sft", "moe", "control"} for name in ("stablelm", "qwen", "phi2")},
    **{
        f"siglip2_qwen3_{size}": {"pretrain", "sft", "moe", "fine_grained", "control"}
        | ({"moe_lora", "control_lora"} if size == "0_6b" else set())
        for size in ("0_6b", "1_7b", "4b")
    },
    "siglip_vicuna_7b": {"pretrain", "sft", "moe", "control"},
    "fused_towers_vicuna_7b": {"pretrain"},
    "llava_next_qwen2_7b": {"pretrain", "sft"},
    "llava_onevision_qwen2_7b": {"pretrain", "single_image", "onevision"},
}
SCRIPTS = {
    "pretrain": "pretrain",
    "sft": "sft",
    "prefinetune": "sft",
    "single_image": "sft",
    "onevision": "sft",
    "control": "sft",
    "sft_lora": "sft",
    "sft_qlora": "sft",
    "control_lora": "sft",
}


def has_upcycle(path: Path) -> bool:
    """Whether the file, or the one it builds on, has the section; told without reading it as a recipe."""
    text = path.read_text()
    base = re.search(r"^base: *(\S+)", text, re.M)
    return bool(re.search(r"^upcycle:", text, re.M)) or (base is not None and has_upcycle(path.parent / base[1]))


SPARSE = [path for path in RECIPES if has_upcycle(path)]


@cache
def recipe_of(path: Path) -> RunConfig:
    """Read once; nothing here changes it."""
    return load_recipe(path)


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("QUICKSTART_DIR", str(NOWHERE / "quickstart"))  # no parts, no weights, no data


def header_of(path: Path) -> Header:
    return read_header(path)


def test_found_them_all() -> None:
    found: dict[str, set[str]] = {}
    for path in PUBLISHED:
        found.setdefault(path.parent.name, set()).add(path.stem)
    assert {family: found.get(family) for family in FAMILIES} == FAMILIES
    assert len(RECIPES) >= sum(map(len, FAMILIES.values())) + 4 * len(QUICKSTART)
    assert len(list((FOLDER / "configs").glob("*.json"))) >= 15


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_names_only_what_exists(path: Path) -> None:
    config = recipe_of(path)
    assert config.deepspeed is None or Path(config.deepspeed).is_file()
    assert all(loss in BALANCE_LOSSES for loss in config.balance.losses)
    assert all(controller in CONTROLLERS for controller in config.balance.controllers)
    assert config.model.projector in PROJECTORS
    assert config.data.template is None or config.data.template in TEMPLATES
    mode = config.data.image_mode
    assert mode is None or mode in ("square", "pad") or is_tiled(mode)
    if config.upcycle is None:
        return
    assert config.model.checkpoint == f"{config.output_dir}/upcycled"
    assert config.upcycle.parts()
    for part in config.upcycle.parts().values():
        assert part.upcycler.name in UPCYCLERS
        assert part.experts.name in EXPERTS
        assert part.router.name in ROUTERS


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [recipe_of(path).output_dir for path in PUBLISHED]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_dry_run(path: Path) -> None:
    text = describe(str(path), recipe_of(path))
    assert f"# {path} (dry run)" in text
    amount = "about" if recipe_of(path).data.packing else "at most"  # packed rows are full
    assert f"# tokens per step: {amount} " in text
    if path in PUBLISHED:
        counts = re.search(r"^# parameters: ([\d,]+) total, ([\d,]+) active per token, ([\d,]+) trainable", text, re.M)
        assert counts is not None
        total, active, trainable = (int(number.replace(",", "")) for number in counts.groups())
        assert 0 < trainable < total
        assert total >= active > total / 10
        kinds = r"^# memory per device: about [\d.]+ GiB .*weights .*gradients .*optimiser .*activations .*logits"
        assert re.search(kinds, text, re.M)
        assert re.search(r"^# forward: .* FLOPs for a token", text, re.M)
    else:
        assert "parameters: unknown here" in text
    if path in SPARSE:
        assert "# control: scripts/recipes" in text or f"# control: {path.parent}" in text
        assert "DIFFERENT" not in text


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_header(path: Path) -> None:
    fields = header_of(path).fields
    wanted = HEADER if path in PUBLISHED else ("Purpose", "Command", "Hardware")
    absent = [key for key in wanted if not fields.get(key)]
    assert not absent
    assert f"scripts/recipes/{name(path)}" in fields["Command"] or path.parent.name in QUICKSTART
    if path not in PUBLISHED:
        return
    script = SCRIPTS.get(path.stem, "moe")
    assert fields["Command"] == f"bash scripts/train/{script}.sh scripts/recipes/{name(path)}"
    assert header_of(path).devices in (4, 8, 128)
    known = ("published", "measured", "none for this stage")
    assert any(word in fields["Scores"] for word in known)
    assert re.search(r"\d|not published|not measured", fields["Hours"])
    assert not any(len(line) > 125 for line in path.read_text().splitlines())


@pytest.mark.parametrize("path", SPARSE, ids=name)
def test_every_sparse_recipe_has_its_dense_control(path: Path) -> None:
    config, named = recipe_of(path), header_of(path).control
    control_path = path.with_name("control.yaml") if named is None else REPO / named
    assert path not in PUBLISHED or named is not None
    control = recipe_of(control_path)
    assert config.upcycle is not None
    assert control.upcycle is None
    assert control.model.checkpoint == config.upcycle.parent
    assert control.model.dtype == config.model.dtype
    for key in ("seed", "data", "train", "deepspeed"):
        assert getattr(config, key) == getattr(control, key), key
    shared = control.stage.learning_rates.keys() & config.stage.learning_rates.keys()
    assert shared
    assert all(control.stage.learning_rates[part] == config.stage.learning_rates[part] for part in shared)


def test_there_are_sparse_recipes() -> None:
    sparse = [path for path in RECIPES if recipe_of(path).upcycle is not None]
    assert sparse == SPARSE
    assert len(set(sparse) & set(PUBLISHED)) >= 11 + 3 + 1 + 1 + 6


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_every_stage_starts_where_another_ends(path: Path) -> None:
    config, library = recipe_of(path), Library(path)
    start = config.model.checkpoint if config.upcycle is None else str(config.upcycle.parent)
    if start is None:
        assert config.stage.name == "pretrain"
        assert config.model.vision_tower
        return
    maker = library.maker_of(start)
    assert maker is not None
    assert maker[0].parent == path.parent
    if path.stem == "control":
        assert maker[0].stem in ("sft", "prefinetune")


# What the papers' and repositories' scripts say: samples of one step, largest rate, length, and the stage's epochs.
PUBLISHED_NUMBERS: dict[str, tuple[int, float, int]] = {
    "llava_1_5_7b/pretrain": (256, 1e-3, 2048),
    "llava_1_5_7b/sft": (128, 2e-5, 2048),
    "llava_1_5_7b/sft_lora": (128, 2e-4, 2048),
    "llava_1_5_13b/sft_lora": (128, 2e-4, 2048),
    "llava_1_5_13b/pretrain": (256, 1e-3, 2048),
    "llava_1_5_13b/sft": (128, 2e-5, 2048),
    "moe_llava_phi2/pretrain": (256, 1e-3, 2048),
    "moe_llava_phi2/sft": (128, 2e-5, 2048),
    "moe_llava_phi2/moe": (128, 2e-5, 2048),
    "moe_llava_stablelm/moe": (128, 2e-5, 2048),
    "moe_llava_qwen/moe": (128, 2e-5, 2048),
    "cumo_mistral_7b/pretrain": (256, 1e-3, 2048),
    "cumo_mistral_7b/prefinetune": (64, 2e-6, 4096),
    "cumo_mistral_7b/moe": (64, 4e-6, 4096),
    "libmoe_siglip_phi3_5/pretrain": (256, 1e-3, 2048),
    "libmoe_siglip_phi3_5/prefinetune": (24, 2e-6, 2048),
    "libmoe_siglip_phi3_5/smoe": (32, 4e-6, 2048),
    "libmoe_siglip_phi3_5/tc_moe": (32, 4e-6, 2048),
    "llava_onevision_qwen2_7b/single_image": (256, 1e-5, 32768),
    "llava_onevision_qwen2_7b/onevision": (256, 1e-5, 32768),
}
# The rate of the tower, or of the projector beside adapters.
OTHER_RATES = {
    **dict.fromkeys((f"llava_onevision_qwen2_7b/{name}" for name in ("single_image", "onevision")), 2e-6),
    **dict.fromkeys((f"llava_1_5_{size}/sft_lora" for size in ("7b", "13b")), 2e-5),
}


@pytest.mark.parametrize("recipe", list(PUBLISHED_NUMBERS))
def test_published_numbers(recipe: str) -> None:
    path = FOLDER / f"{recipe}.yaml"
    config: RunConfig = recipe_of(path)
    samples, rate, length = PUBLISHED_NUMBERS[recipe]
    train: dict[str, Any] = config.train
    accumulation = train.get("gradient_accumulation_steps", 1)
    assert train["per_device_train_batch_size"] * accumulation * header_of(path).devices == samples
    assert {r for r in config.stage.learning_rates.values() if r != OTHER_RATES.get(recipe)} == {rate}
    assert config.data.max_length == length
    assert (train["num_train_epochs"], train["warmup_steps"], config.stage.weight_decay) == (1, 0.03, 0.0)
    assert "lr_scheduler_type" not in train  # cosine is what training_arguments takes


def test_a_fine_grained_recipe_is_as_active_as_its_control() -> None:
    path = FOLDER / "siglip2_qwen3_1_7b/fine_grained.yaml"
    text = describe(str(path), recipe_of(path))
    row = re.search(r"^#   active +([\d,]+) +([\d,]+)$", text, re.M)
    assert row is not None
    sparse, dense = (int(number.replace(",", "")) for number in row.groups())
    assert dense < sparse < 1.002 * dense  # the routers


def test_devices_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    path = FOLDER / "llava_1_5_7b/sft.yaml"
    config = recipe_of(path)
    assert "# devices: 8" in describe(str(path), config)
    assert "128 samples of up to 2,048 tokens" in describe(str(path), config)
    monkeypatch.setenv("NPROC", "16")
    assert "256 samples of up to 2,048 tokens" in describe(str(path), config)
    monkeypatch.setenv("NPROC", "many")
    with pytest.raises(RecipeError, match="NPROC=many: must be a number of devices"):
        describe(str(path), config)
