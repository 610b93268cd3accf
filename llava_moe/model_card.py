"""The model card of a checkpoint: README.md, generated from what its files and its maker say of it.

Everything in it is read from somewhere: the architecture from config.json, prompt and pictures from
processor_config.json, the numbers of parameters from an empty model, the history from the program that wrote the
checkpoint, the scores from `llava-moe eval`. Nothing is claimed that no file says; a licence is "unknown" until
somebody gives one. What people write into the card by hand stays when the scores are renewed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import CONFIG_MAPPING

from llava_moe.model.configuration import PARTS, MoeSection
from llava_moe.model.layout import empty_model, read_config
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.upcycling import count_parameters

CARD, SCORES = "README.md", "scores.json"
PACKAGES = ("llava-moe", "torch", "transformers")
UNKNOWN_LICENSE = "unknown"
_TASK = "image-text-to-text"
_BEGIN, _END = "<!-- scores: begin -->", "<!-- scores: end -->"
_NOT_SCORED = "Not scored yet. `llava-moe eval` scores a checkpoint and renews this section."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
# What a checkpoint's maker wrote beside it: file, and the rows of the card that it gives.
_PROVENANCE = {
    "upcycle.json": {"parent": "upcycled from", "method": "upcycled by", "max_abs_logit_error": "its logit error"},
    "grow.json": {"parent": "grown from", "contract": "growth promises", "max_abs_logit_error": "its logit error"},
    "import.json": {"source": "imported from", "layout": "its layout"},
    "assemble.json": {"model": "assembled from"},
}


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: what its own files do not say.

    Attributes:
        name: the title of the card.
        made_by: the command, for example `llava-moe train`.
        parents: what it was made from, as the user named it.
        stage: of the recipe.
        recipe: the resolved recipe as YAML.
        data: one line for each source of training data.
        facts: further rows, in the order given.
        parameters: "total" and "active", where they are known already; else they are counted.
    """

    name: str
    made_by: str
    parents: Sequence[str] = ()
    stage: str | None = None
    recipe: str | None = None
    data: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] | None = None


def write_card(folder: Path, origin: Origin, license: str | None = None) -> Path:
    """Writes the card of a whole checkpoint directory, which holds its config.json and processor already.

    Raises:
        CheckpointError: config.json is missing or of no kind that is known.
    """
    raw = _read_json(folder / "config.json")
    if not raw:
        raise CheckpointError(f"{folder}: no config.json, so nothing is known for a model card")
    ours = _is_ours(str(raw.get("model_type")))
    sparse = raw.get("moe") is not None or "moe" in str(_text(raw).get("model_type"))
    sparse |= _text(raw).get("model_type") == "mixtral"
    data = ModelCardData(
        library_name="llava_moe" if ours else "transformers",
        pipeline_tag=_TASK if "vision_config" in raw else "text-generation",
        license=license or UNKNOWN_LICENSE,
        base_model=known_bases(origin.parents) or None,
        tags=["llava_moe", *(["moe"] if sparse else [])],
    )
    sections = [
        f"# {origin.name}",
        _summary(raw, sparse),
        _use(raw, ours),
        "## Model\n\n" + _table(_architecture(folder, raw) + _parameter_rows(folder, origin)),
        _experts(raw),
        "## How it was made\n\n" + _table(_history(origin)),
        _data(origin),
        _recipe(origin),
        f"## Scores\n\n{_BEGIN}\n{_NOT_SCORED}\n{_END}",
        "## Versions\n\n" + _table([(name, found) for name, found in versions().items()]),
    ]
    body = "\n\n".join(section for section in sections if section)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
    _write(folder / CARD, str(card))
    if (folder / SCORES).is_file():
        _show_scores(folder, _read_json(folder / SCORES))
    return folder / CARD


def _is_ours(model_type: str) -> bool:
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type].__module__.startswith("llava_moe.")


def start_facts(parent: str | Path) -> dict[str, str]:
    """Rows for a card on how the checkpoint came to be that this one was made from, if its files say so."""
    rows: dict[str, str] = {}
    for name, labels in _PROVENANCE.items():
        known = _read_json(Path(parent) / name)
        rows |= {f"start point: {label}": _plain(known[key]) for key, label in labels.items() if key in known}
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide what a checkpoint computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree that was never installed
            continue
    return found


