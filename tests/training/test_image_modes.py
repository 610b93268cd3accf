"""Runs on tiles: from parts or a checkpoint, stage after stage, to answers."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, SiglipVisionModel

from llava_moe.calibration import calibration_batches
from llava_moe.config import CalibrationSection, NamedSection, PartSection, RecipeError, RunConfig, UpcycleSection
from llava_moe.data.processing import load_processor
from llava_moe.data.schema import DataError, Turn
from llava_moe.model.assemble import load_model
from llava_moe.model.upcycling import upcycle
from llava_moe.serve.engine import Engine, user_turn
from llava_moe.training import runner
from llava_moe.training.images import family_name
from llava_moe.training.start import start_point
from tests.model.inputs import greedy
from tests.tiny import tiny_siglip_processor, tiny_tokenizer
from tests.tiny_families import images, prompts, write_family_checkpoint, write_mixed_json
from tests.tiny_model import TINY_MOE, tiny_text_config, tiny_vision_config
from tests.training.runs import ALL_PARTS, MOE_PARTS, losses, make_config, make_trainer

TILED = ("llava_next", "llava_onevision")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `model` section of a recipe that assembles a tiny model."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    SiglipVisionModel(tiny_vision_config("siglip")).save_pretrained(folder / "tower")
    tiny_siglip_processor().image_processor.save_pretrained(folder / "tower")
    AutoModelForCausalLM.from_config(tiny_text_config("qwen2")).save_pretrained(folder / "decoder")
    tiny_tokenizer().save_pretrained(folder / "decoder")
    return {
        "checkpoint": None,
        "vision_tower": str(folder / "tower"),
        "language_model": str(folder / "decoder"),
        "vision_feature_select_strategy": "full",
    }


def recipe(folder: Path, checkpoint: Path, data: tuple[Path, Path], /, **sections: Any) -> RunConfig:
    sections["data"] = {"max_length": 256, "template": "chatml", **sections.get("data", {})}
    return make_config(folder, checkpoint, data, **sections)


@pytest.mark.parametrize(
    ("family", "moe"), [("llava_next", None), ("llava_onevision", TINY_MOE)], ids=["next-dense", "onevision-sparse"]
)
def test_a_run_with_one_two_and_no_images(family: str, moe: Any, tmp_path: Path) -> None:
    checkpoint = write_family_checkpoint(tmp_path / "start", family, moe)
    stage = {"learning_rates": ALL_PARTS if moe is None else MOE_PARTS}
    balance = {} if moe is None else {"losses": {"switch": 0.1}}
    train = {"per_device_train_batch_size": 3, "max_steps": 3, "gradient_accumulation_steps": 2}
    config = recipe(
        tmp_path, checkpoint, write_mixed_json(tmp_path / "data"), stage=stage, balance=balance, train=train
    )
    final = runner.train(config)
    found = losses(config.output_dir)
    assert found[3] < 0.9 * found[1]
    before, after = load_model(checkpoint), load_model(final)
    assert type(after) is type(before)
    assert after.config.image_grid_pinpoints == before.config.image_grid_pinpoints
    assert not torch.equal(after.model.image_newline, before.model.image_newline)
    processor = load_processor(final)
    encoded = prompts(processor)
    together = greedy(after, num_tokens=4, **processor.pad_prompts(encoded))
    assert together == [greedy(after, num_tokens=4, **processor.pad_prompts([one]))[0] for one in encoded]


def test_tiles_are_packed_too(tmp_path: Path) -> None:
    """Several samples in a row, each with its own tiles: the same loss as one sample in each row."""
    checkpoint = write_family_checkpoint(tmp_path / "start", "llava_next", TINY_MOE)
    data = write_mixed_json(tmp_path / "data")
    made = make_trainer(recipe(tmp_path, checkpoint, data, data={"packing": True}))
    plain = make_trainer(recipe(tmp_path / "plain", checkpoint, data))
    packs, samples = made.train_dataset, plain.train_dataset
    assert len(packs) < len(samples)
    with torch.no_grad():
        packed = made.model.eval()(**made.data_collator([packs[index] for index in range(len(packs))])).loss
        expected = plain.model.eval()(**plain.data_collator([samples[index] for index in range(len(samples))])).loss
    torch.testing.assert_close(packed, expected)


def test_a_step_is_that_of_its_samples_one_by_one(tmp_path: Path) -> None:
    """The loss of a batch of three is the sum over its samples, divided by the answer tokens of all."""
    checkpoint = write_family_checkpoint(tmp_path / "start", "llava_next")
    config = recipe(tmp_path, checkpoint, write_mixed_json(tmp_path / "data"))
    made = make_trainer(config)
    samples = [made.train_dataset[index] for index in range(3)]
    model = made.model.eval()
    with torch.no_grad():
        together = model(**made.data_collator(samples)).loss
        alone = [model(**made.data_collator([sample]), num_items_in_batch=1).loss for sample in samples[:2]]
        text = {key: samples[2][key].unsqueeze(0) for key in ("input_ids", "labels")}
        alone.append(model(**text, attention_mask=torch.ones_like(text["input_ids"]), num_items_in_batch=1).loss)
    count = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    torch.testing.assert_close(together, sum(alone) / count)


CASES = [
    (None, "square", None, "llava"),
    (None, "anyres", None, "llava_next"),
    (None, "anyres_max_4", {"grids": "(1x1),...,(2x2)"}, "llava_onevision"),
    ("llava_next", "anyres_max_4", {"grids": [[16, 32], [32, 16]]}, "llava_next"),
    ("llava_onevision", "pad", None, "llava_onevision"),
    ("llava_next", "anyres", {"merge": "spatial"}, "llava_next"),
    ("llava_onevision", "anyres", {"merge": "flat", "several_images": "anyres"}, "llava_onevision"),
]


@pytest.mark.parametrize(("family", "mode", "tiling", "expected"), CASES)
def test_models_are_assembled_for_their_image_mode(
    family: str | None, mode: str, tiling: Any, expected: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    data = write_mixed_json(tmp_path / "data")
    section = {**parts, "family": family}
    config = recipe(tmp_path, tmp_path, data, model=section, data={"image_mode": mode, "tiling": tiling})
    assert family_name(config) == expected
    path = start_point(config)
    model, processor = load_model(path), load_processor(path)
    assert model.config.model_type == f"{expected}_moe"
    encoded = [processor.encode_prompt([Turn("user", "<image>\n<image>\nWhat?")], images(2)), *prompts(processor)]
    with torch.no_grad():
        assert model(**processor.pad_prompts(encoded)).logits.isfinite().all()


@pytest.mark.slow
def test_stages_with_other_image_modes(parts: dict[str, Any], tmp_path: Path) -> None:
    """Pretrained on whole images, tuned on tiles, then on other grids with a limit."""
    train = {"max_steps": 1}
    data = write_mixed_json(tmp_path / "data")
    section = {**parts, "family": "llava_next"}
    pretrain = recipe(tmp_path / "1", tmp_path, data, model=section, stage={"learning_rates": {"projector": 1e-2}})
    first = runner.train(pretrain)
    started, trained = load_model(tmp_path / "1" / "out" / "initial"), load_model(first)
    changed = {n for n, p in started.named_parameters() if not torch.equal(p, trained.get_parameter(n))}
    assert "model.image_newline" in changed
    assert all("projector" in name or "newline" in name for name in changed)
    assert load_processor(first).image_mode == "square"

    second = runner.train(recipe(tmp_path / "2", first, data, data={"image_mode": "anyres"}, train=train))
    tiling = {"grids": [[16, 48], [48, 16], [32, 32]]}
    changed_mode = {"image_mode": "anyres_max_1", "tiling": tiling}
    third = runner.train(recipe(tmp_path / "3", second, data, data=changed_mode, train=train))
    config, processor = load_model(third).config, load_processor(third)
    assert config.vision_aspect_ratio == processor.image_mode == "anyres_max_1"
    assert config.image_grid_pinpoints == tiling["grids"] == processor.tiling["grids"]
    assert load_model(second).config.image_grid_pinpoints == [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def test_what_does_not_fit_is_refused_before_any_step(parts: dict[str, Any], tmp_path: Path) -> None:
    data = write_mixed_json(tmp_path / "data")
    tiled = write_family_checkpoint(tmp_path / "tiled", "llava_next")
    whole = write_family_checkpoint(tmp_path / "whole", "llava")
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (whole, {"image_mode": "anyres"}, DataError, "needs a model with tiles"),
        (whole, {"tiling": {"grids": "llava-1.6"}}, DataError, "tiling is given"),
        (tiled, {"image_mode": "anyres_0"}, ValueError, "'anyres' or 'anyres_max_N'"),
        (tiled, {"tiling": {"merge": "spatial"}}, RecipeError, "this checkpoint has one"),
        (tiled, {"feature_cache": str(tmp_path / "cache")}, ValueError, "this model is shown tiles"),
    ]
    for number, (checkpoint, section, error, message) in enumerate(cases):
        with pytest.raises(error, match=message):
            runner.train(recipe(tmp_path / str(number), checkpoint, data, data=section))
    config = recipe(tmp_path / "p", tmp_path, data, model=parts, data={"tiling": {"grids": "llava-1.6"}})
    with pytest.raises(RecipeError, match="models of the family llava take an image whole"):
        start_point(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, family="llava_nxt"))
    with pytest.raises(ValueError, match="did you mean 'llava_next'"):
        start_point(config)


@pytest.mark.parametrize("family", TILED)
def test_the_engine_answers_about_tiles(family: str, tmp_path: Path) -> None:
    path = write_family_checkpoint(tmp_path / "model", family, TINY_MOE)
    engine = Engine.load(path, device="cpu")
    turns = [user_turn("What colour is it?", 2)]
    pictures: list[Image.Image] = images(2)
    steps = list(engine.stream(turns, pictures, max_new_tokens=6))
    batch = engine.processor.pad_prompts([engine.processor.encode_prompt(turns, pictures)])
    ids = engine.model.generate(
        **batch, max_new_tokens=6, do_sample=False, eos_token_id=engine.processor.stop_token_ids
    )
    text = engine.processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert steps[-1] == text.strip() != ""


@pytest.mark.parametrize("family", TILED)
@pytest.mark.parametrize("name", ["partition_coactivation", "partition_gradient"])
def test_upcycling_looks_at_samples_with_tiles(family: str, name: str, tmp_path: Path) -> None:
    """Statistics of tower and decoder on samples with one, two and no images."""
    parent = write_family_checkpoint(tmp_path / "dense", family)
    data = write_mixed_json(tmp_path / "data")
    upcycler = NamedSection(name)
    calibration = CalibrationSection(path=str(data[0]), image_folder=str(data[1]), num_samples=6)
    section = UpcycleSection(
        parent=str(parent),
        decoder=PartSection(layers=[1], num_experts=2, upcycler=upcycler),
        vision=PartSection(layers=[0], num_experts=2, upcycler=upcycler),
        calibration=calibration,
    )
    out = tmp_path / "sparse"
    facts = upcycle(section, out, partial(calibration_batches, calibration, parent))
    assert facts["measured_on"] == "calibration"
    assert facts["num_tokens"] > 100
    assert load_model(out).config.model_type == f"{family}_moe"
