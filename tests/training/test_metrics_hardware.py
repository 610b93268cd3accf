"""Peaks of devices, and the operations of a step against those that PyTorch counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_moe.model.assemble import load_model
from llava_moe.moe import KERNELS
from llava_moe.moe.experts import StackedExperts
from llava_moe.training.hardware import peak_flops, peak_memory_gib, product_dtype, training_work
from llava_moe.training.metrics import read_metrics
from llava_moe.training.throughput import Counts, count
from tests.tiny import write_llava_json
from tests.training.runs import ALL_PARTS, MOE_PARTS, make_config, make_trainer


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks(name: str, rate: float) -> None:
    assert peak_flops(name, torch.bfloat16) == pytest.approx(rate * 1e12)
    assert peak_flops(name, torch.float16) == pytest.approx(rate * 1e12)
    assert peak_flops(name, torch.float32) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H20",
        "NVIDIA H100",
        "NVIDIA Something New",
        "",
    ],
)
def test_other_devices_have_no_number(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


def test_a_device_without_bfloat16_has_a_peak_for_float16_only() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", torch.float16) == pytest.approx(125e12)
    assert peak_flops("Tesla V100-SXM2-16GB", torch.bfloat16) is None


def test_the_precision_of_products() -> None:
    class Args:
        bf16 = False
        fp16 = False

    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    assert product_dtype(Args(), layer) == torch.bfloat16
    assert product_dtype(Args(), layer.float()) == torch.float32
    Args.fp16 = True
    assert product_dtype(Args(), layer) == torch.float16


def test_memory_of_this_process() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    ballast = torch.ones(int((before - used + 0.25) * 2**30) // 4)  # as much as goes to the peak, and a quarter GiB
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(before + 0.25, abs=0.1)
    del ballast


def counted_by_torch(model: Any, batch: dict[str, Any]) -> float:
    """Forward and backward of a step, all that is multiplied."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(**batch, loss_only=True, use_cache=False).loss.backward()
    return float(counter.get_total_flops())


PARTS: dict[str, tuple[str, ...]] = {
    "everything": ("model.", "lm_head"),
    "all but the tower": ("multi_modal_projector", "language_model", "lm_head"),
    "projector": ("multi_modal_projector",),
    "decoder": ("language_model",),
    "upper half": ("language_model.layers.2", "language_model.layers.3"),
    "head": ("lm_head",),
}


@pytest.mark.parametrize("learns", list(PARTS))
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_operations_are_those_that_torch_counts(
    moe: bool, learns: str, dense_checkpoint: Path, moe_checkpoint: Path, tmp_path: Path
) -> None:
    """To within what the first layer that learns spares, and the rotation of positions, which PyTorch counts."""
    config = make_config(
        tmp_path, moe_checkpoint if moe else dense_checkpoint, write_llava_json(tmp_path / "data", 2), train={}
    )
    made = make_trainer(config)
    model = load_model(Path(str(config.model.checkpoint)), attn_implementation="eager").train()
    for module in model.modules():
        if isinstance(module, StackedExperts):
            module.kernel = KERNELS.get("loop")  # its products are those that the counter knows
    batch = made.data_collator([made.train_dataset[0], made.train_dataset[1]])
    batch.pop("sample_ids", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fragment in name for fragment in PARTS[learns]))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    work = training_work(model.config, names)
    found = Counts(*count(batch, model.config.image_token_id).tolist())
    # padding is multiplied too, and attention is taken over the whole square
    rows, width = batch["input_ids"].shape
    places = Counts(tokens=rows * width, pairs=rows * width**2, labels=found.labels, pictures=found.pictures)
    assert work.total(places) == pytest.approx(counted_by_torch(model, batch), rel=0.12)


def test_shares_of_training(dense_checkpoint: Path) -> None:
    """By the convention: forward alone, with the gradient of the input, with that of the matrix."""
    model = load_model(dense_checkpoint)
    names = [name for name, _ in model.named_parameters()]
    whole = training_work(model.config, names)
    nothing = training_work(model.config, [])
    projector = training_work(model.config, [name for name in names if "multi_modal_projector" in name])
    adapters = training_work(model.config, ["model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"])
    for part in ("token", "pair", "label", "picture", "feature"):
        assert getattr(whole, part) == pytest.approx(3 * getattr(nothing, part)), part
    assert projector.picture == nothing.picture
    assert projector.feature == pytest.approx(3 * nothing.feature)
    assert projector.token == adapters.token == pytest.approx(2 * nothing.token)
    assert projector.pair == adapters.pair == pytest.approx(3 * nothing.pair)


def test_experts_that_a_token_does_not_meet_are_not_counted(moe_checkpoint: Path) -> None:
    model = load_model(moe_checkpoint)
    names = [name for name, _ in model.named_parameters()]
    whole, nothing = training_work(model.config, names), training_work(model.config, [])
    experts = training_work(model.config, [name for name in names if ".experts." in name])
    matrices = sum(
        parameter.numel() * (0.5 if ".experts." in name else 1)  # 2 of 4
        for name, parameter in model.model.language_model.named_parameters()
        if parameter.ndim >= 2 and "embed_tokens" not in name
    )
    active = sum(p.numel() / 2 for name, p in model.named_parameters() if ".experts." in name)
    assert nothing.token == pytest.approx(2 * matrices)
    assert whole.token == pytest.approx(6 * matrices)
    assert experts.token == pytest.approx(4 * matrices + 2 * active)


def test_counting_is_not_disturbed_by_zero3(moe_checkpoint: Path) -> None:
    """With DeepSpeed's section of ZeRO-3 in force transformers would partition the hollow copy too."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    from llava_moe.planning import shapes

    model = load_model(moe_checkpoint)
    names = [name for name, _ in model.named_parameters()]
    expected = training_work(model.config, names)
    shapes._model_on_meta.cache_clear()
    held = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    try:
        assert training_work(model.config, names) == expected
    finally:
        del held
    assert not is_deepspeed_zero3_enabled()


def test_a_known_peak_gives_a_utilisation(moe_checkpoint: Path, tmp_path: Path) -> None:
    data = write_llava_json(tmp_path / "data", 4)
    made = make_trainer(make_config(tmp_path, moe_checkpoint, data, stage={"learning_rates": MOE_PARTS}))
    learning = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
    made.metrics._work, made.metrics._peak = training_work(made.model.config, learning), 5e9
    taken: list[Counts] = []
    drain = made.counts.drain
    made.counts.drain = lambda: (taken.append(drain()), taken[-1])[1]  # type: ignore[method-assign, func-returns-value]
    made.train()
    rows = read_metrics(tmp_path / "out")
    taken = [counts for counts in taken if counts.tokens]  # a checkpoint at the end has nothing new
    assert len(rows) == len(taken) == 2
    for row, counts in zip(rows, taken, strict=True):
        done = made.metrics._work.total(counts)
        assert row["tflops"] == pytest.approx(done / row["seconds_per_step"] / 1e12, rel=3e-3)
        assert row["mfu"] == pytest.approx(row["tflops"] * 1e12 / 5e9, rel=3e-3)


def test_a_gpu_that_is_not_known_has_a_rate_and_no_utilisation(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Something New")
    data = write_llava_json(tmp_path / "data", 4)
    made = make_trainer(make_config(tmp_path, dense_checkpoint, data, stage={"learning_rates": ALL_PARTS}))
    made.metrics.measure_work()
    made.train()
    rows = read_metrics(tmp_path / "out")
    assert all(row["tflops"] > 0 and row["mfu"] is None for row in rows)
