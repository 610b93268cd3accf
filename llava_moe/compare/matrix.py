"""A comparison as a YAML file: what is compared, on which seeds, and what each cell (method, seed) trains.

    recipe: ../quickstart/moe.yaml        # of all methods; paths of recipes are relative to this file
    control: ../quickstart/control.yaml   # of the dense control
    parent:
      checkpoint: runs/quickstart/sft/model
      recipes: [../quickstart/pretrain.yaml, ../quickstart/sft.yaml]   # make it, where it is not there
    output_dir: runs/compare
    seeds: [1, 2, 3]
    methods:
      top_k: {}
      xmoe: {about: X-MoE, upcycle: {decoder: {router: {name: xmoe, args: {k: 2}}}}}
    scoring: {data: runs/quickstart/data/eval, tasks: [local_gqa, local_pope]}

The dense control (`dense`: recipe `control`) and the random router (`random`: `recipe` with RandomRouter of the same k)
are always methods; naming one of them changes what it says of it, never whether it is there. What methods may differ
in is how the parent is upcycled, what balances the experts, and rates: data, steps and seeds are common to all, so that
the cells of a seed see the same samples in the same order.

A method's `router`, `experts`, `upcycler`, `balance.losses` and `balance.controllers` take the place of the recipe's
whole; other keys are merged into the recipe's. In `stage.learning_rates` null takes a part out.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_moe.compare.matrix_config import read_matrix
from llava_moe.config import RecipeError, RunConfig, load_recipe
from llava_moe.evaluation.suites import expand
from llava_moe.evaluation.tasks import LOCAL_TASKS
from llava_moe.registry import near_misses

DENSE, RANDOM = "dense", "random"
MAY_DIFFER = ("upcycle", "balance", "stage")
_SHARED = ("data", "train", "speed", "model")  # what recipe and control must agree on
_ABOUT = {DENSE: "the parent trained on, no experts", RANDOM: "experts, chosen at random"}
_WHOLE = ("router", "experts", "upcycler", "losses", "controllers")  # a method's takes the place of the recipe's
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Method:
    """One row of the matrix: its name, what it is in a few words, and what it changes in the recipe."""

    name: str
    about: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One method with one seed."""

    method: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def run(self) -> Path:
        """Output directory of its training."""
        return self.folder / "run"


