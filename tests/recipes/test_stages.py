"""Every kind of stage is shipped as a recipe, and a stage that does not fit its start point is refused by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.data.visuals import is_tiled
from llava_moe.planning import Library
from llava_moe.training.dry_run import describe

REPO = Path(__file__).parents[2]
FOLDER = REPO / "scripts/recipes"
WHOLE = {"vision_tower", "projector", "decoder", "embeddings"}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.delenv("NPROC", raising=False)


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_recipe(FOLDER / f"{name}.yaml", overrides)


def maker_of(name: str) -> str:
    """The recipe whose end a recipe starts from."""
    config = recipe(name)
    start = config.model.checkpoint if config.upcycle is None else config.upcycle.parent
    found = Library(FOLDER / f"{name}.yaml").maker_of(str(start))
    assert found is not None
    return str(found[0].relative_to(FOLDER).with_suffix(""))


def dry_run(name: str, *overrides: str) -> str:
    return describe(str(FOLDER / f"{name}.yaml"), recipe(name, *overrides))


@pytest.mark.parametrize("family", ["cumo_mistral_7b", "libmoe_siglip_phi3_5"])
def test_prefinetuning_trains_everything_before_there_are_experts(family: str) -> None:
    config = recipe(f"{family}/prefinetune")
    assert set(config.stage.learning_rates) == WHOLE
    assert config.upcycle is None
    assert maker_of(f"{family}/prefinetune") == f"{family}/pretrain"
    made = f"{config.output_dir}/model"
    sections = [recipe(f"{family}/{path.stem}").upcycle for path in (FOLDER / family).glob("*.yaml")]
    assert {section.parent for section in sections if section is not None} == {made}
    text = dry_run(f"{family}/prefinetune")
    for part in WHOLE:  # each with as many trainable values as it has, but for what the tower's features do not need
        assert f"#   {part}: " in text


def test_moe_stages_with_the_new_parts_alone_and_with_everything() -> None:
    for name in ("phi2", "qwen", "stablelm"):
        assert set(recipe(f"moe_llava_{name}/moe").stage.learning_rates) == {"projector", "experts", "router"}
    # the experts are in tower and projector: no dense projector is left
    everything = (WHOLE - {"projector"}) | {"experts", "router"}
    assert set(recipe("cumo_mistral_7b/moe").stage.learning_rates) == everything


def test_lora_stages() -> None:
    """Dense, quantised, and on the experts beside its control."""
    for name in ("llava_1_5_7b/sft_lora", "llava_1_5_7b/sft_qlora", "siglip2_qwen3_0_6b/moe_lora"):
        config = recipe(name)
        assert config.lora is not None
        assert "lora" in config.stage.learning_rates
        assert (config.upcycle is not None) == name.endswith("moe_lora")


def test_the_way_to_videos() -> None:
    config = recipe("llava_onevision_qwen2_7b/onevision")
    assert is_tiled(str(config.data.image_mode))
    assert config.data.num_frames == 32
    assert maker_of("llava_onevision_qwen2_7b/onevision") == "llava_onevision_qwen2_7b/single_image"
    assert maker_of("llava_onevision_qwen2_7b/single_image") == "llava_onevision_qwen2_7b/pretrain"
    assert maker_of("llava_next_qwen2_7b/sft") == "llava_next_qwen2_7b/pretrain"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "cumo_mistral_7b/prefinetune",
            ["stage.learning_rates.experts=1e-6"],
            "stage prefinetune trains experts, which this checkpoint does not have",
        ),
        (
            "cumo_mistral_7b/prefinetune",
            ["balance.losses.gshard=0.1"],
            "balance.losses names gshard, but no layer of the checkpoint routes",
        ),
        (
            "cumo_mistral_7b/moe",
            ["stage.learning_rates.projector=1e-6"],
            "stage moe trains projector, which this checkpoint does not have",
        ),
        (
            "cumo_mistral_7b/prefinetune",
            ["model.projector=linear", "model.image_size=336"],
            "model.image_size, model.projector: of a model to assemble, but model.checkpoint=",
        ),
        (
            "llava_1_5_7b/sft",
            ["data.image_mode=anyres_max_9"],
            "data.image_mode=anyres_max_9: .* takes an image whole",
        ),
        (
            "llava_onevision_qwen2_7b/onevision",
            ["model.checkpoint=runs/llava_1_5_7b/sft/model"],
            "data.image_mode=anyres_max_9: .* takes an image whole",
        ),
    ],
    ids=["experts", "losses", "no dense projector", "parts", "tiles", "a start without tiles"],
)
def test_a_stage_that_does_not_fit_is_refused_by_key(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        dry_run(name, *overrides)
