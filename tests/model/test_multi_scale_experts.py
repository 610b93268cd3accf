"""Experts in a tower at several scales (CuMo, LibMoE): every tile is routed and recorded, the start is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_moe.config import NamedSection, PartSection, UpcycleSection
from llava_moe.model.assemble import load_model
from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.model.upcycling import upcycle
from llava_moe.model.vision_composite import multi_scale_config
from tests.tiny import tiny_siglip_processor
from tests.tiny_model import tiny_config, tiny_vision_config

GRID, SCALES = 4, (1, 3)  # cells of the tiny tower's grid; tiles of a picture: 1 + 9


def config(**changes: Any) -> LlavaMoeConfig:
    vision = multi_scale_config(tiny_vision_config(), -2, list(SCALES))
    return tiny_config(vision_config=vision, vision_feature_layer=-1, **changes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s2") / "dense"
    torch.manual_seed(0)
    LlavaMoeForConditionalGeneration(config()).save_pretrained(folder, save_original_format=True)
    tiny_siglip_processor(image_size=16 * SCALES[-1], patch_size=8 * SCALES[-1]).save_pretrained(folder)
    return folder


def part(**changes: Any) -> PartSection:
    return PartSection(**{"layers": [0, 1], "num_experts": 4, **changes})


def inputs(model: Any, pictures: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 15).repeat(pictures, 1)
    ids[:, :GRID] = model.config.image_token_id
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(pictures, 3, 48, 48, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("router", ["top_k", "moe_plus_plus"])
def test_all_tiles_are_routed_once_and_learn(dense: Path, tmp_path: Path, router: str) -> None:
    special = {"experts": NamedSection("special")} if router == "moe_plus_plus" else {}
    section = UpcycleSection(parent=str(dense), vision=part(router=NamedSection(router), **special), projector=part())
    made = upcycle(section, tmp_path / "moe")
    model, parent = load_model(tmp_path / "moe"), load_model(dense)
    if router == "top_k":
        assert made["exact"]
        with torch.no_grad():
            found, expected = (m(**inputs(m)).logits for m in (model, parent))
        assert float((found - expected).abs().max()) < 1e-5
    model.train()
    model.gradient_checkpointing_enable()
    batch = inputs(model)
    output = model(
        **batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    )
    tokens = {site: routing.num_tokens for site, routing in output.routings.items()}
    tiles = sum(scale**2 for scale in SCALES)
    assert tokens == {("vision", 0): 2 * tiles * GRID, ("vision", 1): 2 * tiles * GRID, ("projector", 0): 2 * GRID}
    sum([output.loss, *(routing.logits_TE.square().mean() for routing in output.routings.values())]).backward()
    for site, layer in (("vision", 0), ("vision", 1)):
        block = model.model.vision_tower.tower.encoder.layers[layer].mlp
        assert block.site == (site, layer)
        assert all(float(p.grad.abs().sum()) > 0 for p in (block.experts.down_proj, *block.router.scorer.parameters()))


def test_no_experts_where_nothing_reads_them(dense: Path, tmp_path: Path) -> None:
    section = UpcycleSection(parent=str(dense), vision=part(layers="all"))
    with pytest.raises(
        ValueError, match=r"moe\.vision\.layers names \[2\], which lie behind the selected feature layer -2"
    ):
        upcycle(section, tmp_path / "moe")