def known_bases(parents: Iterable[str]) -> list[str]:
    """The hub ids that the parents are, or that their own cards name; a directory without a card is none."""
    found: list[str] = []
    for parent in parents:
        snapshot = _SNAPSHOT.search(f"{parent}/")
        if snapshot is not None:
            found.append(f"{snapshot[1]}/{snapshot[2]}")
        elif Path(parent).is_dir():
            found += _bases_in(Path(parent) / CARD)
        elif _HUB_ID.fullmatch(parent) is not None:
            found.append(parent)
    return list(dict.fromkeys(found))


def _bases_in(card: Path) -> list[str]:
    if not card.is_file():
        return []
    try:
        named = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
    except (ValueError, yaml.YAMLError):  # somebody else's README
        return []
    return [named] if isinstance(named, str) else [str(name) for name in named or []]


def set_license(folder: Path, license: str) -> None:
    """Puts a licence into the card.

    Raises:
        CheckpointError: the directory has no card of ours.
    """
    card = _load(folder)
    card.data.license = license
    _write(folder / CARD, str(card))


def add_scores(folder: Path, results: Mapping[str, Any]) -> None:
    """Puts what `llava-moe eval` wrote (results.json) into the card, and beside it as scores.json.

    A task that was scored before gets its new numbers; other tasks keep theirs.

    Args:
        folder: the checkpoint that was scored; that it is the same one is the caller's to know.
        results: the content of results.json.

    Raises:
        CheckpointError: the directory has no card of ours, or the scores are those of blank pictures.
    """
    _load(folder)
    arguments = results["arguments"]
    if arguments.get("blank_images"):
        raise CheckpointError(f"{folder}: scores on blank pictures are a baseline, and no scores of the model")
    scores = _read_json(folder / SCORES)
    for task, score in results["tasks"].items():
        about = {"template": results.get("template"), "limit": arguments.get("limit")}
        about["data_sha256"] = results.get("data_sha256", {}).get(task)
        scores[task] = {**score, **about, "versions": results.get("versions")}
    _write(folder / SCORES, json.dumps(scores, indent=2))
    _show_scores(folder, scores)


def _show_scores(folder: Path, scores: Mapping[str, Any]) -> None:
    card = _load(folder)
    head, _, rest = card.text.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    card.text = f"{head}{_BEGIN}\n{_score_table(scores)}\n{_END}{tail}"
    card.data.model_name = card.data.model_name or _title(card.text)
    card.data.eval_results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=value,
            metric_name=metric if score.get("limit") is None else f"{metric}, first {score['limit']} records",
        )
        for task, score in scores.items()
        for metric, value in _metrics(score).items()
    ]
    _write(folder / CARD, str(card))


def _score_table(scores: Mapping[str, Any]) -> str:
    rows = []
    for task, score in scores.items():
        limit = score.get("limit")
        number = f"{score['n']}" if limit is None else f"{score['n']} (the first {limit})"
        bounds = [f"{100 * bound:.1f}" for bound in score.get("interval") or ()]
        interval = f"{' to '.join(bounds)} %" if bounds else ""
        for metric, value in _metrics(score).items():
            own = metric == score.get("metric")
            shown = f"{100 * value:.1f} %" if own else f"{value:.4g}"
            rows.append((task, number, metric, shown, interval if own else ""))
    return _table(rows, ("task", "records", "metric", "score", "95 % interval"))


def _metrics(score: Mapping[str, Any]) -> dict[str, float]:
    """The metric of a local task; all official ones of another."""
    return {score["metric"]: score["score"]} if "score" in score else dict(score["official"])


def _load(folder: Path) -> Any:
    file = folder / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if _BEGIN not in text or _END not in text:
        raise CheckpointError(f"{folder}: no {CARD} that llava_moe wrote; its scores have no place there")
    return ModelCard(text)


def _title(text: str) -> str:
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    return "model" if match is None else match[1]


def _summary(raw: Mapping[str, Any], sparse: bool) -> str:
    kind = "sparse (mixture-of-experts)" if sparse else "dense"
    what = "vision-language model" if "vision_config" in raw else "language model"
    return (
        f"A {kind} {what}. This card was generated from the checkpoint's files; intended use, limits and licence are "
        "for its author to add."
    )


