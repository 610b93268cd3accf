"""Adapters in a run: where they sit, what learns, what is refused, and a merge that changes no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_moe.cli import main
from llava_moe.config import RecipeError, RunConfig
from llava_moe.merge import merge
from llava_moe.model.assemble import check_checkpoint, load_model
from llava_moe.model.lora_merge import ADAPTERS, FACTS, TRAINED
from llava_moe.model.lora_targets import Target, linear_pattern, lora_targets
from llava_moe.model.modeling import CheckpointError
from llava_moe.training import lora, runner
from llava_moe.training.metrics import read_metrics
from llava_moe.training.stage import apply_stage, part_of
from tests.tiny import write_llava_json
from tests.tiny_model import tiny_model, tiny_moe, write_tiny_checkpoint
from tests.training.lora_cases import BALANCE, MOE_RATES, RATES, adapted, logits_of, lora_config
from tests.training.runs import losses, make_config, make_trainer
from tests.training.test_saving import names_on_disk

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
SHARED = tiny_moe(shared={"num": 1})


def ends(targets: tuple[Target, ...], kind: str) -> set[str]:
    return {target.path.rsplit(".", 1)[1] for target in targets if target.kind == kind}


def test_the_default_is_every_linear_map_of_the_decoder_and_its_stacked_experts() -> None:
    targets = lora_targets(tiny_model(SHARED))
    assert all(target.name.startswith("model.language_model.layers.") for target in targets)
    assert ends(targets, "attention") == ATTENTION
    assert ends(targets, "mlp") == MLP
    assert {target.layer for target in targets if target.kind == "mlp"} == {1, 3}
    experts = {t.name.split(".mlp.")[1]: t for t in targets if t.layer == 0 and t.kind == "experts"}
    shapes = {name: (t.inputs, t.outputs, t.experts, t.active) for name, t in experts.items()}
    assert shapes == {
        "experts.gate_up_proj": (32, 96, 4, 0.5),
        "experts.down_proj": (48, 32, 4, 0.5),
        "shared.block.gate_up_proj": (32, 96, 1, 1.0),
        "shared.block.down_proj": (48, 32, 1, 1.0),
    }
    assert len(targets) == 4 * 4 + 2 * 3 + 2 * 4


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["attention"], 16),
        (["experts"], 4),
        (["attention", "mlp"], 22),
        (["q_proj", "v_proj"], 8),
        ([r"layers\.[01]\..*"], 4 + 4 + 2 + 3),
        (["down_proj"], 2 + 2),
    ],
)
def test_targets_by_kind_and_by_the_end_of_a_path(names: list[str], count: int) -> None:
    assert len(lora_targets(tiny_model(tiny_moe()), names)) == count


def test_the_pattern_for_peft_is_short_and_exact() -> None:
    model = tiny_model(tiny_moe())
    pattern = linear_pattern(model, lora_targets(model, ["attention"]))
    assert pattern is not None
    assert len(pattern.split("|")) == 4  # one for each name, and none of the tower's
    some = linear_pattern(model, lora_targets(model, [r"layers\.2\.self_attn\.q_proj"]))
    assert some is not None
    assert "layers\\.2\\." in some
    assert linear_pattern(model, lora_targets(model, ["experts"])) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["atention"], "'atention' is none of attention, mlp, experts.*did you mean 'attention'"),
        (["q_prj"], "matches the end of no path.*did you mean 'q_proj'"),
        (["experts"], "this decoder has no experts to adapt; it has attention, mlp"),
        (["("], "is no regular expression"),
    ],
)
def test_a_target_that_is_not_there_is_named(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_targets(tiny_model(), names)


DATA = (Path("data.json"), Path("images"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"stage": {"learning_rates": {**RATES, "decoder": 1e-4}}}, r"learning_rates\.decoder: with a section lora"),
        ({"stage": {"learning_rates": {**RATES, "experts": 1e-4}}}, r"learning_rates\.experts: with a section lora"),
        ({"stage": {"learning_rates": {"projector": 1e-4}}}, "the adapters have no rate; add lora"),
        ({"lora": {"rank": 0}}, r"lora\.rank=0 must be at least 1"),
        ({"lora": {"alpha": 0}}, r"lora\.alpha=0\.0 must be above 0"),
        ({"lora": {"dropout": 1.0}}, r"lora\.dropout=1\.0 must be at least 0 and below 1"),
        ({"lora": {"quantize": "nf8"}}, r"lora\.quantize='nf8': did you mean 'nf4'"),
        ({"lora": {"quantize": "nf4"}, "deepspeed": "scripts/deepspeed/zero3.json"}, "does not go with ZeRO-3"),
        ({"expert_parallel": 2}, "expert_parallel=2 does not go with a section lora"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = lora_config(tmp_path, tmp_path / "nowhere", DATA, **sections)
    with pytest.raises(RecipeError, match=message):
        lora.check_recipe(config)


def test_a_rate_without_the_section_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, DATA, stage={"learning_rates": {"lora": 1e-4}})
    with pytest.raises(RecipeError, match=r"learning_rates\.lora: the recipe has no section lora; add one, e\.g\."):
        lora.check_recipe(config)


@pytest.mark.parametrize(
    ("moe", "sections", "message"),
    [
        (tiny_moe(), {"lora": {"dropout": 0.05}}, r"lora\.dropout=0\.05: adapters of stacked experts"),
        (
            tiny_moe(router={"name": "compete_smoe", "args": {"k": 2}}),
            {},
            "CompeteSMoERouter looks at the outputs of all experts",
        ),
    ],
)
def test_what_experts_cannot_have_is_refused(
    moe: dict[str, Any], sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = lora_config(tmp_path, tmp_path, DATA, **sections)
    with pytest.raises(RecipeError, match=message):
        lora.chosen_targets(tiny_model(moe), config)
    config.lora.targets = ["attention"]  # type: ignore[union-attr]
    assert lora.chosen_targets(tiny_model(moe), config)


def test_only_adapters_and_named_parts_learn(moe_checkpoint: Path, tmp_path: Path) -> None:
    config = lora_config(tmp_path, moe_checkpoint, DATA, stage={"learning_rates": MOE_RATES, "weight_decay": 0.1})
    model = adapted(moe_checkpoint, config)
    groups = apply_stage(model, config.stage)
    learning = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    frozen = {part_of(name) for name, p in model.named_parameters() if not p.requires_grad}
    assert learning == {"lora", "projector", "router"}
    assert not learning & frozen
    assert [group["weight_decay"] for group in groups if group["lr"] == 1e-2].count(0.1) >= 3
    assert type(model) is type(load_model(moe_checkpoint))
    sizes = sum(target.adapter_size(4) for target in lora_targets(load_model(moe_checkpoint)))
    assert sizes == sum(p.numel() for name, p in model.named_parameters() if part_of(name) == "lora")


def test_adapters_start_at_the_base_and_follow_from_the_seed(moe_checkpoint: Path, tmp_path: Path) -> None:
    config = lora_config(tmp_path, moe_checkpoint, DATA)

    def made(seed: int) -> Any:
        model = load_model(moe_checkpoint)
        config.seed = seed
        torch.manual_seed(99)  # whatever was drawn before
        lora.add_adapters(model, config, moe_checkpoint, torch.float32)
        return model

    one, same, other = made(1), made(1), made(2)
    torch.testing.assert_close(logits_of(one), logits_of(load_model(moe_checkpoint)), rtol=0, atol=1e-6)
    name = next(name for name, _ in one.named_parameters() if ".lora_A." in name)
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def run(config: RunConfig) -> tuple[Path, Path]:
    """Trains; the folders of the adapters and of the whole model."""
    final = runner.train(config)
    return final.with_name(lora.ADAPTER), final


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, moe_checkpoint: Path) -> RunConfig:
    """A run with adapters on attention, dense blocks, experts and shared ones, routers and projector whole."""
    folder = tmp_path_factory.mktemp("lora")
    checkpoint = write_tiny_checkpoint(folder / "start", SHARED)
    config = lora_config(
        folder,
        checkpoint,
        write_llava_json(folder / "data", 6, text_only_every=3),
        stage={"learning_rates": MOE_RATES},
        balance=BALANCE,
        train={"max_steps": 4},
    )
    runner.train(config)
    return config


def test_a_run_writes_its_adapters_and_a_whole_model(finished: RunConfig) -> None:
    out, base = Path(finished.output_dir), Path(str(finished.model.checkpoint))
    assert names_on_disk(out / "model") == names_on_disk(base)
    assert losses(out)[4] < losses(out)[1]
    row = read_metrics(out)[-1]
    assert {"switch", "z", "layers"} <= row.keys()
    before, after = (dict(load_model(path).named_parameters()) for path in (base, out / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    targets = {target.name for target in lora_targets(load_model(base))}
    assert moved == targets | {name for name in before if part_of(name) in ("router", "projector")}
    assert {path.name for path in (out / "adapter").iterdir()} >= {"adapter_config.json", ADAPTERS, TRAINED, FACTS}
    assert not list((out / "adapter").glob("model*.safetensors"))
    assert {part_of(name) for name in load_file(out / "adapter" / TRAINED) if "weight" in name} <= {
        "router",
        "projector",
    }
    assert (out / "model" / "README.md").is_file()


def test_merging_by_hand_gives_the_same_bits(finished: RunConfig, tmp_path: Path) -> None:
    out = Path(finished.output_dir)
    made = merge(out / "adapter", to=tmp_path / "merged")
    for file in ("model.safetensors", "config.json", "generation_config.json", "processor_config.json"):
        assert (made / file).read_bytes() == (out / "model" / file).read_bytes(), file
    with pytest.raises(CheckpointError, match="is there already"):
        merge(out / "adapter", to=tmp_path / "merged")


def test_another_base_is_refused(finished: RunConfig, moe_checkpoint: Path, tmp_path: Path) -> None:
    adapter = Path(finished.output_dir) / "adapter"
    with pytest.raises(CheckpointError, match=r"not the checkpoint that the adapter in .* was trained on"):
        merge(adapter, base=moe_checkpoint, to=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    moved = tmp_path / "adapter"
    moved.mkdir()
    for file in adapter.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    facts = json.loads((moved / FACTS).read_text())
    (moved / FACTS).write_text(json.dumps({**facts, "base": "/nowhere"}))
    with pytest.raises(CheckpointError, match=r"/nowhere, which is not there; name the place .* with --base"):
        merge(moved)
    assert merge(moved, base=Path(facts["base"])) == tmp_path / "adapter-merged"
    (moved / TRAINED).unlink()
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is missing, so it is no adapter of this program"):
        merge(moved, to=tmp_path / "other")


def test_an_adapter_directory_is_no_checkpoint(finished: RunConfig, tmp_path: Path) -> None:
    adapter = Path(finished.output_dir) / "adapter"
    with pytest.raises(CheckpointError, match=f"llava-moe merge {adapter}"):
        check_checkpoint(adapter)
    with pytest.raises(CheckpointError, match="llava-moe merge"):
        runner.train(make_config(tmp_path, adapter, write_llava_json(tmp_path / "data", 2)))


@pytest.mark.slow
def test_checkpointing_keeps_the_gradients(moe_checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for name, checkpointing in (("plain", False), ("again", True)):
        config = lora_config(
            tmp_path / name,
            moe_checkpoint,
            write_llava_json(tmp_path / name / "data", 4),
            stage={"learning_rates": MOE_RATES},
            balance=BALANCE,
            train={"max_steps": 3, "gradient_checkpointing": checkpointing},
        )
        runner.train(config)
        found.append([row[key] for row in read_metrics(config.output_dir) for key in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_adapters_of_every_expert_get_a_gradient(moe_checkpoint: Path, tmp_path: Path) -> None:
    config = lora_config(
        tmp_path, moe_checkpoint, write_llava_json(tmp_path / "data", 8), train={"per_device_train_batch_size": 8}
    )
    made = make_trainer(config)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    made.model(**{k: v for k, v in batch.items() if k != "sample_ids"}, loss_only=True).loss.backward()
    for name, parameter in made.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if ".experts." in name and ".lora_A." in name:
            assert bool((parameter.grad.reshape(4, -1).abs().sum(1) > 0).all()), name


@pytest.mark.parametrize(
    "data",
    [{"packing": True}, {"feature_cache": "cache"}, {"group_by_modality": True}],
    ids=["packing", "cache", "groups"],
)
def test_other_parts_of_a_run_work_with_adapters(data: dict[str, Any], dense_checkpoint: Path, tmp_path: Path) -> None:
    if "feature_cache" in data:
        data = {"feature_cache": str(tmp_path / "cache")}
    train = {"max_steps": 2, **({"train_sampling_strategy": "group_by_length"} if "group_by_modality" in data else {})}
    found = write_llava_json(tmp_path / "data", 6, text_only_every=3)
    config = lora_config(tmp_path, dense_checkpoint, found, data=data, train=train, lora={"dropout": 0.1})
    adapter, final = run(config)
    assert len(losses(config.output_dir)) == 2
    assert load_model(final)
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.1


def test_the_command(finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Path(finished.output_dir) / "adapter"
    main(["merge", str(adapter), "--to", str(tmp_path / "made")])
    assert "30 weights with adapters of rank 4, in float32" in capsys.readouterr().out
    assert "LoRA: rank" in (tmp_path / "made" / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(tmp_path / "made"), "--to", str(tmp_path / "again")])
    assert stopped.value.code == 2
    assert "is missing, so it is no adapter of this program" in capsys.readouterr().err
