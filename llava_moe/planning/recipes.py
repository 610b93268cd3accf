"""A recipe among its neighbours: its header, the recipe that makes its start point, and the config files beside them.

A folder of recipes may have a folder `configs` with one JSON file for each hub model that its recipes name:

    {"hub_id": "Qwen/Qwen3-1.7B", "source": "where the values were read", "tokenizer_length": 151669, "config": {...}}

`config` holds the values of the model's config.json that fix its sizes, `model_type` among them; `tokenizer_length`
says how many tokens its tokenizer has, which decides whether an image token needs another row of the embedding. With
these files a recipe is described where neither the hub nor a checkpoint is at hand.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llava_moe.config import RecipeError, RunConfig, load_recipe

CONFIGS = "configs"
_KEY = re.compile(r"^# ?([A-Z][a-z]+): *(.*)$")
_DEVICES = re.compile(r"^(\d+) x ")
_OUTPUT = re.compile(r"^output_dir: *(.+?) *$", re.MULTILINE)
_MADE = {"model": None, "upcycled": "upcycle", "grown": "grow"}


@dataclass(frozen=True)
class Header:
    """The comment at the head of a recipe: lines `# Key: text`, continued by indented ones."""

    fields: dict[str, str]

    @property
    def devices(self) -> int:
        """How many devices `Hardware: N x ...` names; 1 where it names none."""
        match = _DEVICES.match(self.fields.get("Hardware", ""))
        return 1 if match is None else int(match[1])

    @property
    def control(self) -> str | None:
        """The file that `Control:` names."""
        text = self.fields.get("Control")
        return None if text is None else re.split(r"[,;\s]", text, maxsplit=1)[0]


def read_header(recipe: str | Path) -> Header:
    """Reads the comment lines before the first other line."""
    fields: dict[str, str] = {}
    key = None
    for line in Path(recipe).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = _KEY.match(line)
        if match is not None:
            key = match[1]
            fields[key] = match[2].strip()
        elif key is not None:
            fields[key] = f"{fields[key]} {line.lstrip('# ').strip()}".strip()
    return Header(fields)


class Library:
    """The recipes and config files around one recipe.

    Args:
        recipe: its file. The library is the nearest folder above it that has a folder `configs`, or else its own.
    """

    def __init__(self, recipe: str | Path) -> None:
        folder = Path(recipe).resolve().parent
        self.root = next((p for p in (folder, *folder.parents) if (p / CONFIGS).is_dir()), folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Library) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def known_config(self, hub_id: str) -> dict[str, Any] | None:
        """What the library has on a hub model, or None.

        Raises:
            RecipeError: a file of the library is not what it should be.
        """
        return _known_configs(self.root).get(hub_id)

    def maker_of(self, checkpoint: str) -> tuple[Path, RunConfig] | None:
        """The recipe whose run writes this checkpoint directory, or None.

        Raises:
            RecipeError: there is one, and it cannot be read.
        """
        name = Path(checkpoint).name
        if name not in _MADE:
            return None
        folder = str(Path(checkpoint).parent)
        for path, output in _outputs(self.root):
            if _resolved(output) == folder:
                config = _read(path, folder)
                section = _MADE[name]
                if section is None or getattr(config, section) is not None:
                    return path, config
        return None


@lru_cache(maxsize=8)
def _known_configs(root: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((root / CONFIGS).glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}: not valid JSON: {error}") from error
        absent = {"hub_id", "source", "config"} - set(raw if isinstance(raw, dict) else ())
        if absent or "model_type" not in raw["config"]:
            raise RecipeError(f"{path}: {', '.join(sorted(absent)) or 'config.model_type'} is missing")
        found[raw["hub_id"]] = raw
    return found


@lru_cache(maxsize=8)
def _outputs(root: Path) -> tuple[tuple[Path, str], ...]:
    """Every recipe below a folder with its output_dir as it is written there."""
    found = []
    for path in sorted(root.rglob("*.yaml")):
        match = _OUTPUT.search(path.read_text(encoding="utf-8"))
        if match is not None:
            found.append((path, match[1]))
    return tuple(found)


@lru_cache(maxsize=64)
def _read(path: Path, output: str) -> RunConfig:
    """A recipe, read once for each folder that the environment makes of its output_dir."""
    return load_recipe(path)


def _resolved(output: str) -> str | None:
    """An output_dir with its environment variables filled in; None where one is not set."""
    if "$" not in output:
        return str(Path(output))
    try:
        return str(Path(OmegaConf.create({"value": output}).value))
    except OmegaConfBaseException:
        return None
