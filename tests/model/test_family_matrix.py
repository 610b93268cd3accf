"""{LLaVA, LLaVA-NeXT, LLaVA-OneVision} x {dense, sparse} x everything a model must do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_moe.data.collator import Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.processing import load_processor
from llava_moe.model.families import FAMILIES
from tests.model.inputs import gradients, greedy
from tests.tiny_families import (
    family_model,
    family_processor,
    prompts,
    write_family_checkpoint,
    write_mixed_json,
)
from tests.tiny_model import TINY_MOE

KINDS = {"dense": None, "sparse": TINY_MOE}
Check = Callable[[str, Any, Path], None]
CHECKS: dict[str, Check] = {}
NUM_CASES = 3 * 2 * 7


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@cache
def batch_of(family: str) -> dict[str, Any]:
    """Six samples as training gets them: one image, two images, none; all of different sizes."""
    processor = family_processor(family)
    with TemporaryDirectory() as folder:
        data = ConversationDataset([write_mixed_json(Path(folder))], processor, max_length=512)
        return Collator.of(processor)([data[index] for index in range(len(data))])


def mask_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return batch["input_ids"] == model.config.image_token_id


@check
def construct(family: str, moe: Any, folder: Path) -> None:
    model = family_model(family, moe)
    wanted = FAMILIES.get(family)
    assert type(model) is wanted.model
    assert type(model.model) is wanted.inner
    assert model.config.model_type == f"{family}_moe"
    routers = [name for name, _ in model.named_modules() if name.endswith("mlp.router")]
    assert len(routers) == (0 if moe is None else 2)
    assert hasattr(model.model, "image_newline") == wanted.is_tiled


@check
def forward(family: str, moe: Any, folder: Path) -> None:
    model, batch = family_model(family, moe), batch_of(family)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        found = model(**inputs)
        other = model(**{**inputs, "pixel_values": -batch["pixel_values"]})
    assert found.logits.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)
    assert found.logits.isfinite().all()
    real = batch["attention_mask"].bool()
    without = (mask_of(model, batch).sum(-1) == 0).unsqueeze(-1) & real
    assert not torch.allclose(found.logits[real], other.logits[real])
    torch.testing.assert_close(found.logits[without], other.logits[without])
    assert (found.routings is None) == (moe is None)


@check
def loss(family: str, moe: Any, folder: Path) -> None:
    model, batch = family_model(family, moe), batch_of(family)
    with torch.no_grad():
        whole = model(**batch)
        alone = model(**batch, loss_only=True)
    targets = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(whole.loss, expected)
    torch.testing.assert_close(alone.loss, expected)
    assert alone.logits is None


@check
def checkpointed_backward(family: str, moe: Any, folder: Path) -> None:
    found = []
    for checkpointed in (False, True):
        model, batch = family_model(family, moe), batch_of(family)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model(**batch, use_cache=False).loss.backward()
        found.append(gradients(model))
    plain, again = found
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-6)
    parts = ["vision_tower", "multi_modal_projector", "language_model"]
    parts += ["image_newline"] if FAMILIES.get(family).is_tiled else []
    parts += [".experts."] if moe is not None else []
    for part in parts:
        assert any(part in name and gradient.abs().sum() > 0 for name, gradient in plain.items()), part


@check
def generate(family: str, moe: Any, folder: Path) -> None:
    """Answers to images of different sizes, and none: the same one by one and all together."""
    model, processor = family_model(family, moe), family_processor(family)
    encoded = prompts(processor)
    together = greedy(model, num_tokens=5, **processor.pad_prompts(encoded))
    alone = [greedy(model, num_tokens=5, **processor.pad_prompts([prompt]))[0] for prompt in encoded]
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 3, "answers that are all alike would prove nothing"


@check
def save(family: str, moe: Any, folder: Path) -> None:
    """The names on disk are those of the stock class's files, and each expert's own."""
    path = write_family_checkpoint(folder / "saved", family, moe)
    names = set(safe_open(path / "model.safetensors", framework="pt").keys())
    assert any(name.startswith("language_model.model.layers.1.mlp.gate_proj") for name in names)
    assert ("image_newline" in names) == FAMILIES.get(family).is_tiled
    assert any(".mlp.experts.3.gate_proj.weight" in name for name in names) == (moe is not None)
    processor = load_processor(path)
    assert (processor.image_mode, processor.tiling) == (
        family_processor(family).image_mode,
        family_processor(family).tiling,
    )


@check
def load_bit_equal(family: str, moe: Any, folder: Path) -> None:
    path = write_family_checkpoint(folder / "loaded", family, moe)
    written = family_model(family, moe)
    read = AutoModelForImageTextToText.from_pretrained(path).eval()
    assert type(read) is type(written)
    assert type(AutoConfig.from_pretrained(path)) is type(written.config)
    state = read.state_dict()
    assert state.keys() == written.state_dict().keys()
    for name, tensor in written.state_dict().items():
        assert torch.equal(state[name], tensor), name
    prompt = load_processor(path).pad_prompts(prompts(load_processor(path))[:3])
    with torch.no_grad():
        assert torch.equal(read(**prompt).logits, written(**prompt).logits)


CASES = [(family, kind, name) for family in FAMILIES for kind in KINDS for name in CHECKS]


def test_the_matrix_is_whole() -> None:
    assert len(CASES) == NUM_CASES


@pytest.mark.parametrize(("family", "kind", "name"), CASES)
def test_family(family: str, kind: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    CHECKS[name](family, KINDS[kind], tmp_path_factory.mktemp(f"{family}-{kind}"))