class Matrix:
    """A matrix file, read and checked.

    Args:
        path: the YAML file.
        overrides: dotted, of the matrix itself, e.g. `seeds=[1]`; later ones win.

    Raises:
        RecipeError: the file, a recipe or a method is wrong; the message names file and key.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path = path
        self.config = read_matrix(path, overrides)
        self.recipe, self.control = self.beside(self.config.recipe), self.beside(self.config.control)
        self.out = Path(self.config.output_dir)
        self.seeds = tuple(self.config.seeds)
        self._base = load_recipe(self.recipe, self.config.overrides)
        self._dense = load_recipe(self.control, self.config.overrides)
        self._check_recipes()
        self.methods = {name: self._method(name) for name in self._names()}
        for name in self.methods:
            self.cell_config(self.cell(name, self.seeds[0]))  # refused here, not after the first hour

    def beside(self, recipe: str) -> Path:
        """A recipe's path, which is written relative to the matrix file."""
        return Path(recipe) if Path(recipe).is_absolute() else self.path.parent / recipe

    @property
    def parent_recipes(self) -> list[Path]:
        return [self.beside(recipe) for recipe in self.config.parent.recipes]

    def cell(self, method: str, seed: int) -> Cell:
        return Cell(method, seed, self.out / "cells" / method / f"seed_{seed}")

    @property
    def cells(self) -> list[Cell]:
        """Seed by seed, so that an early look at an unfinished matrix compares equals; the dense control first."""
        return [self.cell(method, seed) for seed in self.seeds for method in self.methods]

    @property
    def checked(self) -> RunConfig:
        """The recipe of all methods as a run of the matrix itself: to check the data once for all cells."""
        return dataclasses.replace(copy.deepcopy(self._base), output_dir=str(self.out))

    def cell_config(self, cell: Cell) -> RunConfig:
        """What a cell trains.

        Raises:
            RecipeError: the method's keys do not make a recipe.
        """
        dense = cell.method == DENSE
        raw = dataclasses.asdict(self._dense if dense else self._base)
        _change(raw, self.methods[cell.method].changes)
        raw["output_dir"], raw["seed"] = str(cell.run), cell.seed
        raw["train"] = {key: value for key, value in raw["train"].items() if key not in ("seed", "data_seed")}
        raw["scoring"] = self._live_scoring()
        if self.config.devices_per_job == 1:
            raw["deepspeed"] = None  # one process on one device, which it could only slow down
        raw["model"]["checkpoint"] = self.config.parent.checkpoint if dense else str(cell.run / "upcycled")
        if not dense:
            raw["upcycle"]["parent"], raw["upcycle"]["seed"] = self.config.parent.checkpoint, cell.seed
        return _load(raw, f"{self.path}: methods.{cell.method}")

    def questions(self, limit: int | None) -> Path:
        """The folder with so many questions of each local task, out of those of `scoring`; `questions.py` writes it."""
        whole = self.config.scoring.limit
        if limit is None or limit == whole:
            limit, whole = whole, None
        if limit is None:
            return Path(self.config.scoring.data or "")
        return self.out / "questions" / (f"{limit}" if whole is None else f"{limit}_of_{whole}")

    def _live_scoring(self) -> dict[str, Any] | None:
        found, asked = self.config.stability, self.config.scoring
        if found is None:
            return None
        tasks = found.tasks or [name for name in expand(asked.tasks) if name in LOCAL_TASKS]
        values = {"data": str(self.questions(found.limit)), "tasks": tasks}
        return {**values, "batch_size": asked.batch_size, "every": found.every, "limit": None}

    def _check_recipes(self) -> None:
        if self._base.upcycle is None:
            raise RecipeError(f"{self.recipe}: the recipe of a matrix has a section upcycle")
        if self._dense.upcycle is not None:
            raise RecipeError(f"{self.control}: the dense control has no section upcycle")
        for key in (*_SHARED, *(["deepspeed"] if self.config.devices_per_job > 1 else [])):
            one, other = (_flat(dataclasses.asdict(c)[key], key) for c in (self._base, self._dense))
            if differing := sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k)):
                raise RecipeError(
                    f"{self.recipe} and its control {self.control} differ in {', '.join(differing)}; "
                    "a comparison needs the same data and steps: make them equal, or set both by `overrides`"
                )
        self._check_stages()
        for config, path in ((self._base, self.recipe), (self._dense, self.control)):
            if config.lora is not None or config.expert_parallel is not None:
                raise RecipeError(f"{path}: a cell trains whole checkpoints; leave out lora and expert_parallel")

    def _check_stages(self) -> None:
        """Raises RecipeError where a part that both recipes train learns or decays otherwise in the control."""
        one, other = self._base.stage, self._dense.stage
        for part in sorted(one.learning_rates.keys() & other.learning_rates.keys()):
            rates = one.learning_rates[part], other.learning_rates[part]
            decays = one.decay_of(part), other.decay_of(part)
            for key, values in (("learning_rates", rates), ("weight_decay", decays)):
                if values[0] != values[1]:
                    raise RecipeError(
                        f"{self.recipe} and its control {self.control} differ in stage.{key} of {part}: {values[0]} "
                        f"and {values[1]}; both train it, so make them equal, or set both by `overrides`"
                    )

    def _names(self) -> list[str]:
        given = list(self.config.methods)
        if not [name for name in given if name not in (DENSE, RANDOM)]:
            raise RecipeError(f"{self.path}: methods names nothing to compare with the controls {DENSE} and {RANDOM}")
        for name in given:
            if not _NAME.fullmatch(name):
                raise RecipeError(f"{self.path}: methods.{name}: a name is made of letters, digits and _ . + -")
        return [DENSE, RANDOM, *(name for name in given if name not in (DENSE, RANDOM))]

    def _method(self, name: str) -> Method:
        where = f"{self.path}: methods.{name}"
        raw = self.config.methods.get(name) or {}
        if not isinstance(raw, dict):
            raise RecipeError(f"{where} must be a mapping of sections of a recipe; {{}} for the recipe as it is")
        about = str(raw.get("about", _ABOUT.get(name, "")))
        changes = {key: value for key, value in raw.items() if key != "about"}
        for key in changes:
            if key in {f.name for f in dataclasses.fields(RunConfig)} - set(MAY_DIFFER):
                raise RecipeError(
                    f"{where}.{key}: methods differ in {', '.join(MAY_DIFFER)}; what all share is set by `overrides`"
                )
            if key not in MAY_DIFFER:
                raise RecipeError(f"{where}: unknown key {key}; {near_misses(str(key), ['about', *MAY_DIFFER])}")
            if not isinstance(changes[key], dict):
                raise RecipeError(f"{where}.{key} must be a mapping of keys of that section")
        if shared := {"parent", "seed"} & set(changes.get("upcycle", {})):
            raise RecipeError(f"{where}.upcycle.{min(shared)}: is common to all methods; set it in the matrix")
        if name == DENSE and set(changes) - {"stage"}:
            raise RecipeError(f"{where}: the dense control has no {', '.join(sorted(set(changes) - {'stage'}))}")
        return Method(name, about, _random_changes(self._base, changes, where) if name == RANDOM else changes)


