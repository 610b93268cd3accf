"""Every kind of tower that a recipe can name, through every step: made from a recipe, counted, run, trained, saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_moe.config import DataSection, ModelSection, RunConfig, StageSection
from llava_moe.data.processing import load_processor
from llava_moe.model.assemble import load_model
from llava_moe.model.vision_load import count_tokens, read_tower
from llava_moe.training.stage import apply_stage, part_of
from llava_moe.training.start import write_initial
from tests.model.inputs import logits_of
from tests.model.test_assemble import write_decoder
from tests.tiny import tiny_image

SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "patch_size": 8}  # fmt: skip
OPEN_CLIP = {"vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8,
                            "mlp_ratio": 2.0}}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A tower in a recipe and what must come out.

    Attributes:
        source: with the folder of the tiny towers as {}.
        layer, strategy, image_size: of the recipe; image_size also of the pictures.
        tokens, channels: of a picture, N and C.
        calls: path of a list of blocks and a child of them: how often each must run for one picture.
        named: whether the recipe must say image_size.
    """

    source: str
    layer: int
    strategy: str
    image_size: int
    tokens: int
    channels: int
    calls: dict[tuple[str, str], list[int]]
    named: bool = False


KINDS = {
    "siglip": Kind("{}/siglip", -2, "full", 16, 4, 24, {("encoder.layers", "mlp"): [1, 1, 0]}),
    "siglip2": Kind("{}/naflex", 1, "full", 24, 9, 24, {("encoder.layers", "mlp"): [1, 0, 0]}, named=True),
    "clip": Kind("{}/clip", -2, "default", 16, 4, 24, {("encoder.layers", "mlp"): [1, 1, 0]}),
    "dinov2": Kind("{}/dinov2", -3, "default", 24, 9, 24, {("encoder.layer", "mlp"): [1, 0, 0]}, named=True),
    "timm ViT": Kind("timm:test_vit@1", -1, "full", 160, 100, 64,
                     {("backbone.blocks", "mlp"): [1, 1, 0, 0, 0, 0]}, named=True),
    "timm ConvNet": Kind("timm:test_convnext@-2", -1, "full", 64, 16, 48,
                         {("backbone.stages", "blocks"): [1, 1, 1, 0]}, named=True),
    "open_clip": Kind("open_clip:{}/open_clip_config.json", -2, "default", 16, 4, 24,
                      {("encoder.layers", "mlp"): [1, 1, 0]}),
    "fused": Kind("fused:{0}/siglip@-2+{0}/dinov2@1", -1, "full", 16, 4, 48,
                  {("towers.0.encoder.layers", "mlp"): [1, 1, 0], ("towers.1.encoder.layer", "mlp"): [1, 0, 0]}),
    "s2": Kind("s2:1,2:{}/clip@-2", -1, "full", 32, 4, 48, {("tower.encoder.layers", "mlp"): [1, 1, 0]}),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A first model from a recipe, on disk and loaded."""

    kind: Kind
    section: ModelSection
    folder: Path
    model: Any
    processor: Any

    def batch(self) -> dict[str, torch.Tensor]:
        """A picture and some words, with labels on the words."""
        ids = [self.model.config.image_token_id] * self.kind.tokens + [5, 6, 7, 8]
        labels = [-100] * self.kind.tokens + [5, 6, 7, 8]
        pixels = torch.randn(1, *self.processor.image_shape, generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "pixel_values": pixels}
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    size = {"height": 16, "width": 16}
    clip = CLIPImageProcessorPil(size=size, crop_size=size)
    for name, tower, processor in (
        ("siglip", SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16)), SiglipImageProcessorPil(size=size)),
        ("naflex", Siglip2VisionModel(Siglip2VisionConfig(**SIZES, num_patches=4)), SiglipImageProcessorPil(size=size)),
        ("clip", CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=16)), clip),
        ("dinov2", Dinov2Model(Dinov2Config(**SIZES, image_size=16)), clip),
    ):
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.2)  # of the default size, layers would hardly differ
        tower.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    write_decoder(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def make(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Makes the model of a kind, once."""
    known: dict[str, Made] = {}

    def made(name: str) -> Made:
        if name not in known:
            kind, folder = KINDS[name], tmp_path_factory.mktemp("initial")
            section = ModelSection(
                vision_tower=kind.source.format(parts),
                language_model=str(parts / "llama"),
                vision_feature_layer=kind.layer,
                vision_feature_select_strategy=kind.strategy,
                image_size=kind.image_size if kind.named else None,
                random_weights=name.startswith(("timm", "open_clip")),
            )
            config = RunConfig(output_dir=str(folder), model=section, data=DataSection(template="plain"))
            write_initial(config, folder / "model")
            loaded = load_model(folder / "model"), load_processor(folder / "model")
            known[name] = Made(kind, section, folder, *loaded)
        return known[name]

    return made


def counts(made: Made) -> None:
    """Tokens and channels: from the config alone, as the processor and the model say, and as they come out."""
    kind, config = made.kind, made.model.config
    assert config.image_seq_length == made.processor.num_image_tokens == kind.tokens
    assert made.processor.image_shape == (3, kind.image_size, kind.image_size)
    foreseen = read_tower(made.section).config
    for key in ("model_type", "image_size", "patch_size", "hidden_size"):
        assert getattr(config.vision_config, key) == getattr(foreseen, key), key
    assert count_tokens(made.model.model.vision_tower, made.section)[0] == kind.tokens
    pixels = made.processor.encode_images([tiny_image(0), tiny_image(1)])
    seen: list[torch.Tensor] = []
    handle = made.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        made.model.model.get_image_features(pixel_values=pixels)
    handle.remove()
    assert seen[0].shape == (2, kind.tokens, kind.channels)
    assert seen[0].isfinite().all()
    assert not torch.equal(seen[0][0], seen[0][1])


def runs_what_it_needs(made: Made) -> None:
    """Each block up to the feature layer runs, and none behind it."""
    tower, found, handles = made.model.model.vision_tower, {}, []

    def count(counter: list[int], index: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            counter[index] += 1

        return add

    for (path, child), expected in made.kind.calls.items():
        counter = found[(path, child)] = [0] * len(expected)
        blocks = list(tower.get_submodule(path))
        assert len(blocks) == len(expected)
        handles += [
            getattr(block, child).register_forward_hook(count(counter, index)) for index, block in enumerate(blocks)
        ]
    logits_of(made.model, **made.batch())
    for handle in handles:
        handle.remove()
    assert found == made.kind.calls


def learns_what_it_uses(made: Made) -> None:
    """Judged by the gradients: a trainable parameter without one would stall DDP, a frozen one with one is a loss."""
    model = load_model(made.folder / "model").train()
    apply_stage(model, StageSection(name="tower", learning_rates={"vision_tower": 1e-3}))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.gradient_checkpointing_enable()
    model(**made.batch()).loss.backward()
    tower = {n: p.grad for n, p in model.named_parameters() if part_of(n).startswith("vision_tower")}
    assert trained == {name for name, gradient in tower.items() if gradient is not None}
    assert len(trained) > 3
    assert all(gradient.isfinite().all() for gradient in tower.values() if gradient is not None)


def can_be_frozen(made: Made) -> None:
    model = load_model(made.folder / "model").train()
    apply_stage(model, StageSection(name="pretrain", learning_rates={"projector": 1e-3}))
    model(**made.batch()).loss.backward()
    reached = {part_of(name) for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"projector"}


def loads_what_it_saved(made: Made) -> None:
    """Bit for bit, by the classes of transformers; and in bfloat16."""
    model, batch, again = made.model, made.batch(), made.folder / "again"
    model.save_pretrained(again, save_original_format=True)
    loaded = load_model(again)
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert torch.equal(logits_of(loaded, **batch), logits_of(model, **batch))
    without = {**batch, "pixel_values": -batch["pixel_values"]}
    assert not torch.equal(logits_of(loaded, **without), logits_of(loaded, **batch))
    half = load_model(again, torch.bfloat16)
    assert {p.dtype for p in half.model.vision_tower.parameters()} == {torch.bfloat16}
    pixels = batch["pixel_values"].bfloat16()
    error = logits_of(half, **{**batch, "pixel_values": pixels}).float() - logits_of(model, **batch)
    assert error.abs().max() < 0.2 * logits_of(model, **batch).abs().max()


STEPS = {step.__name__: step for step in
         (counts, runs_what_it_needs, learns_what_it_uses, can_be_frozen, loads_what_it_saved)}  # fmt: skip
CASES = list(product(KINDS, STEPS))


def test_the_matrix_is_whole() -> None:
    assert len(KINDS) == 9
    assert len(CASES) == 45


@pytest.mark.parametrize(("name", "step"), CASES)
def test_tower(make: Callable[[str], Made], name: str, step: str) -> None:
    STEPS[step](make(name))