def _use(raw: Mapping[str, Any], ours: bool) -> str:
    register = "import llava_moe  # registers the classes with transformers\n" if ours else ""
    kind = "AutoModelForImageTextToText" if "vision_config" in raw else "AutoModelForCausalLM"
    tools = "AutoProcessor" if "vision_config" in raw else "AutoTokenizer"
    name = tools.removeprefix("Auto").lower()
    served = "" if ours else "\nvLLM and SGLang serve it as it is: `vllm serve DIRECTORY`.\n"
    return (
        f"## Use\n\n```python\n{register}from transformers import {kind}, {tools}\n\n"
        f'model = {kind}.from_pretrained("DIRECTORY")  # where this file lies\n'
        f'{name} = {tools}.from_pretrained("DIRECTORY")\n```\n{served}'
    ).rstrip("\n")


def _text(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    text = raw.get("text_config")
    return text if isinstance(text, Mapping) else raw


def _architecture(folder: Path, raw: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("class", ", ".join(raw.get("architectures") or []) or raw.get("model_type"))]
    vision = raw.get("vision_config")
    if isinstance(vision, Mapping):
        rows.append(("vision tower", _sizes(vision, ("num_hidden_layers", "hidden_size", "image_size", "patch_size"))))
        rows.append(
            ("features", f"layer {raw.get('vision_feature_layer')}, {raw.get('vision_feature_select_strategy')}")
        )
        options = raw.get("projector_args")
        rows.append(("projector", f"{raw.get('projector', 'mlp2x_gelu')}{f' {options}' if options else ''}"))
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    rows.append(("decoder", _sizes(_text(raw), keys)))
    if growth := raw.get("vocabulary_growth"):
        rows.append(
            ("vocabulary", f"{growth['before']} rows grown to {growth['after']}, with {', '.join(growth['tokens'])}")
        )
    processor = _read_json(folder / "processor_config.json")
    for key, label in (("template", "conversation"), ("image_mode", "image mode")):
        if processor.get(key) is not None:
            rows.append((label, processor[key]))
    if raw.get("image_seq_length") is not None:
        rows.append(("tokens of a picture", raw["image_seq_length"]))
    return rows


def _sizes(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    known = [f"{key} {config[key]}" for key in keys if config.get(key) is not None]
    return ", ".join([str(config.get("model_type")), *known])


def _parameter_rows(folder: Path, origin: Origin) -> list[tuple[Any, ...]]:
    found = origin.parameters or count_parameters(empty_model(read_config(folder)))
    return [
        ("parameters", f"{found['total']:,}"),
        ("parameters active for one token", f"{found['active']:,}"),
    ]


def _experts(raw: Mapping[str, Any]) -> str:
    if raw.get("moe") is None:
        return ""
    parts = MoeSection.from_dict({key: value for key, value in raw["moe"].items() if key in PARTS}).parts()
    rows = []
    for name, part in parts.items():
        counts = sorted(set(part.num_experts))
        number = counts[0] if len(counts) == 1 else list(part.num_experts)
        extra = [f"{key} {value}" for key in ("shared", "capacity", "expert_width") if (value := getattr(part, key))]
        router, experts = _named(part.router), _named(part.experts)
        rows.append((name, list(part.layers), number, router, experts, "; ".join(extra)))
    return "### Experts\n\n" + _table(rows, ("part", "layers", "experts", "router", "kind", "besides"))


def _named(part: Any) -> str:
    return part.name + (f" {part.args}" if part.args else "")


def _history(origin: Origin) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("made by", f"`{origin.made_by}`")]
    rows += [("stage", origin.stage)] if origin.stage else []
    rows += [("made from", f"`{parent}`") for parent in origin.parents]
    return rows + [(key, _plain(value)) for key, value in origin.facts.items() if value is not None]


def _data(origin: Origin) -> str:
    return "" if not origin.data else "### Data\n\n" + "\n".join(f"- {line}" for line in origin.data)


def _recipe(origin: Origin) -> str:
    if origin.recipe is None:
        return ""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", origin.recipe))])
    return f"### Recipe\n\n{fence}yaml\n{origin.recipe.strip()}\n{fence}"


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str] | None = None) -> str:
    """A Markdown table; without a head the first column names what the second holds."""
    columns = head or ("", "")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where the file is missing."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _write(file: Path, text: str) -> None:
    """In one step: a reader sees the old file or the whole new one."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # several evaluations may end together
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
