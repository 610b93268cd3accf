"""The merge of adapters: the answers of the model with adapters, peft's numbers, every kind of decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_moe.config import RecipeError, RunConfig
from llava_moe.merge import merge
from llava_moe.model.assemble import load_model
from llava_moe.model.lora_merge import ADAPTERS, adapter_scale, merge_weight
from llava_moe.model.lora_targets import lora_targets
from llava_moe.training import lora
from llava_moe.training.stage import apply_stage
from tests.model.native_cases import write_native
from tests.tiny_model import tiny_model, tiny_moe, tiny_processor, tiny_text_config, write_tiny_checkpoint
from tests.training.lora_cases import MOE_RATES, adapted, logits_of, lora_config
from tests.training.test_saving import names_on_disk

SHARED = tiny_moe(shared={"num": 1})
DATA = (Path("data.json"), Path("images"))  # never read


def merged_again(model: Any, config: RunConfig, folder: Path) -> Any:
    """The whole model that the files of a model with adapters make."""
    apply_stage(model, config.stage)
    model.save_pretrained(folder)
    lora.write_adapter(folder, model)
    return load_model(merge(folder))


@pytest.mark.parametrize(
    ("lora_values", "dtype"), [({}, torch.float32), ({"rslora": True}, torch.float32), ({}, torch.bfloat16)]
)
def test_merged_answers_are_those_of_the_adapters(
    lora_values: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """float32: logits to 1e-5. bfloat16: each weight is rounded once, by at most 2**-8 of itself."""
    base = write_tiny_checkpoint(tmp_path / "base", SHARED)
    config = lora_config(tmp_path, base, DATA, lora=lora_values)
    model = adapted(base, config, dtype, std=0.05)
    apply_stage(model, config.stage)
    model.save_pretrained(tmp_path / "adapter")
    lora.write_adapter(tmp_path / "adapter", model)
    merged = load_model(merge(tmp_path / "adapter"), dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=0, atol=1e-5)
        assert (logits_of(merged) - logits_of(load_model(base))).abs().max() > 0.1
        return
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    files = load_file(tmp_path / "adapter" / ADAPTERS)
    places, scale = model.adapters.places, adapter_scale(4, 8, False)
    start_model = load_model(base, dtype)
    for name, place in places.items():
        first, second = (files[f"base_model.model.{place}.lora_{half}.weight"] for half in "AB")
        start = start_model.get_parameter(name).detach()
        exact = merge_weight(start.float(), first, second, scale)
        error = (merged.get_parameter(name).detach().float() - exact).abs()
        assert bool((error <= 2**-8 * exact.abs()).all()), name
        assert error.max() > 0


def test_the_merge_is_that_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    base = write_tiny_checkpoint(tmp_path / "base", SHARED)
    config = lora_config(tmp_path, base, DATA, stage={"learning_rates": {"lora": 1e-3}})
    model = adapted(base, config)
    apply_stage(model, config.stage)
    model.save_pretrained(tmp_path / "adapter")
    lora.write_adapter(tmp_path / "adapter", model)
    stock = PeftModel.from_pretrained(load_model(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(stock.base_model.model), logits_of(model), rtol=0, atol=1e-6)
    theirs = stock.merge_and_unload().state_dict()
    ours = load_model(merge(tmp_path / "adapter")).state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_decoders_that_are_moe_already_take_adapters(name: str, tmp_path: Path) -> None:
    base = write_native(tmp_path / "base", name)
    config = lora_config(tmp_path, base, DATA, lora={"targets": []}, stage={"learning_rates": MOE_RATES})
    model = adapted(base, config, std=0.05)
    kinds = {target.kind for target in lora_targets(load_model(base))}
    assert kinds == ({"attention", "experts"} if name == "mixtral" else {"attention", "mlp", "experts"})
    assert not any(".gate." in path or path.endswith("_gate") for path in model.adapters.places.values())
    wanted = logits_of(model)
    assert (wanted - logits_of(load_model(base))).abs().max() > 1e-2
    merged = merged_again(model, config, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(merged), wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    assert names_on_disk(tmp_path / "adapter-merged") == names_on_disk(base)
    for deepspeed, compiles, named in (
        ("scripts/deepspeed/zero3.json", False, "ZeRO-3"),
        (None, True, "speed.compile"),
    ):
        config.deepspeed, config.speed.compile_layers = deepspeed, compiles
        with pytest.raises(RecipeError, match=f"under {named}.* of a decoder that is MoE by itself take no adapters"):
            lora.chosen_targets(load_model(base), config)


def test_tied_embeddings_that_learn_whole_come_back(tmp_path: Path) -> None:
    text = tiny_text_config("qwen2")
    text.tie_word_embeddings = True
    start, processor = tiny_model(text_config=text, tie_word_embeddings=True), tiny_processor()
    start.save_pretrained(tmp_path / "base", save_original_format=True)
    processor.save_pretrained(tmp_path / "base")
    rates = {"lora": 1e-3, "embeddings": 1e-3}
    config = lora_config(tmp_path, tmp_path / "base", DATA, stage={"learning_rates": rates})
    model = adapted(tmp_path / "base", config, std=0.05)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    wanted = logits_of(model)
    merged = merged_again(model, config, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(merged), wanted, rtol=0, atol=1e-5)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
