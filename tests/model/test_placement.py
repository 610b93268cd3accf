"""Experts in the decoder, the projector and the vision tower, alone and together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import NamedSection, PartSection, UpcycleSection
from llava_moe.model.assemble import load_model
from llava_moe.model.sites import num_used_layers
from llava_moe.model.upcycling import upcycle
from llava_moe.moe import MoELayer
from llava_moe.training.stage import part_of
from tests.model.inputs import gradients, greedy, logits_of, picture_batch, prompt_batch
from tests.tiny_model import tiny_model, write_tiny_checkpoint

ONE: dict[str, Any] = {"num_experts": 3, "router": {"name": "top_k", "args": {"k": 2}}}
PLACES: dict[str, dict[str, Any]] = {
    "decoder": {"decoder": {"layers": [1, 3], **ONE}},
    "vision": {"vision": {"layers": [0, 1], **ONE}},
    "projector": {"projector": {"layers": [0], **ONE}},
    "everywhere": {
        "decoder": {"layers": [0, 2], **ONE, "num_experts": [2, 5]},
        "vision": {"layers": [1], **ONE},
        "projector": {"layers": [0], **ONE},
    },
}
SITES = {
    "decoder": [("decoder", 1), ("decoder", 3)],
    "vision": [("vision", 0), ("vision", 1)],
    "projector": [("projector", 0)],
    "everywhere": [("decoder", 0), ("decoder", 2), ("projector", 0), ("vision", 1)],
}
everywhere = pytest.mark.parametrize("place", PLACES)
towers = pytest.mark.parametrize("vision", ["siglip", "clip"])


def test_the_cases_are_what_they_say() -> None:
    assert len(PLACES) == len(SITES) == 4
    assert {part for sites in SITES.values() for part, _ in sites} == {"decoder", "vision", "projector"}


@everywhere
@towers
def test_every_site_routes_its_own_tokens(place: str, vision: str) -> None:
    model = tiny_model(PLACES[place], vision=vision)
    batch = picture_batch(model, batch=2, length=12)
    routings = model(**batch).routings
    assert sorted(routings) == SITES[place]
    patches = 5 if vision == "clip" else 4  # with CLS before the selection
    tokens = {"decoder": 24, "vision": 2 * patches, "projector": 8}
    for (part, _), routing in routings.items():
        assert routing.num_tokens == tokens[part]
    if place == "everywhere":
        assert routings["decoder", 0].num_experts == 2
        assert routings["decoder", 2].num_experts == 5


@everywhere
def test_pictures_are_sequences_of_their_own_outside_the_decoder(place: str) -> None:
    model = tiny_model(PLACES[place])
    model(**picture_batch(model))
    for part, layer in SITES[place]:
        context = model.model.scope.context_of((part, layer))
        expected = [0] * 12 + [1] * 12 if part == "decoder" else [0] * 4 + [1] * 4
        assert context.sequence_T.tolist() == expected
        assert context.site == (part, layer)


@everywhere
def test_experts_and_routers_learn_wherever_they_are(place: str) -> None:
    model = tiny_model(PLACES[place]).train()
    model(**picture_batch(model)).loss.backward()
    found = gradients(model)
    ours = [name for name, _ in model.named_parameters() if ".router." in name or ".experts." in name]
    assert len(ours) == sum(3 if part == "decoder" else 5 for part, _ in SITES[place])  # towers have biases
    for name in ours:
        assert torch.isfinite(found[name]).all(), name
        assert found[name].abs().sum() > 0, name
        assert part_of(name) == ("router" if ".router." in name else "experts")


@everywhere
def test_checkpointing_changes_no_gradient(place: str) -> None:
    plain, recomputed = (tiny_model(PLACES[place]).train() for _ in range(2))
    recomputed.gradient_checkpointing_enable()
    for model in (plain, recomputed):
        model(**picture_batch(model), use_cache=False).loss.backward()
    one, two = gradients(plain), gradients(recomputed)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-7)


@everywhere
@towers
def test_save_load_generate_bit_equal(tmp_path: Path, place: str, vision: str) -> None:
    out = write_tiny_checkpoint(tmp_path / "checkpoint", PLACES[place], vision=vision)
    model = tiny_model(PLACES[place], vision=vision)
    loaded = load_model(out)
    batch, prompts = picture_batch(model), prompt_batch(model)
    again = tmp_path / "again"
    loaded.save_original_format = True
    loaded.save_pretrained(again)
    twice = load_model(again)
    assert torch.equal(logits_of(loaded, **batch), logits_of(twice, **batch))
    assert greedy(loaded, **prompts) == greedy(twice, **prompts)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@everywhere
@towers
def test_upcycled_equals_its_parent(tmp_path: Path, place: str, vision: str) -> None:
    parent = write_tiny_checkpoint(tmp_path / "dense", vision=vision)
    parts = {
        name: PartSection(layers=raw["layers"], num_experts=raw["num_experts"], router=NamedSection("top_k", {"k": 2}))
        for name, raw in PLACES[place].items()
    }
    facts = upcycle(UpcycleSection(parent=str(parent), **parts), tmp_path / "moe")
    assert facts["exact"] is True
    dense, sparse = load_model(parent), load_model(tmp_path / "moe")
    assert sorted(m.site for m in sparse.modules() if isinstance(m, MoELayer)) == SITES[place]
    batch, prompts = picture_batch(dense), prompt_batch(dense)
    torch.testing.assert_close(logits_of(sparse, **batch), logits_of(dense, **batch), rtol=0, atol=1e-5)
    assert greedy(sparse, **prompts) == greedy(dense, **prompts)


@pytest.mark.parametrize(("layer", "used"), [(-1, 3), (-2, 2), (-4, 0), (0, 0), (3, 3), ([-2, 1], 2), ([1, 3], 3)])
def test_layers_before_the_selected_features(layer: Any, used: int) -> None:
    assert num_used_layers(3, layer) == used


@pytest.mark.parametrize(
    ("moe", "vision", "message"),
    [
        ({"vision": {"layers": [2], **ONE}}, "siglip", r"names \[2\], which lie behind the selected feature layer -2"),
        ({"vision": {"layers": [3], **ONE}}, "siglip", r"the vision tower has layers 0\.\.2"),
        ({"vision": {"layers": [0], **ONE}}, "timm", "has no list of layers with a child mlp"),
        ({"projector": {"layers": [1], **ONE}}, "siglip", r"a projector is one block; write \[0\]"),
        ({"decoder": {"layers": [9], **ONE}}, "siglip", r"the decoder has layers 0\.\.3"),
    ],
)
def test_sites_that_do_not_exist(moe: dict[str, Any], vision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(moe, vision=vision)


def test_a_projector_that_is_no_feed_forward_block() -> None:
    with pytest.raises(ValueError, match="Linear matches no known feed-forward pattern"):
        tiny_model(PLACES["projector"], projector="linear")


def test_shared_experts_and_capacity_from_the_config() -> None:
    part = {"layers": [0], **ONE, "shared": {"num": 1, "mix": "mean"}, "capacity": {"factor": 0.5}, "expert_width": 16}
    model = tiny_model({"decoder": part}).train()
    layer = model.model.language_model.layers[0].mlp
    assert layer.experts.spec.intermediate == layer.shared.spec.intermediate == 16
    batch = picture_batch(model)
    dropped = model(**batch).routings["decoder", 0].extras["dropped_T"]
    assert int(dropped.sum()) > 0
    assert "dropped_T" not in model.eval()(**batch).routings["decoder", 0].extras