def _flat(values: Any, prefix: str) -> dict[str, Any]:
    """A section's values by dotted key, without the checkpoint, which the matrix sets."""
    if not isinstance(values, dict):
        return {prefix: values}
    found = {k: v for key, value in values.items() for k, v in _flat(value, f"{prefix}.{key}").items()}
    return {key: value for key, value in found.items() if key != "model.checkpoint"}


def _random_changes(base: RunConfig, changes: dict[str, Any], where: str) -> dict[str, Any]:
    """The recipe with random routers of the same k: nothing to balance, no router that learns."""
    assert base.upcycle is not None
    _check_random(base, changes, where)
    parts: dict[str, Any] = {}
    for name, part in base.upcycle.parts().items():
        given = (changes.get("upcycle", {}).get(name) or {}).get("router") or {}
        if given.get("name", "random") != "random":
            raise RecipeError(f"{where}.upcycle.{name}.router: the control's router is `random`; name others elsewhere")
        k = (given.get("args") or {}).get("k", part.router.args.get("k"))
        if k is None:
            raise RecipeError(
                f"{where}: router {part.router.name} of the recipe names no k; give the experts of a token, as "
                f"methods.random.upcycle.{name}.router: {{name: random, args: {{k: 2}}}}"
            )
        parts[name] = {"router": {"name": "random", "args": {"k": k}}}
    own = {
        "upcycle": parts,
        "balance": {"losses": {}, "controllers": {}},
        "stage": {"learning_rates": {"router": None}},
    }
    merged: dict[str, Any] = copy.deepcopy(changes)
    for section, values in own.items():
        _merge(merged.setdefault(section, {}), values)
    return merged


def _check_random(base: RunConfig, changes: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError for what a random router has no use for, and would not get."""
    assert base.upcycle is not None
    if "balance" in changes:
        raise RecipeError(f"{where}.balance: random routing has nothing to balance; leave it out")
    if "router" in (changes.get("stage", {}).get("learning_rates") or {}):
        raise RecipeError(f"{where}.stage.learning_rates.router: a random router does not learn; leave it out")
    known = base.upcycle.parts()
    for name, part in changes.get("upcycle", {}).items():
        if name not in known:
            raise RecipeError(f"{where}.upcycle.{name}: the recipe upcycles {', '.join(known)} only")
        router = part.get("router") if isinstance(part, Mapping) else part
        if router is not None and not isinstance(router, Mapping):
            raise RecipeError(
                f"{where}.upcycle.{name}: must be a mapping, with router: {{name: random, args: {{k: 2}}}}"
            )
        if unknown := sorted(set((router or {}).get("args") or {}) - {"k"}):
            raise RecipeError(
                f"{where}.upcycle.{name}.router.args.{unknown[0]}: of the random control only k is chosen"
            )


def _change(raw: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Applies a method's changes to the mapping of a recipe."""
    for section, values in changes.items():
        if raw.get(section) is None:
            raw[section] = {}
        _merge(raw[section], values)
    rates = raw["stage"]["learning_rates"]
    raw["stage"]["learning_rates"] = {part: rate for part, rate in rates.items() if rate is not None}


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict) and key not in _WHOLE:
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)


def _load(raw: dict[str, Any], where: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        try:
            return load_recipe(path)
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(path), where)) from error
