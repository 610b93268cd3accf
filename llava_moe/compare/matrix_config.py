"""The sections of a matrix file, and how it is read: typed and strict like a recipe. What they mean: `matrix.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llava_moe.config import RecipeError
from llava_moe.registry import near_misses


@dataclass
class ParentSection:
    """The dense checkpoint that every cell starts from."""

    checkpoint: str = MISSING
    recipes: list[str] = field(default_factory=list)  # that make it, in their order; empty: it must be there


@dataclass
class QuestionsSection:
    """What every cell answers."""

    tasks: list[str] = MISSING  # suites and tasks of `llava-moe eval` that are scored question by question
    data: str | None = None  # folder with the parquet files of the local tasks
    mirror: str | None = None  # folder of data sets, see docs/evaluation.md; null: lmms-eval fetches them
    limit: int | None = None  # so many questions of each task, see `questions.py`; null asks all
    batch_size: int = 16  # prompts answered together
    dtype: str = "float32"  # of the weights while they answer


@dataclass
class StabilitySection:
    """Scores while a cell trains, to see how much they move from checkpoint to checkpoint."""

    every: int = MISSING  # steps; a multiple of train.logging_steps
    tasks: list[str] = field(default_factory=list)  # local ones; empty: those among `scoring`
    limit: int | None = None  # questions of each task; null asks all


@dataclass
class BrittlenessSection:
    """Scores without each token's top expert, beside those of the intact model on the same questions."""

    tasks: list[str] = field(default_factory=list)  # of those of `scoring`; empty: all
    limit: int | None = None  # questions of each task; null asks as many as `scoring`


@dataclass
class MatrixConfig:
    """A comparison."""

    title: str = "Comparison"
    recipe: str = MISSING
    control: str = MISSING
    output_dir: str = MISSING
    overrides: list[str] = field(default_factory=list)  # key=value, of both recipes: train.max_steps=90
    parent: ParentSection = field(default_factory=ParentSection)
    methods: dict[str, Any] = field(default_factory=dict)  # name: {about: text, section of a recipe: ...}
    seeds: list[int] = MISSING
    scoring: QuestionsSection = field(default_factory=QuestionsSection)
    stability: StabilitySection | None = None
    brittleness: BrittlenessSection | None = field(default_factory=BrittlenessSection)
    active_tolerance: float = 5.0  # percent by which active parameters may differ from those of the random router
    allow_unequal_active: bool = False  # methods beyond it are marked in the report instead of refused
    jobs: int = 1  # cells at the same time
    devices: list[str] | None = None  # GPUs of all jobs, as in CUDA_VISIBLE_DEVICES; null: those that are visible
    devices_per_job: int = 1  # GPUs (on a CPU: processes) of a cell
    keep_models: bool = True  # false deletes a cell's weights once it has answered everything


def read_matrix(path: Path, overrides: Sequence[str] = ()) -> MatrixConfig:
    """Reads and types a matrix file; strict like a recipe.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, a value has the wrong type or is absent.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such matrix")
    merged: Any = OmegaConf.structured(MatrixConfig)
    sources: list[tuple[str, Any]] = [(str(path), lambda: OmegaConf.load(path))]
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise RecipeError(f"override {override!r} is not of the form key.key=value")
        sources.append((f"override {override!r}", lambda text=override: OmegaConf.from_dotlist([text])))
    for source, read in sources:
        try:
            raw: Any = OmegaConf.to_container(read())
        except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
            raise RecipeError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(raw, dict):
            raise RecipeError(f"{source}: a matrix is a mapping of keys")
        _check_keys(raw, MatrixConfig, source, "")
        try:
            merged = OmegaConf.merge(merged, raw)
        except OmegaConfBaseException as error:
            raise RecipeError(f"{source}: {getattr(error, 'full_key', None) or 'value'}: {_line(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise RecipeError(f"{path}: {key or 'value'} must be set: {_line(error)}") from error
    assert isinstance(config, MatrixConfig)
    check_values(path, config)
    return config


_SECTIONS = {c.__name__: c for c in (ParentSection, QuestionsSection, StabilitySection, BrittlenessSection)}


def _check_keys(raw: Any, schema: Any, source: str, prefix: str) -> None:
    known = {f.name: str(f.type).replace(" | None", "") for f in dataclasses.fields(schema)}
    for key, value in raw.items():
        if key not in known:
            raise RecipeError(f"{source}: unknown key {prefix}{key}; {near_misses(str(key), list(known))}")
        if known[key] in _SECTIONS and isinstance(value, dict):
            _check_keys(value, _SECTIONS[known[key]], source, f"{prefix}{key}.")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def check_values(path: Path, config: MatrixConfig) -> None:
    """Raises RecipeError where a value is refused, whatever the recipes say."""
    for key, value in _counts(config).items():
        if value < 1:
            raise RecipeError(f"{path}: {key}={value} must be a whole number from 1 on")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise RecipeError(f"{path}: seeds={list(config.seeds)} must name at least one seed, each once")
    if not config.scoring.tasks:
        raise RecipeError(f"{path}: scoring.tasks is empty; name at least one task, e.g. [local_gqa]")
    if not 0 < config.active_tolerance < 100:
        raise RecipeError(f"{path}: active_tolerance={config.active_tolerance} must be percent in 0 to 100")
    needed = config.jobs * config.devices_per_job
    if config.devices is not None and len(config.devices) < needed:
        raise RecipeError(
            f"{path}: devices names {len(config.devices)} for jobs={config.jobs} with devices_per_job="
            f"{config.devices_per_job}; name {needed}"
        )
    asked, dropped = config.scoring, config.brittleness
    if dropped is None:
        return
    if dropped.limit is not None and asked.limit is not None and dropped.limit > asked.limit:
        raise RecipeError(
            f"{path}: brittleness.limit={dropped.limit} asks for more questions than scoring.limit={asked.limit}"
        )


def _counts(config: MatrixConfig) -> dict[str, int]:
    """Values that must be at least 1, by key."""
    found: dict[str, int | None] = {
        "jobs": config.jobs,
        "devices_per_job": config.devices_per_job,
        "scoring.batch_size": config.scoring.batch_size,
        "scoring.limit": config.scoring.limit,
    }
    if config.stability is not None:
        found |= {"stability.every": config.stability.every, "stability.limit": config.stability.limit}
    if config.brittleness is not None:
        found |= {"brittleness.limit": config.brittleness.limit}
    return {key: value for key, value in found.items() if value is not None}
